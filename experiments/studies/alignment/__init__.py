"""experiments/studies/alignment."""
