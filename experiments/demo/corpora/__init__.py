"""Texts of the demo, from corpora that wheels carry."""
