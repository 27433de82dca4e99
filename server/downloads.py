"""What a client loads before a round, as parts of files."""

import hashlib
from dataclasses import dataclass

from fedmosaic.protos.messages import Aggregate, AggregateSection
from fedmosaic.server.round.aggregates import Offer
from fedmosaic.server.settings import ServerSettings
from fedmosaic.server.storage.blobs import Blobs


@dataclass(frozen=True)
class Download:
    """An aggregate without payloads; these, as views of files, one per section, empty where refused.

    `sha256` is of all payloads, laid end to end.
    """

    aggregate: Aggregate
    payloads: tuple[memoryview, ...]
    sha256: bytes

    @property
    def size(self) -> int:
        """Bytes of all payloads."""
        return sum(len(payload) for payload in self.payloads)

    @property
    def whole(self) -> bool:
        """Whether the files still are what was aggregated; reads all of them."""
        digest = hashlib.sha256()
        for payload in self.payloads:
            digest.update(payload)
        return digest.digest() == self.sha256


def read_download(
    settings: ServerSettings, blobs: Blobs, offer: Offer, client: str, epoch: int, head: bytes
) -> Download:
    """What was made for a client when the round before was closed; `epoch` is of the uploads to come.

    Raises:
        MissingBlobError: a file is missing.
        StateError: what the database says of the aggregate is damaged.
    """
    number, stored = offer.round, offer.stored.get(client)
    if stored is None:
        why = f"{client} had not enrolled when round {number - 1} was closed"
        names = settings.dimensions(client) if number > 1 else ()
        nothing = tuple(AggregateSection(name, None, b"", why) for name in names)
        return Download(Aggregate(number, nothing, 0, epoch, head), (), hashlib.sha256().digest())
    found = offer.sections(settings, client)
    payloads = tuple(
        blobs.read("aggregates", number, place.blob, place.start, place.size)
        if place.size
        else memoryview(b"")
        for _, place in found
    )
    aggregate = Aggregate(number, tuple(s for s, _ in found), stored.key_epoch, epoch, head)
    return Download(aggregate, payloads, stored.sha256)
