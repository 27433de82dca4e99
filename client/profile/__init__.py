"""The task profile: probe, public map, and its release.

Stands on `client.model`; never imports `client.dp`.
"""
