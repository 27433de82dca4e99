"""An epoch of the group key, as far as the server sees it: who takes part, and which messages are there.

An epoch passes through three phases:

    JOINING    members say that they are there; closed when all that are expected have, or at the
               deadline, so that everybody reads one and the same list. That list is the epoch.
    AGREEING   its members post openings, the leader sealed boxes, and everybody a confirmation.
    READY      every member has confirmed: uploads may be encrypted under this epoch.

An agreement that passes its deadline starts the next epoch, without the members who did not answer; they
may join the one after it. Who was silent is not always who is to blame: a leader can seal boxes that do not
open, and the server cannot see it. So from the second failure in a row on, half of the members, another half
each time, wait for one epoch, and nobody can be in all of them. No list is ever left with fewer members than
an epoch needs.

A member that was killed in the middle may have lost its part in an epoch, or the epoch's key. It says so
(LOST): the epoch is begun anew if nothing is encrypted under it yet, for each member once in a round, so that
nobody can keep the others agreeing for ever. Otherwise the others go on without it until the next round, at
once: if they are agreeing, in a next epoch that it may not join.

Pure: time is passed in, and nothing here does any input or output. What the messages mean is between the
clients (`fedmosaic.privacy.groupkey.agreement`): a server that tells different members different lists
gets different epochs, whose messages do not verify.
"""

import enum
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Final

from pydantic import TypeAdapter

JOIN: Final = "join"
OPENING: Final = "opening"
BOX: Final = "box"
CONFIRMATION: Final = "confirmation"
LOST: Final = "lost"
STAGES: Final = (JOIN, OPENING, BOX, CONFIRMATION, LOST)


class EpochPhase(enum.Enum):
    """Where an epoch is."""

    JOINING = "joining"
    AGREEING = "agreeing"
    READY = "ready"


class Answer(enum.Enum):
    """What became of a posted message."""

    ACCEPTED = "accepted"
    REPEATED = "repeated"
    REPLACED = "the epoch was replaced by a newer one"
    CLOSED = "the epoch's members are fixed already; wait for the next epoch"
    EXCLUDED = "the sender did not answer in an epoch that failed; wait for the next epoch"
    NOT_A_MEMBER = "the sender is not a member of this epoch"


