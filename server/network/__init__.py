"""The gRPC side of the server: the servicer, its peers, waiting calls, certificates.

Thin: every decision is the coordinator's.
"""
