"""All clients of a federation in one process, over the same session, server and privacy code."""
