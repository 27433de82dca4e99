"""One-time alignment of the frozen A and B across architectures, on public data."""
