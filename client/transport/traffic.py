"""How many bytes this client sent and received, by channel."""

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Final, Literal

from fedmosaic.privacy.configuration import read_own
from fedmosaic.privacy.files import write_atomically

Channel = Literal["adapter", "profile", "keys", "control"]
CHANNELS: Final[tuple[Channel, ...]] = ("adapter", "profile", "keys", "control")


class Traffic:
    """Serialised message bytes per channel; what HTTP/2 and TLS add is not in them.

    The channels: `adapter` is chunks of uploads and aggregates, `profile` the task profile, `keys` the key
    agreement, `control` everything else.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Begin to count, or go on with the file that `save` writes; StateError if that is damaged."""
        self._lock = threading.Lock()
        self._sent: Counter[Channel] = Counter()
        self._received: Counter[Channel] = Counter()
        self._path = path
        if path is not None:
            read_own(path, self._go_on, "delete it: only the count of bytes is lost")

    def _go_on(self, stored: dict[str, dict[str, int]]) -> None:
        for channel in CHANNELS:
            self._sent[channel] = int(stored[channel]["sent"])
            self._received[channel] = int(stored[channel]["received"])

    def save(self) -> None:
        """Store the counts, if there is a file for them."""
        if self._path is not None:
            write_atomically(self._path, json.dumps(self.as_dict()).encode())

    def sent(self, channel: Channel, size: int) -> None:
        """Count bytes that were sent."""
        with self._lock:
            self._sent[channel] += size

    def received(self, channel: Channel, size: int) -> None:
        """Count bytes that were received."""
        with self._lock:
            self._received[channel] += size

    def as_dict(self) -> dict[str, dict[str, int]]:
        """Bytes sent and received by channel; JSON-compatible."""
        with self._lock:
            return {c: {"sent": self._sent[c], "received": self._received[c]} for c in CHANNELS}