@dataclass(frozen=True)
class KeyEpoch:
    """State of an epoch.

    Attributes:
        epoch: number of the epoch, from 1.
        phase: where it is.
        deadline: time at which the phase is given up, in the caller's clock.
        members: who takes part, sorted; empty while members join.
        joined: who has joined.
        openings: who has posted an opening.
        confirmations: who has posted a confirmation.
        excluded: who may not join this epoch.
        failures: how many epochs before this one failed in a row.
        first_round: round for which the first of these epochs was begun.
        lost: who cannot have the key of this epoch any more.
        pardoned: for whose sake an epoch was begun anew in this round.
        patience_seconds: length of a phase.
        minimum_members: an epoch with fewer is not closed.
    """

    epoch: int
    phase: EpochPhase
    deadline: float
    patience_seconds: float
    minimum_members: int
    members: tuple[str, ...] = ()
    joined: frozenset[str] = frozenset()
    openings: frozenset[str] = frozenset()
    confirmations: frozenset[str] = frozenset()
    excluded: frozenset[str] = frozenset()
    failures: int = 0
    first_round: int = 1
    lost: frozenset[str] = frozenset()
    pardoned: frozenset[str] = frozenset()

    def post(self, sender: str, epoch: int, stage: str, now: float) -> tuple["KeyEpoch", Answer]:
        """Take note of a message: the epoch afterwards, and whether the message counts."""
        if epoch != self.epoch:
            return self, Answer.REPLACED
        if stage == JOIN:
            if sender in self.joined:
                return self, Answer.REPEATED
            if self.phase is not EpochPhase.JOINING:
                return self, Answer.CLOSED
            if sender in self.excluded | self.lost:
                return self, Answer.EXCLUDED
            return replace(self, joined=self.joined | {sender}), Answer.ACCEPTED
        if sender not in self.members:
            return self, Answer.NOT_A_MEMBER
        if stage == OPENING:
            return replace(self, openings=self.openings | {sender}), Answer.ACCEPTED
        if stage != CONFIRMATION:
            return self, Answer.ACCEPTED
        if sender in self.confirmations:
            return self, Answer.REPEATED
        confirmed = replace(self, confirmations=self.confirmations | {sender})
        if confirmed.confirmations == set(self.members):
            confirmed = replace(confirmed, phase=EpochPhase.READY, deadline=now)
        return confirmed, Answer.ACCEPTED

    def lose(self, sender: str, epoch: int, now: float, *, unused: bool) -> tuple["KeyEpoch", Answer]:
        """Take note that a member has lost its part in an epoch, or the epoch's key.

        `unused` says that nothing of the open round is stored, so that the epoch may be replaced.
        """
        if epoch != self.epoch:
            return self, Answer.REPLACED
        if self.phase is not EpochPhase.JOINING and sender not in self.members:
            return self, Answer.NOT_A_MEMBER
        if unused and sender not in self.pardoned:
            anew = self.next_epoch(now)
            return replace(anew, failures=self.failures, pardoned=self.pardoned | {sender}), Answer.ACCEPTED
        unconfirmed = self.phase is EpochPhase.AGREEING and sender not in self.confirmations
        if unconfirmed and len(self.members) > self.minimum_members:
            # All would wait until the deadline for its confirmation, and agree without it only then. Who was
            # left out stays out, or two members could take turns for ever.
            anew, excluded = self.next_epoch(now), self.excluded | {sender}
            return replace(anew, failures=self.failures, excluded=excluded), Answer.ACCEPTED
        return replace(self, lost=self.lost | {sender}, joined=self.joined - {sender}), Answer.ACCEPTED

    def advance(self, expected: Collection[str], now: float) -> "KeyEpoch":
        """Close the list when all expected members have joined, or act on a missed deadline."""
        if self.phase is EpochPhase.JOINING:
            enough = len(self.joined) >= self.minimum_members
            awaited = set(expected) - self.excluded - self.lost
            complete = bool(awaited) and awaited <= self.joined
            if enough and (complete or now >= self.deadline):
                members, deadline = tuple(sorted(self.joined)), now + self.patience_seconds
                return replace(self, phase=EpochPhase.AGREEING, members=members, deadline=deadline)
            if now >= self.deadline and self.excluded | self.lost:
                # A client joins an epoch once, so those who were turned away need a new one.
                return replace(self.next_epoch(now), failures=self.failures)
            if now >= self.deadline:
                return replace(self, deadline=now + self.patience_seconds)
            return self
        if self.phase is EpochPhase.AGREEING and now >= self.deadline:
            excluded, failures = self._left_out(expected), self.failures + 1
            return replace(self.next_epoch(now), excluded=excluded, failures=failures)
        return self

    def _left_out(self, expected: Collection[str]) -> frozenset[str]:
        """Who may not join the epoch after this one, which failed."""
        if self.failures == 0:
            unopened = set(self.members) - self.openings
            # Without all openings nobody else can go on, so nobody else is to blame.
            silent = unopened or set(self.members) - self.confirmations
            enough = len(self.members) - len(silent) >= self.minimum_members
            return frozenset(silent) if enough else frozenset()
        around = set(expected) | set(self.members)
        drawn = sorted(around, key=lambda name: hashlib.sha256(f"{self.epoch}/{name}".encode()).digest())
        return frozenset(drawn[max(self.minimum_members, (len(drawn) + 1) // 2) :])

    def next_epoch(self, now: float) -> "KeyEpoch":
        """Begin a new epoch that everybody may join: at a rotation, or on a change of membership."""
        begun = first_epoch(now, self.patience_seconds, self.minimum_members)
        return replace(begun, epoch=self.epoch + 1, first_round=self.first_round, pardoned=self.pardoned)

    def for_round(self, round_number: int, *, renew: bool, now: float) -> "KeyEpoch":
        """The epoch when a round opens: a new one if `renew`."""
        if not renew:
            return replace(self, pardoned=frozenset())
        return replace(self.next_epoch(now), first_round=round_number, pardoned=frozenset())

    def readable(self, epoch: int, stage: str) -> bool:
        """Whether a stage's messages may be read now: who joined, only once the list is closed."""
        return epoch == self.epoch and (stage != JOIN or self.phase is not EpochPhase.JOINING)

    def fewer(self, epoch: int, stage: str, count: int) -> bool:
        """Whether fewer messages of a stage than so many are there; False where that is not known."""
        if epoch != self.epoch or stage not in (JOIN, OPENING, CONFIRMATION):
            return False
        if stage == JOIN:
            return self.phase is EpochPhase.JOINING
        return len(self.openings if stage == OPENING else self.confirmations) < count

    def waiting_for(self, expected: Collection[str]) -> tuple[str, ...]:
        """Members whose message the epoch waits for, sorted."""
        if self.phase is EpochPhase.JOINING:
            return tuple(sorted(set(expected) - self.excluded - self.lost - self.joined))
        if self.phase is EpochPhase.AGREEING:
            return tuple(sorted(set(self.members) - self.confirmations))
        return ()


_NOT_STORED: Final = {"deadline", "patience_seconds", "minimum_members"}
_STATE: Final = TypeAdapter(KeyEpoch)


def first_epoch(now: float, patience_seconds: float, minimum_members: int) -> KeyEpoch:
    """The first epoch of a run that begins now."""
    return KeyEpoch(1, EpochPhase.JOINING, now + patience_seconds, patience_seconds, minimum_members)


def to_record(state: KeyEpoch) -> dict[str, object]:
    """What has to survive a restart; deadlines do not, since the clock starts anew."""
    record: dict[str, object] = _STATE.dump_python(state, mode="json", exclude=_NOT_STORED)
    return record


def from_record(
    record: Mapping[str, object], now: float, patience_seconds: float, minimum_members: int
) -> KeyEpoch:
    """Rebuild an epoch from `to_record`, with a full deadline ahead; TypeError or ValueError if damaged."""
    terms = {"patience_seconds": patience_seconds, "minimum_members": minimum_members}
    # An older server did not know of all parts, and without a first round an epoch has served its time.
    return _STATE.validate_python({"first_round": 0, **record, **terms, "deadline": now + patience_seconds})
