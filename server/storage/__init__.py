"""What the server keeps: the database and the files of uploads and aggregates.

Knows no rounds' rules and no gRPC.
"""
