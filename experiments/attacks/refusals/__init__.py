"""Hostile messages, keys and statements, and whether the product refuses them."""
