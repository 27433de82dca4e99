"""`fedmosaic demo`: a federation of real processes, with models and data from package registries.

`data` and `models` fill the cache, `corpora` reads the packages, `command` runs and reports.
"""
