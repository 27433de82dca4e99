"""Close a round: relevance, weights, aggregates on disk. CPU work, called outside every lock.

A damaged aggregate is made anew from the same uploads and weight rows.
"""

import hashlib
import logging
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from fedmosaic.privacy.encryption.aggregator import Aggregator
from fedmosaic.privacy.encryption.records import RoundContext
from fedmosaic.protos.errors import StateError
from fedmosaic.protos.messages import AggregateSection, SectionName
from fedmosaic.server.round.aggregates import LOST, NOWHERE, Offer, Place, stored_aggregate
from fedmosaic.server.round.relations import pack
from fedmosaic.server.round.relevance import Relevance, relevance
from fedmosaic.server.round.weights import Plan, groups, plan, section_label
from fedmosaic.server.settings import ServerSettings
from fedmosaic.server.storage.blobs import WHOLE, Blobs
from fedmosaic.server.storage.store import Store, StoredAggregate, StoredUpload
from fedmosaic.server.tracing import Traces

log = logging.getLogger(__name__)
_BATCH_BYTES = 1 << 28
Payloads = Mapping[str, Mapping[SectionName, bytes]]
"""Sections of uploads by client and name."""


@dataclass(frozen=True)
class ClosedRound:
    """What closing a round produced."""

    offer: Offer
    """For the next round; the payloads are in place already."""
    result: Mapping[str, object]
    """What the record of the round tells beside similarity and weights."""
    refusals: Sequence[str]
    """Lines for the log."""


@dataclass(frozen=True)
class _Planned:
    """Relevance and weight rows; as long as profiles and groups are the same, so are they."""

    basis: object
    """Clients, round of the newest profile of each, and the groups."""
    round: int
    """Whose file in `relations` has them."""
    profiles: Mapping[str, object]
    """Noise and number of releases of every profile, by client."""
    related: Relevance
    plans: Sequence[Plan]


class DamagedUploadsError(StateError):
    """Payloads on the server's disk are not what their `clients` sent and signed."""

    def __init__(self, round_number: int, clients: Collection[str]) -> None:
        super().__init__(
            f"round {round_number}: the stored upload of {', '.join(sorted(clients))} is damaged or missing "
            "and is left out: check the server's disk"
        )
        self.clients = frozenset(clients)


