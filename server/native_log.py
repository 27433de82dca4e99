"""Say in our words what gRPC's C core says of a refused TLS handshake.

A client whose certificate is expired, foreign or missing never reaches Python: TLS ends the connection,
and the only trace is a line that the C core writes to standard error. Those lines are turned into records
of our log; everything else passes through unchanged.
"""

import io
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, TextIO

log = logging.getLogger(__name__)
_MARK: Final = "Handshake failed with error"
_REPEAT_SECONDS: Final = 10.0
_REASONS: Final = {
    "certificate has expired": "its certificate has expired; renew it with `fedmosaic keys rotate`",
    "certificate is not yet valid": "its certificate is not valid yet; compare the clocks of both machines",
    "unable to get local issuer certificate": "its certificate is not from this federation's authority",
    "self signed certificate": "its certificate is not from this federation's authority",
    "unsupported certificate purpose": "its certificate is not one for a client",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it showed no certificate",
    "NO_SHARED_CIPHER": "it does not speak TLS 1.3",
}


def explain(line: str) -> str | None:
    """Our words for a line of the C core about a refused handshake; None for any other line."""
    if _MARK not in line:
        return None
    for fragment, reason in _REASONS.items():
        if fragment.lower() in line.lower():
            return f"refused a connection: {reason}"
    return f"refused a connection: TLS handshake failed ({line.rpartition(':')[2].strip()})"


class _Translator:
    """Passes lines on, but turns those about handshakes into log records, repeated ones seldom."""

    def __init__(self, output: TextIO) -> None:
        self._output = output
        self._last: dict[str, float] = {}

    def pump(self, lines: Iterator[str]) -> None:
        for line in lines:
            message = explain(line)
            if message is None:
                self._output.write(line)
                self._output.flush()
                continue
            now = time.monotonic()
            # A refused client connects again and again; one line per reason and while is enough.
            if now - self._last.get(message, -_REPEAT_SECONDS) >= _REPEAT_SECONDS:
                log.warning("%s", message)
            self._last[message] = now


@contextmanager
def translated_native_log() -> Iterator[TextIO]:
    """Redirect file descriptor 2 through a translator while the context is open.

    Yields:
        The real standard error, for handlers of the log.
    """
    sys.stderr.flush()
    real = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace", buffering=1)
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    os.close(writing)
    lines = io.TextIOWrapper(io.FileIO(reading), encoding="utf-8", errors="replace")
    pump = threading.Thread(target=_Translator(real).pump, args=(iter(lines),), daemon=True)
    pump.start()
    try:
        yield real
    finally:
        sys.stderr.flush()
        os.dup2(real.fileno(), 2)
        pump.join(timeout=1.0)
