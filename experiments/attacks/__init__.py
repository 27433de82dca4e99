"""Attacks on a run's releases, each with what an attacker gets and the bound that it may not pass.

`statistics` judges scores, `refusals` tries what must be refused, the other files are one attack each.
"""
