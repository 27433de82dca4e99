"""Agreement on the group key that members share and the server never holds; its nonces.

Knows no adapters: what is encrypted with the key is for `fedmosaic.privacy.encryption` to say.
"""
