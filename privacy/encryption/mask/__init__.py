"""Scheme `mask`: an additively homomorphic stream cipher over 32-bit words."""
