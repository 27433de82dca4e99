"""Encrypted aggregation: clients encrypt and decrypt, the server sums what it cannot read.

`ciphers` and what it imports belong to the client and hold keys for the time of a call. `aggregators` and
what it imports belong to the server: numpy and public randomness only, no key, no homomorphic library.
"""
