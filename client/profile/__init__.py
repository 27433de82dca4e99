"""The task profile: probe, public map and sum. Of `dp` it takes one check: no layer keeps a state."""
