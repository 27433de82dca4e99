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
from collections.abc import Mapping
from typing import Final, Protocol

import numpy as np

from fedmosaic.client.dp.group_steps import FloatArray, GroupSum, mixed_gradient, shared_branch
from fedmosaic.client.group_sum import take_part
from fedmosaic.client.membership import Learner
from fedmosaic.client.planning import group_grid
from fedmosaic.client.progress import Progress
from fedmosaic.client.protection import Identity, Protection
from fedmosaic.client.records import read_upload, write_upload
from fedmosaic.client.releases import Releases
from fedmosaic.client.session import Session
from fedmosaic.client.state import ClientState
from fedmosaic.client.transport.grpc import Transport
from fedmosaic.privacy.federation.kits import Kit
from fedmosaic.privacy.files import write_atomically
from fedmosaic.privacy.secureaggregation.masks import from_words, unpack
from fedmosaic.privacy.secureaggregation.member import SumMember
from fedmosaic.privacy.secureaggregation.partition import NO_ROUND, Partition, RoundTotals, sum_context
from fedmosaic.protos.errors import EncryptionError, StateError
from fedmosaic.protos.messages import Enrolled, KeyMessage
from fedmosaic.protos.refusal import Refusal

log = logging.getLogger(__name__)

_PERSONAL: Final = "personal-trained"
"""Empty file of a state directory whose newest adapter has the personal branch of the run's end."""
_SECONDS_PER_READ: Final = 60.0


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

    def __init__(
        self,
        kit: Kit,
        identity: Identity,
        transport: Transport,
        learner: GroupLearner,
        state: ClientState,
        releases: Releases,
        protection: Protection,
        progress: Progress,
    ) -> None:
        super().__init__(kit, identity, transport, learner, state, releases, protection, progress)
        self._group_learner = learner
        self._terms = kit.roster.terms
        self._partition: Partition | None = None
        self._chain = NO_ROUND
        self._gradients: list[FloatArray | None] = []
        self._start = learner.sections()["shared"].astype(np.float64)

    def _take_part(self, enrolled: Enrolled, round_number: int) -> int:
        upload = read_upload(self._state.upload_path(round_number))
        if upload is not None:
            log.info("round %d: re-sending the stored upload, byte for byte", round_number)
            return self._push(self._as_ours(enrolled.run_id, upload))
        self._progress.stage(round_number, "waiting for the round to open")
        aggregate = self._pull(round_number)
        if aggregate.round > enrolled.rounds:
            return aggregate.round
        if aggregate.round > 1:
            self._receive_sums(aggregate.round)
            self._share(enrolled.run_id, aggregate.round)
        upload = self._protection.seal(
            enrolled.run_id,
            aggregate.round,
            aggregate.upload_key_epoch,
            {},
            self._releases.profile(aggregate.round),
            self._releases.anchor.claim(),
        )
        write_upload(self._state.upload_path(aggregate.round), upload)
        return self._push(upload)

    def _after_last_round(self, enrolled: Enrolled) -> None:
        done = self._state.directory / _PERSONAL
        if done.exists():
            return  # and stands in the adapter that was resumed
        self._pull(enrolled.rounds + 1)
        self._receive_sums(enrolled.rounds + 1)
        self._group_learner.train_personal(enrolled.rounds)
        self._state.replace_adapter(enrolled.rounds, self._learner.save)
        write_atomically(done, b"")

    def _receive_sums(self, round_number: int) -> None:
        """Take the public steps of all rounds before this one."""
        self._progress.stage(round_number, "receiving the sums")
        partition = self._groups()
        mixing = partition.mixing[self._identity.client_id]
        for number in range(2 + len(self._gradients), round_number):
            # Whether others were told the same shows in the next sum, which every member signs with them.
            found = self._read(number, "sum-totals")
            totals = RoundTotals.from_messages(number, found, len(partition.groups))
            self._gradients.append(mixed_gradient(self._sums_of(totals, partition), mixing))
            self._chain = totals.follow(self._chain)
        terms = self._terms
        theta = shared_branch(
            self._start, self._gradients, terms.group_sums.learning_rate, max(1, terms.schedule.rounds - 1)
        )
        self._group_learner.load_shared(theta.astype(np.float32))
        received = round_number > 2 and self._gradients[-1] is not None
        self._state.note_received(round_number, received=received)

    def _groups(self) -> Partition:
        if self._partition is None:
            partition = Partition.decoded(self._read(1, "sum-partition").get("server", b""))
            partition.check(
                self._identity.client_id,
                [member.id for member in self.roster.members],
                self._terms.group_sums.minimum_contributors,
                self._terms.group_sums.groups,
            )
            self._partition = partition
        return self._partition

    def _sums_of(self, totals: RoundTotals, partition: Partition) -> list[GroupSum | None]:
        sums: list[GroupSum | None] = []
        terms = self._terms
        for group, names, packed in zip(partition.groups, totals.contributors, totals.vectors, strict=True):
            if not names:
                sums.append(None)
                continue
            grid = group_grid(terms, len(group))
            words = unpack(packed, terms.adapter.shared_dimensions, grid.bits)
            vector = from_words(words, grid.bits).astype(np.float64) * (
                terms.adapter_privacy.clipping_norm / grid.steps
            )
            sums.append(
                GroupSum(
                    np.asarray(vector, dtype=np.float64),
                    float(len(names) * terms.adapter_privacy.expected_batch_size),
                )
            )
        return sums

    def _share(self, run_id: str, round_number: int) -> None:
        """Bring this round's share into the group's sum; a round that was begun before is left alone."""
        if self._releases.adapter_begun(round_number):
            log.warning("round %d: begun before the restart; its sum is formed without us", round_number)
            return
        partition = self._groups()
        index = partition.group_of(self._identity.client_id)
        group = partition.groups[index]

        terms = self._terms
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
                _Relay(self._transport, round_number),
                lambda: self._group_learner.group_share(round_number, len(group), self._releases),
                patience_seconds=terms.schedule.round_deadline_seconds,
            )
        except (Refusal, EncryptionError) as error:
            # What was charged is lost. What is told the server is what it knows: that no answer came.
            log.warning("round %d: no sum with us in it: %s", round_number, error)

    def _read(self, number: int, stage: str) -> Mapping[str, bytes]:
        found = self._transport.read_key_messages(number, stage, 1, _SECONDS_PER_READ)
        if not found:
            raise StateError(f"the server has no {stage} of round {number}; its operator can tell why")
        return found


class _Relay:
    """The relay of one round's messages, as `take_part` asks for it."""

    def __init__(self, transport: Transport, round_number: int) -> None:
        self._transport = transport
        self._round = round_number

    def post(self, step: str, payload: bytes) -> None:
        self._transport.post_key_message(KeyMessage(self._round, step, "", payload))

    def read(self, step: str, timeout_seconds: float) -> Mapping[str, bytes]:
        return self._transport.read_key_messages(self._round, step, 1, timeout_seconds)
