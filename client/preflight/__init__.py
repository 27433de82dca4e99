"""Everything that can be found out before a client enrols; `fedmosaic doctor` runs the same.

Nothing is spent or changed here, and nothing sent but one question to the server.
"""
