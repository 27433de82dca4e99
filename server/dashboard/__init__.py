"""The dashboard: a page and metrics of a server, made by another process that can only read its state.

It shows what the server may know: no loss, count of examples, score or value of a profile or adapter.
"""
