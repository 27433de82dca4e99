"""Attacks on a run's releases, each with what an attacker gets and the bound that it may not pass."""
