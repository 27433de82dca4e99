"""DP-SGD on the shared branch: per-example gradients, clipping, noise, and the checks before them.

Stands on `client.model` and `client.colora`; books every event through its caller.
"""
