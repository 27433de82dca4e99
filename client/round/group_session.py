"""A client's life where members share noisy sums of their groups, and no adapter.

    pull      wait for the round; the groups and the sums of the rounds before
    receive   check the groups, take the public steps that the sums stand for
    share     clipped gradients of one Poisson sample and a share of the noise, charged before it is drawn
    sum       into the group's secure sum
    push      the task profile, and that this client has done its part
    train     the personal branch on top, after the last round

The first round has no sum: its profiles decide who adds up with whom.
"""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Final, Protocol

import numpy as np

from fedmosaic.client.planning import group_grid
from fedmosaic.client.round.group_steps import FloatArray, GroupSum, mixed_gradient, shared_branch
from fedmosaic.client.round.membership import Learner
from fedmosaic.client.round.releases import Releases
from fedmosaic.client.round.session import Session
from fedmosaic.privacy.files import write_atomically
from fedmosaic.privacy.secureaggregation.masks import from_words, unpack
from fedmosaic.privacy.secureaggregation.member import SumMember
from fedmosaic.privacy.secureaggregation.messages import Opening
from fedmosaic.privacy.secureaggregation.partition import NO_ROUND, Partition, RoundTotals, sum_context
from fedmosaic.protos.errors import EncryptionError, StateError
from fedmosaic.protos.messages import Aggregate, Enrolled, KeyMessage
from fedmosaic.protos.refusal import Refusal

log = logging.getLogger(__name__)
_PERSONAL: Final = "personal-trained"
"""Empty file of a state directory whose newest adapter has the personal branch of the run's end."""
_SECONDS_PER_READ: Final = 60.0
_SECONDS_PER_CALL: Final = 30.0


def take_part(
    member: SumMember,
    answered: Callable[[str, bytes], Mapping[str, bytes]],
    draw: Callable[[], np.ndarray | None],
) -> None:
    """Bring a vector into the group's sum; see `fedmosaic.privacy.secureaggregation.member`.

    `answered` sends our message of a step and gives what it brought. `draw` gives (D,) the share, charged and
    booked, or None to leave, once, when enough others have proved to take part: a sum that never begins costs
    nothing. EncryptionError for an unacceptable or late message; Refusal if there is no sum with us.
    """
    openings = answered("sum-open", member.open().encoded())
    sealed = member.share({name: Opening.decoded(data) for name, data in openings.items()})
    envelopes = answered("sum-share", b"".join(sealed[name] for name in sorted(sealed)))
    member.accept(envelopes)
    vector = draw()
    if vector is None:
        return
    survivors = answered("sum-vector", member.mask(vector))
    signatures = answered("sum-agree", member.agree(tuple(survivors)))
    answered("sum-unmask", member.unmask(signatures).encoded())


class GroupLearner(Learner, Protocol):
    """What a session of group sums asks of the model side besides."""

    def load_shared(self, vector: np.ndarray) -> None:
        """The shared branch, as the sums so far make it: (D,) float32."""

    def group_share(self, round_number: int, members: int, releases: Releases) -> np.ndarray | None:
        """This member's part of its group's sum, charged: (D,) int64, or None where the budget refuses."""

    def train_personal(self, round_number: int) -> None:
        """Train what never leaves, on top of the shared branch."""


