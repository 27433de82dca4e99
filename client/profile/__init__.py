"""The task profile.

    probe       exact gradients of single examples
    release     the private sum that a client's profile is released from
    fit         the public map, fitted once per federation

Stands on `client.model`. Of `client.dp` it takes one check: that no layer keeps anything of earlier examples.
"""
