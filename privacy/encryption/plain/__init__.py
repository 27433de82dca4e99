"""Scheme `plain`: no encryption."""
