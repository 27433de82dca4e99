"""What releases cost: events, ε and δ, calibration of the noise, trade-off curves.

Knows no data, no gradient and no ledger; nothing else of the room may be imported here.
"""
