"""The client's way to the server: gRPC over mutual TLS.

    grpc            what a session asks of the server, its bytes counted
    connection      the channel, and the patience to try again
    causes          what a failed call means, and what to do

Knows no models and no keys of the group.
"""
