"""A round from open to closed: its state, closing, relevance of profiles and weight rows.

Pure decisions on what the store holds; knows no gRPC.
"""
