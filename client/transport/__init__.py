"""The way to the server: gRPC over mutual TLS, errors told apart, bytes counted; no models, no keys."""
