"""What a client may load before a round, as the coordinator hands it to a transport."""

import hashlib
from dataclasses import dataclass

from fedmosaic.protos.messages import Aggregate, AggregateSection
from fedmosaic.server.round.aggregates import read_sections
from fedmosaic.server.settings import ServerSettings
from fedmosaic.server.storage.blobs import Blobs
from fedmosaic.server.storage.store import Store


@dataclass(frozen=True)
class Download:
    """An aggregate with its payloads as views of files.

    Attributes:
        aggregate: without payloads.
        payloads: one per section, in order; empty where refused.
        sha256: of all payloads, laid end to end.
    """

    aggregate: Aggregate
    payloads: tuple[memoryview, ...]
    sha256: bytes

    @property
    def whole(self) -> bool:
        """Whether the files still are what was aggregated; reads all of them."""
        digest = hashlib.sha256()
        for payload in self.payloads:
            digest.update(payload)
        return digest.digest() == self.sha256


def read_download(
    settings: ServerSettings, store: Store, blobs: Blobs, client: str, number: int, epoch: int, head: bytes
) -> Download:
    """What was stored for a client when the round before was closed.

    Args:
        settings: of the run.
        store: of the run.
        blobs: of the run.
        client: recipient.
        number: the open round, or one above the last.
        epoch: key epoch of the uploads that are to come.
        head: of the run.

    Raises:
        MissingBlobError: a file is missing.
    """
    stored = store.aggregate(number, client)
    if stored is None:
        why = f"{client} had not enrolled when round {number - 1} was closed"
        names = settings.dimensions(client) if number > 1 else ()
        nothing = tuple(AggregateSection(name, None, b"", why) for name in names)
        return Download(Aggregate(number, nothing, 0, epoch, head), (), hashlib.sha256().digest())
    sections, sizes = read_sections(stored)
    payloads = tuple(
        blobs.read("aggregates", number, f"{client}.{section.name}") if size else memoryview(b"")
        for section, size in zip(sections, sizes, strict=True)
    )
    aggregate = Aggregate(number, tuple(sections), stored.key_epoch, epoch, head)
    return Download(aggregate, payloads, stored.sha256)
