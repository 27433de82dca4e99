"""Secure aggregation: a server learns the sum of a group's integer vectors, and nothing of any one of them.

Stands here: the terms of one sum, secret sharing, masks, the messages, a member's part and the server's.
Knows nothing of adapters, noise, rounds of training or transports.
"""