class Closer:
    """Closes the rounds of one run, one at a time."""

    def __init__(
        self,
        settings: ServerSettings,
        store: Store,
        blobs: Blobs,
        aggregator: Aggregator[Any],
        traces: Traces,
    ) -> None:
        self._settings = settings
        self._store = store
        self._blobs = blobs
        self._aggregator = aggregator
        self._traces = traces
        self._planned: _Planned | None = None

    def close(self, round_number: int, recipients: Collection[str] | None = None) -> ClosedRound:
        """Aggregate the stored uploads of a round for the recipients, by default all that have enrolled.

        Deterministic in what is stored: after a crash in the middle, doing it again gives the same bytes.

        Raises:
            DamagedUploadsError: payloads are not what was accepted; nothing was aggregated.
        """
        started = time.perf_counter()
        settings = self._settings
        uploads = {c: u for c, u in self._store.uploads(round_number).items() if c in settings.members}
        # Of a large federation only those who give or take now are looked at, by their last profiles.
        clients = sorted(settings.members if recipients is None else uploads.keys() | set(recipients))
        try:
            payloads = upload_payloads(self._blobs, uploads, round_number)
        except DamagedUploadsError:
            self._planned = None  # what is sent again may have another profile
            raise
        planned = self._plan(clients, uploads, round_number, recipients)
        epoch = next((upload.key_epoch for upload in uploads.values() if upload.sections), 0)
        offer = self._combine(planned.plans, payloads, round_number, epoch)
        unsure = [c for c, sure in zip(clients, planned.related.significant, strict=True) if not sure]
        refusals = {p.group.label: _told(p, round_number) for p in planned.plans}
        result = {
            "round": round_number,
            "key_epoch": epoch,
            "clients": clients,
            "uploaded": sorted(uploads),
            "received": sorted({recipient for p in planned.plans for recipient in p.rows}),
            "profiles": planned.profiles,
            "uniform_weights_for": unsure,
            "refusals": refusals,
            "smallest_coalition": {p.group.label: p.smallest_coalition for p in planned.plans},
            "relations": planned.round,
            "seconds_aggregating": round(time.perf_counter() - started, 6),
        }
        lines = [f"{name} trains alone: {why}" for told in refusals.values() for name, why in told.items()]
        if uploads and unsure:
            lines.append(f"profile missing or within its noise, uniform weights for: {', '.join(unsure)}")
        return ClosedRound(offer, result, lines)

    def _plan(
        self,
        clients: Sequence[str],
        uploads: Mapping[str, StoredUpload],
        round_number: int,
        recipients: Collection[str] | None,
    ) -> _Planned:
        """Relevance and rows; computed, and written, only where something that they follow from is new."""
        settings, adapter = self._settings, self._settings.terms.adapter
        found = []
        # A database that was put back to a moment before may have no enrolment of who gives something.
        known = self._store.enrolled() | uploads.keys()
        if not adapter.in_group_sums:  # else members share sums of groups, which are not formed here
            found = groups(
                {client: [s.name for s in upload.sections] for client, upload in uploads.items()},
                known & settings.members.keys() if recipients is None else recipients,
                {client: family for client in settings.members if (family := settings.family(client))},
                adapter.shared_dimensions,
                adapter.family_dimensions,
            )
        basis = (clients, self._store.newest_profiles(), found)
        if self._planned is None or self._planned.basis != basis:
            bits, asked = settings.terms.encryption.weight_bits, settings.terms.relevance
            present, apart = frozenset(clients), settings.roster.sharing_families()
            profiles = {c: p for c, p in self._store.profiles().items() if c in present}
            related = relevance([profiles.get(client) for client in clients], asked.similarity)
            families = [apart.get(client, "") for client in clients]
            terms = asked.temperature, settings.terms.policy, bits, families
            plans = [plan(group, clients, related, *terms) for group in found]
            rows = {p.group.label: p.rows for p in plans}
            content = pack(clients, related.similarity, rows, bits)
            self._blobs.write("relations", round_number, WHOLE, content)
            noise = {
                c: {"noise_variance": p.noise_variance, "releases": p.releases} for c, p in profiles.items()
            }
            self._planned = _Planned(basis, round_number, noise, related, plans)
        return self._planned

    def _combine(self, plans: Sequence[Plan], payloads: Payloads, round_number: int, epoch: int) -> Offer:
        """Form all sums, write them, and describe what every recipient gets."""
        parts: dict[str, list[tuple[AggregateSection, Place]]] = defaultdict(list)
        digests: dict[str, Any] = defaultdict(hashlib.sha256)

        def pieces() -> Iterator[memoryview]:
            end = 0
            for recipient, section, payload in self._sums(plans, payloads, round_number, epoch):
                parts[recipient].append((section, Place(WHOLE, end, len(payload))))
                end += len(payload)
                with self._traces.span("aggregate", round_number, recipient, section.name):
                    digests[recipient].update(payload)
                    yield payload

        self._blobs.write_pieces("aggregates", round_number + 1, WHOLE, pieces())
        stored = {n: stored_aggregate(epoch, parts[n], digests[n].digest()) for n in sorted(parts)}
        return Offer(round_number + 1, stored, {p.group.label: p.rows for p in plans}, parts)

    def _sums(
        self, plans: Sequence[Plan], payloads: Payloads, round_number: int, epoch: int
    ) -> Iterator[tuple[str, AggregateSection, memoryview]]:
        """Every recipient's sections with their payloads, group by group."""
        for p in plans:
            name, group = p.group.section, p.group
            context = RoundContext(
                self._settings.roster.federation, epoch, round_number, group.label, group.dimensions
            )
            records = {c: payloads[c][name] for c in group.contributors}
            recipients = sorted(p.rows)
            # As many recipients at once as have aggregates that fit in memory together.
            size = max((len(record) for record in records.values()), default=1)
            count = max(1, _BATCH_BYTES // (2 * size))
            for start in range(0, len(recipients), count):
                rows = {recipient: p.rows[recipient] for recipient in recipients[start : start + count]}
                with self._traces.span("sum", round_number, section=name):
                    made = self._aggregator.aggregate(records, rows, context)
                for (recipient, row), payload in zip(rows.items(), made, strict=True):
                    yield recipient, AggregateSection(name, row, b""), payload
            for recipient, why in _told(p, round_number).items():
                yield recipient, AggregateSection(name, None, b"", why), memoryview(b"")

    def repair(self, offer: Offer, recipient: str) -> StoredAggregate:
        """Make a recipient's aggregate of the open round anew, with the rows that it was made with; store it.

        Where the uploads are damaged too, the recipient is refused it, and trains one round alone.
        """
        settings, stored, closed = self._settings, offer.stored[recipient], offer.round - 1
        sections = [section for section, _ in offer.sections(settings, recipient)]
        uploads = self._store.uploads(closed)
        used = {name for section in sections if section.row for name in section.row.contributors}
        digest, parts = hashlib.sha256(), []
        try:
            payloads = upload_payloads(self._blobs, {name: uploads[name] for name in used}, closed)
            for section in sections:
                place = NOWHERE
                if section.row is not None:
                    label = section_label(section.name, settings.family(recipient))
                    size = settings.dimensions(recipient)[section.name]
                    context = RoundContext(settings.roster.federation, stored.key_epoch, closed, label, size)
                    records = {client: payloads[client][section.name] for client in section.row.contributors}
                    (payload,) = self._aggregator.aggregate(records, {recipient: section.row}, context)
                    place = Place(f"{recipient}.{section.name}", 0, len(payload))
                    self._blobs.write("aggregates", offer.round, place.blob, payload)
                    # Of a sum of real numbers the last digits depend on how many rows were summed at once.
                    digest.update(payload)
                parts.append((section, place))
        except (DamagedUploadsError, KeyError) as error:
            log.error("the aggregate of %s cannot be made anew: %s", recipient, error)
            parts = [(AggregateSection(s.name, None, b"", s.refusal or LOST), NOWHERE) for s in sections]
            digest = hashlib.sha256()
        made = stored_aggregate(stored.key_epoch, parts, digest.digest())
        self._store.replace_aggregate(offer.round, recipient, made)
        return made


def upload_payloads(blobs: Blobs, uploads: Mapping[str, StoredUpload], round_number: int) -> Payloads:
    """Sections of stored uploads; DamagedUploadsError where some are not what was accepted any more."""
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


def _told(p: Plan, round_number: int) -> dict[str, str]:
    """Why a recipient gets no aggregate, by recipient."""
    return {name: f"round {round_number}, {p.group.label}: {why}" for name, why in p.refusals.items()}
