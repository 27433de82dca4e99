"""Attacks on what a client releases: statistics, bounds and audits. numpy and scipy only, no models."""
