"""The durable, hash-chained record of every release of one data set, and the budget it enforces.

Imports accounting; knows no mechanism, no statement, no model and no network.
"""
