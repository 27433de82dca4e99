"""Clip, sum, noise: the mechanisms themselves, their public maps and their source of randomness.

Nothing here decides whether a release may be made: that is the ledger's to say, before noise is drawn.
"""
