"""Do noised profiles still find related clients? Designs of the profile compared."""
