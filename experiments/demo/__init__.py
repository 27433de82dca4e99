"""`fedmosaic demo`: a federation of real processes, with models and data from package registries."""
