"""Scheme `ckks`: approximate homomorphic encryption; clients through SEAL, the server in numpy."""
