"""Who belongs to a federation: roster, terms, identities, certificates and the kits that are handed out.

Knows no rounds and no models.
"""
