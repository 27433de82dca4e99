"""What a client may load before a round, as the coordinator hands it to a transport."""

import hashlib
from dataclasses import dataclass

from fedmosaic.protos.messages import Aggregate, AggregateSection
from fedmosaic.server.blobs import Blobs
from fedmosaic.server.closing import read_sections
from fedmosaic.server.settings import ServerSettings
from fedmosaic.server.store import Store

_NO_BYTES = hashlib.sha256().digest()


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


def open_stored(
    settings: ServerSettings, store: Store, blobs: Blobs, client: str, round_number: int, upload_epoch: int
) -> Download:
    """Open what was stored for a client when the round before was closed.

    The files of a round are removed when the next one opens, so the caller keeps that from happening.

    Args:
        settings: of the run.
        store: of the run.
        blobs: payloads of the aggregates.
        client: recipient.
        round_number: the open round.
        upload_epoch: key epoch of the uploads that are to come.
    """
    stored = store.aggregate(round_number, client)
    if stored is None:
        nothing = _nothing(settings, client, round_number)
        return Download(Aggregate(round_number, nothing, 0, upload_epoch), (), _NO_BYTES)
    sections, sizes = read_sections(stored)
    payloads = tuple(
        blobs.read("aggregates", round_number, f"{client}.{section.name}") if size else memoryview(b"")
        for section, size in zip(sections, sizes, strict=True)
    )
    return Download(
        Aggregate(round_number, tuple(sections), stored.key_epoch, upload_epoch), payloads, stored.sha256
    )


def _nothing(settings: ServerSettings, client: str, round_number: int) -> tuple[AggregateSection, ...]:
    if round_number == 1:
        return ()
    why = f"{client} had not enrolled when round {round_number - 1} was closed"
    return tuple(AggregateSection(name, None, b"", why) for name in settings.dimensions(client))
