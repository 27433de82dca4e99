"""`fedmosaic run` and tables of runs."""
