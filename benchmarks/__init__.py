"""Benchmarks that anyone can rerun; see the Makefile."""
