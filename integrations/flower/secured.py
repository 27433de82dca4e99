"""TLS 1.3 inside messages: who carries them learns their sizes and times, and can lose them.

One side speaks, then the other. Records that are changed, repeated, or of another session end the session;
the client begins a new one and repeats its call, as after any lost connection.
"""

import enum
import socket
import ssl
import struct
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from fedmosaic.protos import bounds
from fedmosaic.protos.errors import WireError

TURN_BYTES: Final = 8 << 20
"""Most that one side says in one turn."""
HOLD_SECONDS: Final = 20.0
"""How long a client that has nothing to say is asked."""
RECORD: Final = "fedmosaic"
"""Key of the record in a message, and of the bytes in the record."""
_FRAME: Final = struct.Struct(">BI")


class Kind(enum.IntEnum):
    """What a frame holds: the method called, a message, the end of the caller's messages, how it ended."""

    CALL, MESSAGE, END, STATUS = range(4)


Frames = list[tuple[Kind, bytes]]


def tls_context(side: int, authority: Path, certificate: Path, private_key: Path) -> ssl.SSLContext:
    """TLS 1.3 with both certificates required; `side` is a protocol of `ssl`, the files are PEM."""
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(authority)
    context.load_cert_chain(certificate, private_key)
    return context


class Secured:
    """One side of a TLS session whose records somebody else carries; once `agreed`, frames may be sent."""

    def __init__(self, context: ssl.SSLContext, server_name: str | None = None) -> None:
        """Begin; the client's side names the server, and has records to take at once."""
        self._incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self.outgoing, server_side=server_name is None, server_hostname=server_name
        )
        self.agreed, self._text = False, bytearray()
        self.receive(b"")

    def take(self) -> bytes:
        """The next records, as many as a turn carries."""
        return self.outgoing.read(TURN_BYTES)

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        """Add a frame to the records."""
        self._tls.write(_FRAME.pack(kind, len(payload)) + payload)

    def receive(self, records: bytes) -> Frames:
        """The frames that these records complete.

        Raises:
            ssl.SSLError: they are not the peer's next records, or its certificate is not accepted.
            WireError: the peer says what nobody should.
        """
        self._incoming.write(records)
        try:
            if not self.agreed:
                self._tls.do_handshake()
                self.agreed = True
            while piece := self._tls.read(TURN_BYTES):
                self._text += piece
        except ssl.SSLWantReadError:
            pass
        frames: Frames = []
        while len(self._text) >= _FRAME.size:
            kind, size = _FRAME.unpack_from(self._text)
            if kind >= len(Kind) or size > bounds.MAX_MESSAGE_BYTES:
                raise WireError(f"there is no frame of kind {kind} and {size} bytes")
            end = _FRAME.size + size
            if len(self._text) < end:
                break
            frames.append((Kind(kind), bytes(self._text[_FRAME.size : end])))
            del self._text[:end]
        return frames

    def peer(self) -> dict[str, list[bytes]]:
        """What TLS found out about the peer, in the form of gRPC's `auth_context`."""
        names: Any = (self._tls.getpeercert() or {}).get("subjectAltName", ())
        certificate = ssl.DER_cert_to_PEM_cert(self._tls.getpeercert(binary_form=True) or b"")
        return {
            "x509_subject_alternative_name": [value.encode() for _, value in names],
            "x509_pem_cert": [certificate.encode()],
            "ssl_tls_version": [str(self._tls.version()).encode()],
        }


def ask(path: str, records: bytes) -> bytes:
    """What the client at a Unix socket answers to the server's records; empty if nothing, for long."""
    line = socket.socket(socket.AF_UNIX)
    line.settimeout(HOLD_SECONDS)
    try:
        line.connect(path)
        line.setblocking(True)
        with Connection(line.detach()) as connection:
            connection.send_bytes(records)
            return connection.recv_bytes(TURN_BYTES) if connection.poll(HOLD_SECONDS) else b""
    except (OSError, EOFError):
        time.sleep(1.0)
        return b""
