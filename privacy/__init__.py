"""Mechanisms, accounting, ledger, identities, encryption and the privacy statement."""
