"""All clients of a federation in one process, over the same session, server and privacy code.

No protocol and no accounting of its own: only the transport and the shared models are of this room.
"""
