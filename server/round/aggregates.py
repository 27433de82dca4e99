"""What the open round hands out: aggregates as the database describes them, and their weight rows."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fedmosaic.protos.errors import StateError, WireError
from fedmosaic.protos.messages import Aggregate, AggregateSection, WeightRow
from fedmosaic.server.round.relations import Rows, unpack
from fedmosaic.server.round.weights import section_label
from fedmosaic.server.settings import ServerSettings
from fedmosaic.server.storage.blobs import WHOLE, Blobs
from fedmosaic.server.storage.store import Store, StoredAggregate

log = logging.getLogger(__name__)
LOST = "the server's copy was damaged and could not be made anew"


@dataclass(frozen=True)
class Place:
    """Where the payload of a section stands: `size` bytes from `start` of a blob."""

    blob: str
    start: int
    size: int


NOWHERE = Place("", 0, 0)
"""Of a section that is refused."""


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


@dataclass(frozen=True)
class Offer:
    """What clients may load before the open round, by recipient, and the rows that it was made with.

    Replaced whole when the next one opens. `made` has the sections, as `sections` tells them, that are at
    hand because this process has just made them.
    """

    round: int
    stored: Mapping[str, StoredAggregate]
    rows: Rows
    made: Mapping[str, list[tuple[AggregateSection, Place]]] = field(default_factory=dict)

    def download(
        self, settings: ServerSettings, blobs: Blobs, client: str, epoch: int, head: bytes
    ) -> Download:
        """What was made for a client when the round before was closed; `epoch` is of the uploads to come.

        Raises:
            MissingBlobError: a file is missing.
            StateError: what the database says of the aggregate is damaged.
        """
        number, stored = self.round, self.stored.get(client)
        if stored is None:
            why = f"{client} had not enrolled when round {number - 1} was closed, or others were drawn"
            names = settings.dimensions(client) if number > 1 else ()
            nothing = tuple(AggregateSection(name, None, b"", why) for name in names)
            empty = tuple(memoryview(b"") for _ in names)
            return Download(Aggregate(number, nothing, 0, epoch, head), empty, hashlib.sha256().digest())
        found = self.sections(settings, client)
        payloads = tuple(
            blobs.read("aggregates", number, at.blob, at.start, at.size) if at.size else memoryview(b"")
            for _, at in found
        )
        aggregate = Aggregate(number, tuple(s for s, _ in found), stored.key_epoch, epoch, head)
        return Download(aggregate, payloads, stored.sha256)

    def sections(self, settings: ServerSettings, client: str) -> list[tuple[AggregateSection, Place]]:
        """Sections of a client's aggregate, without payloads, and where these are; StateError if damaged."""
        if client in self.made:
            return self.made[client]
        try:
            return [
                self._section(record, client, section_label(record["name"], settings.family(client)))
                for record in json.loads(self.stored[client].sections)
            ]
        except (ValueError, KeyError, TypeError, WireError) as error:
            raise StateError(
                f"the server's database is damaged: a stored aggregate cannot be read ({error}); restore a "
                "backup of state_dir and database together"
            ) from None

    def _section(self, record: Mapping[str, Any], client: str, label: str) -> tuple[AggregateSection, Place]:
        name, kept, start = record["name"], record.get("row"), record.get("start")
        row = self.rows.get(label, {}).get(client)
        if kept is not None:  # made anew, or by an older program
            row = WeightRow(tuple(kept["contributors"]), tuple(kept["weights"]), kept["bits"])
        if record["refusal"] or row is None:
            return AggregateSection(name, None, b"", record["refusal"] or LOST), NOWHERE
        blob = f"{client}.{name}" if start is None else WHOLE
        signed = (bytes.fromhex(text) for text in record.get("witness", ()))
        place = Place(blob, int(start or 0), int(record["size"]))
        return AggregateSection(name, row, b"", "", *signed), place


def stored_offer(store: Store, blobs: Blobs, round_number: int) -> Offer:
    """What a restarted server hands out in the round that is open."""
    results = store.results(after=round_number - 2)
    kept = results[-1].get("relations") if results else None
    rows: Rows = {}
    if isinstance(kept, int):
        try:
            path = blobs.path("relations", kept, WHOLE)
            _, _, rows = unpack(blobs.read("relations", kept, WHOLE), path)
        except (StateError, OSError) as error:
            log.error("%s. Whoever has not loaded its aggregate trains round %d alone", error, round_number)
    return Offer(round_number, store.aggregates(round_number), rows)


def stored_aggregate(
    key_epoch: int, parts: Iterable[tuple[AggregateSection, Place]], sha256: bytes
) -> StoredAggregate:
    """What the database keeps of an aggregate, as `Offer.sections` gives it back; the hash is of payloads.

    Rows of what stands in the round's one blob are in the file of `relations`, those of all else here.
    """
    records = []
    for section, place in parts:
        record: dict[str, Any] = {"name": section.name, "size": place.size, "refusal": section.refusal}
        if section.countersignature:
            record["witness"] = [section.uploads_sha256.hex(), section.countersignature.hex()]
        if place.blob == WHOLE:
            record["start"] = place.start
        else:
            record["row"] = None if section.row is None else asdict(section.row)
        records.append(record)
    return StoredAggregate(key_epoch, json.dumps(records), sha256)
