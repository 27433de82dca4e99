"""What releases cost: events, ε and δ, calibration of the noise, trade-off curves.

Knows no data, no gradient and no ledger; of the rest of `fedmosaic.privacy` it imports nothing.
"""
