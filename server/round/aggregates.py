"""Aggregates of a closed round as the database holds them: sections without their payloads, in JSON."""

import json
from collections.abc import Iterator, Mapping, Sequence

from fedmosaic.protos.errors import StateError, WireError
from fedmosaic.protos.messages import AggregateSection, SectionName, WeightRow
from fedmosaic.server.storage.store import StoredAggregate


def stored_aggregate(
    key_epoch: int, sections: Sequence[AggregateSection], sizes: Sequence[int], sha256: bytes
) -> StoredAggregate:
    """What the database keeps of an aggregate.

    Args:
        key_epoch: of the uploads inside.
        sections: without their payloads.
        sizes: bytes of the payload of every section, 0 where it is refused.
        sha256: of all payloads, laid end to end.
    """
    records = [
        {
            "name": section.name,
            "size": size,
            "row": None if section.row is None else vars(section.row),
            "refusal": section.refusal,
            "witness": [section.uploads_sha256.hex(), section.countersignature.hex()],
        }
        for section, size in zip(sections, sizes, strict=True)
    ]
    return StoredAggregate(key_epoch, json.dumps(records), sha256)


def read_sections(stored: StoredAggregate) -> tuple[list[AggregateSection], list[int]]:
    """Sections of a stored aggregate without their payloads, and the sizes of these.

    Raises:
        StateError: it is damaged.
    """
    sections, sizes = [], []
    try:
        for record in json.loads(stored.sections):
            row = record["row"]
            if row is not None:
                row = WeightRow(tuple(row["contributors"]), tuple(row["weights"]), row["bits"])
            # A version before knew no witness.
            witness = [bytes.fromhex(text) for text in record.get("witness", ())]
            sections.append(AggregateSection(record["name"], row, b"", record["refusal"], *witness))
            sizes.append(int(record["size"]))
    except (ValueError, KeyError, TypeError, WireError) as error:
        raise StateError(
            f"the server's database is damaged: a stored aggregate cannot be read ({error}); restore a "
            "backup of state_dir and database together"
        ) from None
    return sections, sizes


def withheld(aggregates: Mapping[str, StoredAggregate]) -> Iterator[tuple[str, SectionName]]:
    """Recipients and sections of which there is no aggregate."""
    for recipient, stored in aggregates.items():
        for section in read_sections(stored)[0]:
            if section.row is None:
                yield recipient, section.name
