"""What a client may load before a round, as the coordinator hands it to a transport."""

import hashlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from fedmosaic.privacy.encryption.aggregator import Aggregator
from fedmosaic.protos.messages import Aggregate, AggregateSection
from fedmosaic.server.round.aggregates import read_sections
from fedmosaic.server.round.repair import repair_aggregate
from fedmosaic.server.settings import ServerSettings
from fedmosaic.server.storage.blobs import Blobs, MissingBlobError
from fedmosaic.server.storage.store import Store

log = logging.getLogger(__name__)
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

    @property
    def whole(self) -> bool:
        """Whether the files still are what was aggregated; reads all of them."""
        digest = hashlib.sha256()
        for payload in self.payloads:
            digest.update(payload)
        return digest.digest() == self.sha256


@dataclass(frozen=True)
class OpenRound:
    """Where the run is.

    Attributes:
        number: the open round, or one above the last.
        upload_epoch: key epoch of the uploads that are to come.
        head: of the run.
    """

    number: int
    upload_epoch: int
    head: bytes


class Downloads:
    """Opens what was stored for a client when the round before was closed, and makes it anew if damaged."""

    def __init__(
        self,
        settings: ServerSettings,
        store: Store,
        blobs: Blobs,
        aggregator: Aggregator[Any],
        lock: AbstractContextManager[Any],
    ) -> None:
        """Prepare.

        Args:
            settings: of the run.
            store: of the run.
            blobs: payloads of uploads and aggregates.
            aggregator: server side of the back end.
            lock: held while files are opened; a round opens, and its files are removed, only under it.
        """
        self._settings = settings
        self._store = store
        self._blobs = blobs
        self._aggregator = aggregator
        self._lock = lock

    def open(self, client: str, where: Callable[[], OpenRound | None]) -> Download | None:
        """What a client may load before the open round.

        Args:
            client: recipient.
            where: the open round, asked under the lock; None while it is not one of interest.

        Returns:
            None where `where` says so.
        """
        try:
            with self._lock:
                now = where()
                download = None if now is None else self._open(client, now)
            if download is None or download.whole:
                return download
            log.error("the aggregate of %s for round %d is damaged", client, download.aggregate.round)
        except MissingBlobError as error:
            log.error("%s", error)
        with self._lock:
            now = where()
            if now is None:
                return None
            repair_aggregate(self._settings, self._store, self._blobs, self._aggregator, now.number, client)
            return self._open(client, now)

    def _open(self, client: str, now: OpenRound) -> Download:
        stored = self._store.aggregate(now.number, client)
        if stored is None:
            nothing = _nothing(self._settings, client, now.number)
            return Download(Aggregate(now.number, nothing, 0, now.upload_epoch, now.head), (), _NO_BYTES)
        sections, sizes = read_sections(stored)
        payloads = tuple(
            self._blobs.read("aggregates", now.number, f"{client}.{section.name}")
            if size
            else memoryview(b"")
            for section, size in zip(sections, sizes, strict=True)
        )
        aggregate = Aggregate(now.number, tuple(sections), stored.key_epoch, now.upload_epoch, now.head)
        return Download(aggregate, payloads, stored.sha256)


def _nothing(settings: ServerSettings, client: str, round_number: int) -> tuple[AggregateSection, ...]:
    if round_number == 1:
        return ()
    why = f"{client} had not enrolled when round {round_number - 1} was closed"
    return tuple(AggregateSection(name, None, b"", why) for name in settings.dimensions(client))