class GroupSession(Session):
    """One client in one run of group sums."""

    _learner: GroupLearner

    def __post_init__(self) -> None:
        super().__post_init__()
        self._terms = self.roster.terms
        self._chain = NO_ROUND
        self._gradients: list[FloatArray | None] = []
        self._start = self._learner.sections()["shared"].astype(np.float64)

    def _contribute(self, run_id: str, aggregate: Aggregate) -> None:
        if aggregate.round > 1:
            self._receive_sums(aggregate.round)
            self._share(run_id, aggregate.round)

    def _vectors(self, round_number: int) -> Mapping[str, np.ndarray]:
        return {}

    def _after_last_round(self, enrolled: Enrolled) -> None:
        done = self._state.directory / _PERSONAL
        if done.exists():
            return  # and stands in the adapter that was resumed
        self._pull(enrolled.rounds + 1)
        self._receive_sums(enrolled.rounds + 1)
        self._learner.train_personal(enrolled.rounds)
        # A crash in between leaves no adapter of the round, to be made anew.
        if (place := self._state.adapter_path(enrolled.rounds)).exists():
            shutil.rmtree(place)
        self._state.complete_round(enrolled.rounds, self._learner.save)
        write_atomically(done, b"")

    def _receive_sums(self, round_number: int) -> None:
        """Take the public steps of all rounds before this one."""
        self._progress.stage(round_number, "receiving the sums")
        partition = self._groups
        mixing = partition.mixing[self._identity.client_id]
        for number in range(2 + len(self._gradients), round_number):
            # Whether others were told the same shows in the next sum, which every member signs with them.
            found = self._read(number, "sum-totals")
            totals = RoundTotals.from_messages(number, found, len(partition.groups))
            self._gradients.append(mixed_gradient(self._sums_of(totals), mixing))
            self._chain = totals.follow(self._chain)
            if number >= self._state.record.received_round:  # not all over again after a restart
                self._state.note_received(number + 1, received=self._gradients[-1] is not None)
        terms = self._terms
        theta = shared_branch(
            self._start, self._gradients, terms.group_sums.learning_rate, max(1, terms.schedule.rounds - 1)
        )
        self._learner.load_shared(theta.astype(np.float32))

    @cached_property
    def _groups(self) -> Partition:
        """Who adds up with whom in all rounds, checked against the terms; formed once the first is over."""
        self._progress.stage(2, "waiting for the groups")
        self._pull(2)
        partition = Partition.decoded(self._read(1, "sum-partition").get("server", b""))
        families, terms = self.roster.sharing_families(), self._terms
        least = terms.least_group(len(families))
        partition.check(self._identity.client_id, families, least, terms.group_sums.groups)
        return partition

    def _groups_in(self, number: int) -> Partition:
        """Those of them who add up in a round."""
        return self._groups.drawn(self.roster, self._state.record.run_id, number)

    def _drawn(self, number: int) -> frozenset[str]:
        schedule = self._terms.schedule
        if schedule.sampled_clients is None or not 1 < number <= schedule.rounds:
            return frozenset(member.id for member in self.roster.members)
        return frozenset(name for group in self._groups_in(number).groups for name in group)

    def _sums_of(self, totals: RoundTotals) -> list[GroupSum | None]:
        sums: list[GroupSum | None] = []
        terms, partition = self._terms, self._groups_in(totals.round)
        for group, names, packed in zip(partition.groups, totals.contributors, totals.vectors, strict=True):
            if not names:
                sums.append(None)
                continue
            grid, privacy = group_grid(terms, len(group)), terms.adapter_privacy
            words = unpack(packed, terms.adapter.shared_dimensions, grid.bits)
            units = from_words(words, grid.bits).astype(np.float64)
            divisor = float(len(names) * privacy.expected_batch_size)
            sums.append(GroupSum(units * (privacy.clipping_norm / grid.steps), divisor))
        return sums

    def _share(self, run_id: str, round_number: int) -> None:
        """Bring this round's share into the group's sum; a round that was begun before is left alone."""
        if self._releases.adapter_begun(round_number):
            log.warning("round %d: begun before the restart; its sum is formed without us", round_number)
            return
        partition = self._groups_in(round_number)
        index = partition.group_of(self._identity.client_id)
        group, terms = partition.groups[index], self._terms
        context = sum_context(
            self.roster.federation, run_id, round_number, self.roster.hash, partition, self._chain
        )
        keys, dimensions = self.roster.identity_keys(), terms.adapter.shared_dimensions
        sums = partition.terms(context, keys, terms.group_sums, dimensions)
        member = SumMember(sums[index], self._identity.client_id, self._identity.signing_key)
        self._progress.stage(round_number, "adding up with the group")
        try:
            take_part(
                member,
                lambda step, payload: self._answered(round_number, step, payload),
                lambda: self._learner.group_share(round_number, len(group), self._releases),
            )
        except (Refusal, EncryptionError) as error:
            # What was charged is lost. What is told the server is what it knows: that no answer came.
            log.warning("round %d: no sum with us in it: %s", round_number, error)

    def _answered(self, number: int, step: str, payload: bytes) -> Mapping[str, bytes]:
        """Send this member's message of a step, and wait for what the step brought."""
        self._transport.post_key_message(KeyMessage(number, step, "", payload))
        patience = self._terms.schedule.round_deadline_seconds
        deadline = time.monotonic() + patience
        while (left := deadline - time.monotonic()) > 0:
            if found := self._transport.read_key_messages(number, step, 1, min(_SECONDS_PER_CALL, left)):
                return found
        raise EncryptionError(f"step {step!r} was not over within {patience:.0f} s")

    def _read(self, number: int, stage: str) -> Mapping[str, bytes]:
        found = self._transport.read_key_messages(number, stage, 1, _SECONDS_PER_READ)
        if not found:
            raise StateError(f"the server has no {stage} of round {number}; its operator can tell why")
        return found
