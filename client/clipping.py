"""How many examples were clipped, for the client's own statement.

The counts depend on private data and carry no noise, so they stay in the state directory; what a client
hands over leaves them out.
"""

import json
from pathlib import Path
from typing import Final

from fedmosaic.privacy.configuration import parse_json
from fedmosaic.privacy.files import write_atomically
from fedmosaic.privacy.ledger.rows import Channel
from fedmosaic.protos.errors import StateError

CLIPPING: Final = "clipping.json"


class ClippingRecord:
    """Counts per channel, kept in one small file so that a restarted client goes on counting."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, channel: Channel, clipped: int, examples: int) -> None:
        """Count the clipped ones among the examples of one release."""
        counts = self._read()
        before = counts.get(channel, (0, 0))
        counts[channel] = (before[0] + clipped, before[1] + examples)
        write_atomically(self._path, json.dumps(counts).encode())

    def shares(self) -> dict[Channel, float]:
        """Share of clipped examples by channel, of the channels that saw any."""
        return {
            channel: clipped / examples for channel, (clipped, examples) in self._read().items() if examples
        }

    def _read(self) -> dict[Channel, tuple[int, int]]:
        if not self._path.exists():
            return {}
        try:
            stored = parse_json(self._path.read_bytes())
            return {channel: (int(clipped), int(examples)) for channel, (clipped, examples) in stored.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise StateError(
                f"{self._path} is damaged ({error}); delete it, only the share of clipped examples is lost"
            ) from None
