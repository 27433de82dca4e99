"""Version 1 of the wire: generated stubs of `federation.proto`; `generate.py` makes them."""
