"""The client's way to the server: gRPC over mutual TLS, connection errors told apart, bytes counted.

Knows no models and no keys of the group.
"""
