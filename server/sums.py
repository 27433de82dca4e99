"""The sums of a run: groups from the profiles after round 1, one secure sum per group and later round."""

import json
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Final

from fedmosaic.privacy.federation.terms import GroupSumTerms
from fedmosaic.privacy.secureaggregation.partition import Partition, RoundTotals, chain_of, sum_context
from fedmosaic.protos.refusal import Refusal, RefusalKind
from fedmosaic.server.round.groups import divide
from fedmosaic.server.round.relevance import relevance
from fedmosaic.server.round.sums import AGREE, OPEN, SHARE, STEPS, UNMASK, VECTOR, RoundSums, liars
from fedmosaic.server.settings import ServerSettings
from fedmosaic.server.storage.blobs import Blobs, MissingBlobError
from fedmosaic.server.storage.store import Store

log = logging.getLogger(__name__)

PARTITION: Final = "sum-partition"
TOTALS: Final = "sum-totals"
PARTITION_FORMED: Final = "partition"
"""Key of the run's metadata."""
_FAULTS: Final = "sum-faults"
# Of a round's deadline; before the vector is sent, members take the gradients that are in it.
_SHARE_OF_ROUND: Final = {OPEN: 0.2, SHARE: 0.1, VECTOR: 0.5, AGREE: 0.1, UNMASK: 0.1}


class RunSums:
    """What members of one run add up; not safe for threads, the coordinator holds its lock."""

    def __init__(
        self, settings: ServerSettings, store: Store, blobs: Blobs, run_id: str, round_number: int
    ) -> None:
        """Begin, or go on with what is stored; then the open round, cut short by a restart, forms no sum."""
        self._settings = settings
        self._store = store
        self._blobs = blobs
        self._run_id = run_id
        stored = store.get(PARTITION_FORMED)
        self._partition = None if stored is None else Partition.decoded(stored.encode())
        self._totals = [self._read(number) for number in range(2, round_number)] if self._partition else []
        self._current: RoundSums | None = None
        self._cut_short = round_number if self._partition else 0

    def open_round(self, number: int, now: float) -> None:
        """Let members open the sums of a round."""
        last = self._settings.terms.schedule.rounds
        if self._partition is None or number > last or number == self._cut_short:
            self._current = None
            return
        settings, terms = self._settings, self._terms
        drawn = self._partition.drawn(settings.roster, self._run_id, number)
        about = settings.roster.federation, self._run_id, number, settings.roster_hash
        context = sum_context(*about, drawn, chain_of(self._totals))
        size, keys = settings.terms.adapter.shared_dimensions, settings.roster.identity_keys()
        sums = drawn.terms(context, keys, terms, size)
        deadline = settings.terms.schedule.round_deadline_seconds
        seconds = {step: share * deadline for step, share in _SHARE_OF_ROUND.items()}
        self._current = RoundSums(number, sums, seconds, now, self._left_out())

    def close_round(self, number: int) -> None:
        """Store what a round brought: the groups after the first, totals after every other one.

        Needs no lock: what others read meanwhile is replaced whole, and nothing is posted to a closed round.
        """
        if number == 1:
            self._divide()
            return
        if self._partition is None:
            return
        if self._current is not None:
            self._keep_faults(self._current)
        totals = self._read(number) if self._current is None else self._current.totals()
        for name, content in totals.messages().items():
            self._blobs.write("sums", number, name, content)
        self._totals = [total for total in self._totals if total.round != number] + [totals]

    def post(self, member: str, round_number: int, step: str, payload: bytes) -> None:
        """See `RoundSums.post`; Refusal where the round has no sums."""
        self._round(round_number).post(member, step, payload)

    def read(self, member: str, round_number: int, step: str) -> dict[str, bytes]:
        """The partition, a closed round's totals, or what a step of the open one brought; empty if not yet.

        Refusal where the round has no sums.
        """
        if step == PARTITION:
            return {} if self._partition is None else {"server": self._partition.encoded()}
        if step == TOTALS:
            found = [total for total in self._totals if total.round == round_number]
            return found[0].messages() if found else {}
        return self._round(round_number).read(member, step)

    def taking_part(self, number: int) -> frozenset[str]:
        """Members that take part in a round: all in the first, then those who add up in it."""
        if self._partition is None or number == 1:
            return frozenset(self._settings.members)
        drawn = self._partition.drawn(self._settings.roster, self._run_id, number)
        return frozenset(name for group in drawn.groups for name in group)

    def receivers(self, number: int) -> list[str]:
        """Members who take a step with what a closed round brought."""
        totals = next((total for total in self._totals if total.round == number), None)
        if self._partition is None or totals is None:
            return []
        formed = [index for index, vector in enumerate(totals.vectors) if vector]
        return sorted(name for name, row in self._partition.mixing.items() if any(row[r] for r in formed))

    def advance(self, expected: Collection[str], now: float) -> bool:
        """See `RoundSums.advance`."""
        return self._current is not None and self._current.advance(expected, now)

    def _keep_faults(self, closed: RoundSums) -> None:
        """Remember what members have done to sums, over restarts; who has lied is told in the log once."""
        faults, disputes = self._store.get_json(_FAULTS) or ({}, [])
        before = self._left_out()
        found = sorted({*map(tuple, disputes), *closed.disputes})
        self._store.put({_FAULTS: json.dumps([{**faults, **closed.faults}, found])})
        for member, fault in self._left_out().items():
            if member not in before:
                log.warning("%s is left out of the sums from now on: %s", member, fault)

    def _left_out(self) -> Mapping[str, str]:
        """Member → why it takes part in no sum any more."""
        faults, disputes = self._store.get_json(_FAULTS) or ({}, [])
        return {**liars([(a, b) for a, b in disputes], self._terms.colluders), **faults}

    def due(self) -> list[Callable[[], None]]:
        """See `RoundSums.due`; what it gives is called without the coordinator's lock."""
        return [] if self._current is None else self._current.due()

    @property
    def _terms(self) -> GroupSumTerms:
        return self._settings.terms.group_sums

    def _divide(self) -> None:
        clients = sorted(self._settings.members)
        profiles = self._store.profiles()
        asked, apart = self._settings.terms.relevance, self._settings.roster.sharing_families()
        related = relevance([profiles.get(client) for client in clients], asked.similarity)
        families = {client: apart[client] for client in clients}
        limits = self._terms.groups, self._settings.terms.least_group(len(clients))
        made = divide(families, related, *limits, asked.temperature)
        self._store.put({PARTITION_FORMED: made.encoded().decode()})
        self._partition = made
        log.info("groups: %s", "; ".join(", ".join(group) for group in made.groups))

    def _round(self, number: int) -> RoundSums:
        if self._current is None or number != self._current.round:
            why = f"round {number} has no open sums: it is over, or the server was started again in it"
            raise Refusal(RefusalKind.PRECONDITION, "NO_SUM", why, "go on with the next round")
        return self._current

    def _read(self, number: int) -> RoundTotals:
        """What is stored of a round; no sums where nothing is."""
        if self._partition is None:
            raise AssertionError("totals without groups")
        count = len(self._partition.groups)
        try:
            found = {
                name: bytes(self._blobs.read("sums", number, name))
                for name in (f"group-{index}" for index in range(count))
            }
        except MissingBlobError:
            # Before the round is closed: it was cut short by a restart, or nobody has come yet.
            return RoundTotals(number, ((),) * count, (b"",) * count)
        return RoundTotals.from_messages(number, found, count)


def is_sum_step(step: str) -> bool:
    """Whether a message of the relay belongs to a sum."""
    return step in (*STEPS, PARTITION, TOTALS)
