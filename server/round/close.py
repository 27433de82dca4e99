"""Close a round: relevance, weights, aggregates on disk. CPU work, called outside every lock."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from fedmosaic.privacy.encryption.aggregator import Aggregator
from fedmosaic.privacy.encryption.records import RoundContext
from fedmosaic.privacy.policy import WeightRow
from fedmosaic.protos.errors import StateError, WireError
from fedmosaic.protos.messages import AggregateSection, SectionName, SectionWeights
from fedmosaic.server.round.relevance import FloatArray, Relevance, relevance
from fedmosaic.server.round.weights import Group, Plan, groups, plan, section_label
from fedmosaic.server.settings import ServerSettings
from fedmosaic.server.storage.blobs import Blobs
from fedmosaic.server.storage.store import Store, StoredAggregate, StoredUpload

log = logging.getLogger(__name__)
_BATCH_BYTES = 1 << 28
Payloads = Mapping[str, Mapping[SectionName, bytes]]
"""Sections of uploads by client and name."""


@dataclass(frozen=True)
class ClosedRound:
    """What closing a round produced.

    Attributes:
        aggregates: by recipient; the payloads are in place already.
        result: what the summary tells of the round.
        refusals: lines for the log.
    """

    aggregates: Mapping[str, StoredAggregate]
    result: Mapping[str, object]
    refusals: Sequence[str]


class DamagedUploadsError(StateError):
    """Payloads on the server's disk are not what their clients sent and signed.

    Attributes:
        clients: whose they are.
    """

    def __init__(self, round_number: int, clients: Collection[str]) -> None:
        super().__init__(
            f"round {round_number}: the stored upload of {', '.join(sorted(clients))} is damaged or missing "
            "and is left out: check the server's disk"
        )
        self.clients = frozenset(clients)


def close_round(
    settings: ServerSettings, store: Store, blobs: Blobs, aggregator: Aggregator[Any], round_number: int
) -> ClosedRound:
    """Aggregate the stored uploads of a round for every member that has enrolled.

    Deterministic in what is stored: after a crash in the middle, doing it again gives the same bytes.

    Args:
        settings: of the run.
        store: uploads and profiles.
        blobs: payloads of the uploads; receives those of the aggregates.
        aggregator: server side of the back end.
        round_number: the round to close.

    Raises:
        DamagedUploadsError: payloads are not what was accepted; nothing was aggregated.
    """
    started = time.perf_counter()
    clients = sorted(settings.members)
    uploads = {c: u for c, u in store.uploads(round_number).items() if c in settings.members}
    payloads = _payloads(blobs, uploads, round_number)
    profiles = store.profiles()
    related = relevance([profiles.get(client) for client in clients], settings.similarity)
    plans = [
        plan(
            group,
            clients,
            related,
            round_number=round_number,
            temperature=settings.temperature,
            policy=settings.policy,
            bits=settings.encryption.weight_bits,
        )
        for group in _groups(settings, store, uploads)
    ]
    epoch = next((upload.key_epoch for upload in uploads.values() if upload.sections), 0)
    aggregates = _combine(settings, blobs, aggregator, plans, payloads, round_number, epoch)
    unsure = [c for c, significant in zip(clients, related.significant, strict=True) if not significant]
    result = {
        "round": round_number,
        "key_epoch": epoch,
        "clients": clients,
        "uploaded": sorted(uploads),
        "profiles": {
            c: {"noise_variance": p.noise_variance, "releases": p.releases} for c, p in profiles.items()
        },
        "uniform_weights_for": unsure,
        **_told(related, plans),
        "seconds_aggregating": round(time.perf_counter() - started, 6),
    }
    lines = [f"{recipient} trains alone: {why}" for p in plans for recipient, why in p.refusals.items()]
    if uploads and unsure:
        lines.append(f"profile missing or within its noise, uniform weights for: {', '.join(unsure)}")
    return ClosedRound(aggregates, result, lines)


def _told(related: Relevance, plans: Sequence[Plan]) -> dict[str, object]:
    """What the summary tells of relevance and weights."""
    return {
        "similarity": _matrix(related.similarity),
        "standard_error": _matrix(related.standard_error),
        "weights": {p.group.label: {r: _shares(row) for r, row in p.rows.items()} for p in plans},
        "refusals": {p.group.label: dict(p.refusals) for p in plans},
        "smallest_coalition": {p.group.label: p.smallest_coalition for p in plans},
    }


def _groups(settings: ServerSettings, store: Store, uploads: Mapping[str, StoredUpload]) -> list[Group]:
    return groups(
        {client: [s.name for s in upload.sections] for client, upload in uploads.items()},
        store.enrolled() & settings.members.keys(),
        {client: family for client in settings.members if (family := settings.family(client))},
        settings.shared_dimensions,
        settings.family_dimensions,
    )


def _combine(
    settings: ServerSettings,
    blobs: Blobs,
    aggregator: Aggregator[Any],
    plans: Sequence[Plan],
    payloads: Payloads,
    round_number: int,
    epoch: int,
) -> dict[str, StoredAggregate]:
    """Form all sums, write them, and describe what every recipient gets."""
    sizes: dict[tuple[str, SectionName], int] = {}
    for p in plans:
        context = RoundContext(settings.federation, epoch, round_number, p.group.label, p.group.dimensions)
        records = {c: payloads[c][p.group.section] for c in p.group.contributors}
        for batch in _batches(p, records):
            for row, payload in zip(batch, aggregator.aggregate(records, batch, context), strict=True):
                blobs.write("aggregates", round_number + 1, f"{row.recipient}.{p.group.section}", payload)
                sizes[row.recipient, p.group.section] = len(payload)
    stored: dict[str, StoredAggregate] = {}
    for recipient in sorted({name for p in plans for name in (*p.rows, *p.refusals)}):
        digest = hashlib.sha256()
        sections = []
        for p in plans:
            if recipient not in p.rows and recipient not in p.refusals:
                continue
            if recipient in p.rows:
                digest.update(blobs.read("aggregates", round_number + 1, f"{recipient}.{p.group.section}"))
            sections.append(
                {
                    "name": p.group.section,
                    "size": sizes.get((recipient, p.group.section), 0),
                    "row": _row_record(p.rows.get(recipient)),
                    "refusal": p.refusals.get(recipient, ""),
                }
            )
        stored[recipient] = StoredAggregate(epoch, json.dumps(sections), digest.digest())
    return stored


def _payloads(blobs: Blobs, uploads: Mapping[str, StoredUpload], round_number: int) -> Payloads:
    """Sections of stored uploads, after a look whether they still are what was accepted."""
    payloads: dict[str, dict[SectionName, bytes]] = {}
    for client, upload in uploads.items():
        if not upload.sections:
            continue
        try:
            view = blobs.read("uploads", round_number, client)
        except (OSError, StateError) as error:
            log.error("%s", error)
            continue
        pieces, start = {}, 0
        for section in upload.sections:
            # Back ends read through the buffer protocol only; a view of a mapped file is not copied.
            pieces[section.name] = cast(bytes, view[start : start + section.size])
            start += section.size
        digests = [hashlib.sha256(piece).digest() for piece in pieces.values()]
        if start == len(view) and digests == [section.sha256 for section in upload.sections]:
            payloads[client] = pieces
    damaged = {client for client, upload in uploads.items() if upload.sections} - payloads.keys()
    if damaged:
        raise DamagedUploadsError(round_number, damaged)
    return payloads


def repair_aggregate(
    settings: ServerSettings,
    store: Store,
    blobs: Blobs,
    aggregator: Aggregator[Any],
    round_number: int,
    recipient: str,
) -> None:
    """Make a damaged aggregate anew, from the uploads of the round before and the weight rows that were used.

    Where the uploads are damaged too, the recipient is refused it, and trains one round alone.

    Args:
        settings: of the run.
        store: rows and digests.
        blobs: payloads.
        aggregator: server side of the back end.
        round_number: the open round, which the aggregate is for.
        recipient: whose it is.
    """
    stored = store.aggregate(round_number, recipient)
    if stored is None:
        return
    sections, _ = read_sections(stored)
    try:
        made = _remake(settings, store, blobs, aggregator, stored, round_number, recipient)
    except (DamagedUploadsError, KeyError) as error:
        log.error("the aggregate of %s cannot be made anew: %s", recipient, error)
        why = "the server's copy was damaged and could not be made anew"
        refused = [{"name": s.name, "size": 0, "row": None, "refusal": s.refusal or why} for s in sections]
        store.replace_aggregate(round_number, recipient, json.dumps(refused), hashlib.sha256().digest())
        return
    for name, payload in made.items():
        blobs.write("aggregates", round_number, f"{recipient}.{name}", payload)
    # Of a sum of real numbers the last digits depend on how many rows were summed at once.
    digest = hashlib.sha256(b"".join(made.values())).digest()
    store.replace_aggregate(round_number, recipient, stored.sections, digest)


def _remake(
    settings: ServerSettings,
    store: Store,
    blobs: Blobs,
    aggregator: Aggregator[Any],
    stored: StoredAggregate,
    round_number: int,
    recipient: str,
) -> dict[SectionName, bytes]:
    closed, uploads = round_number - 1, store.uploads(round_number - 1)
    rows = {section.name: section.row for section in read_sections(stored)[0] if section.row is not None}
    used = {name for row in rows.values() for name in row.contributors}
    payloads = _payloads(blobs, {name: uploads[name] for name in used}, closed)
    made: dict[SectionName, bytes] = {}
    for name, weights in rows.items():
        label, size = section_label(name, settings.family(recipient)), settings.dimensions(recipient)[name]
        context = RoundContext(settings.federation, stored.key_epoch, closed, label, size)
        row = WeightRow(closed, recipient, weights.contributors, weights.weights, weights.bits)
        records = {client: payloads[client][name] for client in weights.contributors}
        (payload,) = aggregator.aggregate(records, [row], context)
        made[name] = bytes(payload)
    return made


def _batches(p: Plan, records: Mapping[str, bytes]) -> Iterator[list[WeightRow]]:
    """Rows in groups whose aggregates fit in memory together."""
    rows = [p.rows[recipient] for recipient in sorted(p.rows)]
    size = max((len(record) for record in records.values()), default=1)
    count = max(1, _BATCH_BYTES // (2 * size))
    for start in range(0, len(rows), count):
        yield rows[start : start + count]


def _row_record(row: WeightRow | None) -> dict[str, object] | None:
    if row is None:
        return None
    return {"contributors": row.contributors, "weights": row.weights, "bits": row.bits}


def read_sections(stored: StoredAggregate) -> tuple[list[AggregateSection], list[int]]:
    """Sections of a stored aggregate without their payloads, and the sizes of these.

    Args:
        stored: as `close_round` made it.

    Raises:
        StateError: it is damaged.
    """
    sections, sizes = [], []
    try:
        for record in json.loads(stored.sections):
            row = record["row"]
            weights = (
                None
                if row is None
                else SectionWeights(tuple(row["contributors"]), tuple(row["weights"]), row["bits"])
            )
            sections.append(AggregateSection(record["name"], weights, b"", record["refusal"]))
            sizes.append(int(record["size"]))
    except (ValueError, KeyError, TypeError, WireError) as error:
        raise StateError(
            f"the server's database is damaged: a stored aggregate cannot be read ({error}); restore a "
            "backup of state_dir and database together"
        ) from None
    return sections, sizes


def _shares(row: WeightRow) -> dict[str, float]:
    return {c: w / (1 << row.bits) for c, w in zip(row.contributors, row.weights, strict=True)}


def _matrix(values: FloatArray) -> list[list[float | None]]:
    return [[round(v, 6) if math.isfinite(v) else None for v in row] for row in values.tolist()]
