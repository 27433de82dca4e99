"""Close a round: relevance, weights, aggregates on disk. CPU work, called outside every lock."""

import hashlib
import logging
import math
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from fedmosaic.privacy.encryption.aggregator import Aggregator
from fedmosaic.privacy.encryption.records import RoundContext
from fedmosaic.protos.errors import StateError
from fedmosaic.protos.messages import AggregateSection, Profile, SectionName, WeightRow
from fedmosaic.server.round.aggregates import stored_aggregate
from fedmosaic.server.round.relevance import FloatArray, Relevance, relevance
from fedmosaic.server.round.weights import Group, Plan, groups, plan
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
    settings: ServerSettings,
    store: Store,
    blobs: Blobs,
    aggregator: Aggregator[Any],
    round_number: int,
    recipients: Collection[str] | None = None,
) -> ClosedRound:
    """Aggregate the stored uploads of a round for those who take part in the next one.

    Deterministic in what is stored: after a crash in the middle, doing it again gives the same bytes.

    Args:
        settings: of the run.
        store: uploads and profiles.
        blobs: payloads of the uploads; receives those of the aggregates.
        aggregator: server side of the back end.
        round_number: the round to close.
        recipients: who is to receive; by default every member that has enrolled.

    Raises:
        DamagedUploadsError: payloads are not what was accepted; nothing was aggregated.
    """
    started = time.perf_counter()
    uploads = {c: u for c, u in store.uploads(round_number).items() if c in settings.members}
    # Of a large federation only those who give or take in this round are looked at, by their last profiles.
    clients = sorted(settings.members if recipients is None else uploads.keys() | set(recipients))
    payloads = upload_payloads(blobs, uploads, round_number)
    profiles = {c: p for c, p in store.profiles().items() if recipients is None or c in clients}
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
        for group in ([] if settings.group_sums else _groups(settings, store, uploads, recipients))
    ]
    epoch = next((upload.key_epoch for upload in uploads.values() if upload.sections), 0)
    aggregates = _combine(settings, blobs, aggregator, plans, payloads, round_number, epoch)
    unsure = [c for c, significant in zip(clients, related.significant, strict=True) if not significant]
    result = {
        "round": round_number,
        "key_epoch": epoch,
        "clients": clients,
        "uploaded": sorted(uploads),
        **_told(profiles, related, unsure, plans),
        "seconds_aggregating": round(time.perf_counter() - started, 6),
    }
    lines = [f"{recipient} trains alone: {why}" for p in plans for recipient, why in p.refusals.items()]
    if uploads and unsure:
        lines.append(f"profile missing or within its noise, uniform weights for: {', '.join(unsure)}")
    return ClosedRound(aggregates, result, lines)


def upload_payloads(blobs: Blobs, uploads: Mapping[str, StoredUpload], round_number: int) -> Payloads:
    """Sections of stored uploads, after a look whether they still are what was accepted.

    Raises:
        DamagedUploadsError: some are not.
    """
    payloads: dict[str, dict[SectionName, bytes]] = {}
    damaged = set()
    for client, upload in uploads.items():
        if not upload.sections:
            continue
        try:
            view = blobs.read("uploads", round_number, client)
        except (OSError, StateError) as error:
            log.error("%s", error)
            damaged.add(client)
            continue
        pieces, start = {}, 0
        for section in upload.sections:
            # Back ends read through the buffer protocol only; a view of a mapped file is not copied.
            pieces[section.name] = cast(bytes, view[start : start + section.size])
            start += section.size
        digests = [hashlib.sha256(piece).digest() for piece in pieces.values()]
        if start != len(view) or digests != [section.sha256 for section in upload.sections]:
            damaged.add(client)
        payloads[client] = pieces
    if damaged:
        raise DamagedUploadsError(round_number, damaged)
    return payloads


def _groups(
    settings: ServerSettings,
    store: Store,
    uploads: Mapping[str, StoredUpload],
    recipients: Collection[str] | None,
) -> list[Group]:
    return groups(
        {client: [s.name for s in upload.sections] for client, upload in uploads.items()},
        store.enrolled() & settings.members.keys() if recipients is None else recipients,
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
    sections: dict[str, list[AggregateSection]] = defaultdict(list)
    sizes: dict[str, list[int]] = defaultdict(list)
    digests: dict[str, Any] = defaultdict(hashlib.sha256)
    for p in plans:
        name = p.group.section
        context = RoundContext(settings.federation, epoch, round_number, p.group.label, p.group.dimensions)
        records = {c: payloads[c][name] for c in p.group.contributors}
        for rows in _batches(p, records):
            made = aggregator.aggregate(records, rows, context)
            for (recipient, row), payload in zip(rows.items(), made, strict=True):
                blobs.write("aggregates", round_number + 1, f"{recipient}.{name}", payload)
                digests[recipient].update(payload)
                sections[recipient].append(AggregateSection(name, row, b""))
                sizes[recipient].append(len(payload))
        for recipient, why in p.refusals.items():
            sections[recipient].append(AggregateSection(name, None, b"", why))
            sizes[recipient].append(0)
    return {
        recipient: stored_aggregate(epoch, sections[recipient], sizes[recipient], digests[recipient].digest())
        for recipient in sorted(sections)
    }


def _batches(p: Plan, records: Mapping[str, bytes]) -> Iterator[dict[str, WeightRow]]:
    """Rows in groups whose aggregates fit in memory together."""
    recipients = sorted(p.rows)
    size = max((len(record) for record in records.values()), default=1)
    count = max(1, _BATCH_BYTES // (2 * size))
    for start in range(0, len(recipients), count):
        yield {recipient: p.rows[recipient] for recipient in recipients[start : start + count]}


def _told(
    profiles: Mapping[str, Profile], related: Relevance, unsure: Sequence[str], plans: Sequence[Plan]
) -> dict[str, object]:
    """What the summary tells of profiles, relevance and weights."""
    return {
        "profiles": {
            c: {"noise_variance": p.noise_variance, "releases": p.releases} for c, p in profiles.items()
        },
        "uniform_weights_for": unsure,
        "similarity": _matrix(related.similarity),
        "standard_error": _matrix(related.standard_error),
        "weights": {p.group.label: {r: _shares(row) for r, row in p.rows.items()} for p in plans},
        "refusals": {p.group.label: dict(p.refusals) for p in plans},
        "smallest_coalition": {p.group.label: p.smallest_coalition for p in plans},
    }


def _shares(row: WeightRow) -> dict[str, float]:
    return {c: w / (1 << row.bits) for c, w in zip(row.contributors, row.weights, strict=True)}


def _matrix(values: FloatArray) -> list[list[float | None]]:
    return [[round(v, 6) if math.isfinite(v) else None for v in row] for row in values.tolist()]
