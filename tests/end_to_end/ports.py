"""Ports for servers that are started as processes, and started again."""

import secrets
import socket


def free_port() -> int:
    """A port that nobody has, from a range that systems do not hand out of themselves.

    A port from the kernel's own range may go to any connection between this call and the server's start.
    """
    for _ in range(1000):
        port = 20_000 + secrets.randbelow(10_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no port between 20000 and 30000 is free on 127.0.0.1")
