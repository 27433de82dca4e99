"""How many bytes this client sent and received, by channel."""

import threading
from collections import Counter
from typing import Final, Literal

Channel = Literal["adapter", "profile", "keys", "control"]
CHANNELS: Final[tuple[Channel, ...]] = ("adapter", "profile", "keys", "control")


class Traffic:
    """Serialised message bytes per channel; what HTTP/2 and TLS add is not in them.

    The channels: `adapter` is chunks of uploads and aggregates, `profile` the task profile, `keys` the key
    agreement, `control` everything else.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sent: Counter[Channel] = Counter()
        self._received: Counter[Channel] = Counter()

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
