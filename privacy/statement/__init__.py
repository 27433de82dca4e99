"""The privacy statement: who learns what, at which ε, in words, tables and JSON.

Reads the ledger and the terms; charges nothing and releases nothing.
"""
