"""What both ends of the pipe know: gRPC's connection, mutual TLS and all, travels in turns.

A turn is bytes of a connection after its number, which the client draws; without a connection it is empty. A
lost, changed or repeated turn ends the connection; gRPC opens a new one, and the client repeats its call.
"""

import time
from multiprocessing.connection import Client
from typing import Final

from fedmosaic.protos import bounds

TURN_BYTES: Final = 8 << 20
"""Longest turn."""
NUMBER_BYTES: Final = 8
"""Length of a connection's number."""
QUIET_SECONDS: Final = 0.2
"""When nothing more comes for so long, a side has said what it wants to say."""
BRIEF_SECONDS: Final = 2.0
"""How long a side is waited for that may have nothing to say."""
HOLD_SECONDS: Final = 20.0
"""How long it is waited for when it is its turn: the server's while a call is open, else the client's."""
RECORD: Final = "fedmosaic"
"""Key of the record in a message, which holds a `turn` and, from the server, whether it is `idle`."""
OPTIONS: Final = (
    ("grpc.max_receive_message_length", bounds.MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", bounds.MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", 4),
    # A turn takes seconds, or minutes: so much is sent unasked, and so long may a handshake take.
    ("grpc.http2.lookahead_bytes", 2 * TURN_BYTES),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.server_handshake_timeout_ms", 300_000),
    ("grpc.min_reconnect_backoff_ms", 300_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)


def ask(path: str, turn: bytes, *, idle: bool) -> bytes:
    """What the client at a Unix socket answers to the server's turn; OSError or EOFError if that is lost."""
    try:
        with Client(path, "AF_UNIX") as client:
            client.send_bytes(bytes([idle]) + turn)
            # A client that runs has answered long before.
            return client.recv_bytes(TURN_BYTES) if client.poll(HOLD_SECONDS + 30.0) else b""
    except (OSError, EOFError):
        if len(turn) > NUMBER_BYTES:
            raise
        time.sleep(1.0)
        return b""
