"""All that can be found out before enrolling, as for `fedmosaic doctor`; nothing is spent or changed."""
