"""What the open round hands out: aggregates as the database describes them, and their weight rows."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmosaic.protos.errors import StateError, WireError
from fedmosaic.protos.messages import AggregateSection, WeightRow
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


@dataclass(frozen=True)
class Offer:
    """What clients may load before the open round, by recipient, and the rows that it was made with.

    Replaced whole when the next one opens.
    """

    round: int
    stored: Mapping[str, StoredAggregate]
    rows: Rows

    def sections(self, settings: ServerSettings, client: str) -> list[tuple[AggregateSection, Place]]:
        """Sections of a client's aggregate, without their payloads, and where these stand.

        Raises:
            StateError: its description is damaged.
        """
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
            return AggregateSection(name, None, b"", record["refusal"] or LOST), Place("", 0, 0)
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
    key_epoch: int,
    sections: Sequence[AggregateSection],
    sizes: Sequence[int],
    sha256: bytes,
    starts: Sequence[int] | None = None,
) -> StoredAggregate:
    """What the database keeps of an aggregate.

    Args:
        key_epoch: of the uploads inside.
        sections: without their payloads.
        sizes: bytes of the payload of every section, 0 where it is refused.
        sha256: of all payloads, laid end to end.
        starts: where each payload begins in the round's blob; by default each has a blob of its own, and the
            rows are kept here.
    """
    records = []
    for index, (section, size) in enumerate(zip(sections, sizes, strict=True)):
        record: dict[str, Any] = {"name": section.name, "size": size, "refusal": section.refusal}
        if section.countersignature:
            record["witness"] = [section.uploads_sha256.hex(), section.countersignature.hex()]
        alone = None if section.row is None else vars(section.row)
        records.append({**record, "row": alone} if starts is None else {**record, "start": starts[index]})
    return StoredAggregate(key_epoch, json.dumps(records), sha256)
