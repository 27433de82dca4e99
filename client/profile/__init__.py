"""The task profile: probe, public map, and its release.

Stands on `client.model`. Of `client.dp` it takes one check: that no layer keeps anything
of earlier examples.
"""
