"""`fedmosaic run`: a scenario in one process or in many, and tables of such runs."""
