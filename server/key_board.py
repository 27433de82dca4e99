"""The board on which clients agree on a group key. The server relays; it can read nothing.

An epoch passes through three phases:

    JOINING    members say that they are there; closed when all that are expected have, or at the
               deadline, so that everybody reads one and the same list. That list is the epoch.
    AGREEING   its members post openings, the leader sealed boxes, and everybody a confirmation.
    READY      every member has confirmed: uploads may be encrypted under this epoch.

A phase that passes its deadline starts the next epoch, without the members who did not answer. Pure:
time is passed in, and nothing here does any input or output. What the messages mean is between the
clients (`fedmosaic.privacy.key_agreement`): a server that tells different members different lists
gets different epochs, whose messages do not verify.
"""

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Final

JOIN: Final = "join"
OPENING: Final = "opening"
BOX: Final = "box"
CONFIRMATION: Final = "confirmation"
STAGES: Final = (JOIN, OPENING, BOX, CONFIRMATION)


class BoardPhase(enum.Enum):
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
    NOT_A_MEMBER = "the sender is not a member of this epoch"


@dataclass(frozen=True)
class KeyBoard:
    """State of the newest epoch.

    Attributes:
        epoch: number of the epoch, from 1.
        phase: where it is.
        deadline: time at which the phase is given up, in the caller's clock.
        members: who takes part, sorted; empty while members join.
        joined: who has joined.
        confirmations: who has posted a confirmation.
        patience_seconds: length of a phase.
        minimum_members: an epoch with fewer is not closed.
    """

    epoch: int
    phase: BoardPhase
    deadline: float
    patience_seconds: float
    minimum_members: int
    members: tuple[str, ...] = ()
    joined: frozenset[str] = frozenset()
    confirmations: frozenset[str] = frozenset()

    def post(self, sender: str, epoch: int, stage: str, now: float) -> tuple["KeyBoard", Answer]:
        """Take note of a message.

        Args:
            sender: member of the roster, from its certificate.
            epoch: epoch that the message is for.
            stage: one of `STAGES`.
            now: current time.

        Returns:
            The board afterwards, and whether the message counts.
        """
        if epoch != self.epoch:
            return self, Answer.REPLACED
        if stage == JOIN:
            if sender in self.joined:
                return self, Answer.REPEATED
            if self.phase is not BoardPhase.JOINING:
                return self, Answer.CLOSED
            return replace(self, joined=self.joined | {sender}), Answer.ACCEPTED
        if sender not in self.members:
            return self, Answer.NOT_A_MEMBER
        if stage != CONFIRMATION:
            return self, Answer.ACCEPTED
        if sender in self.confirmations:
            return self, Answer.REPEATED
        confirmed = replace(self, confirmations=self.confirmations | {sender})
        if confirmed.confirmations == set(self.members):
            confirmed = replace(confirmed, phase=BoardPhase.READY, deadline=now)
        return confirmed, Answer.ACCEPTED

    def advance(self, expected: Collection[str], now: float) -> "KeyBoard":
        """Close the list when all expected members have joined, or act on a missed deadline.

        Args:
            expected: members that are known to be there.
            now: current time.

        Returns:
            The board afterwards; a new epoch if this one failed.
        """
        if self.phase is BoardPhase.JOINING:
            enough = len(self.joined) >= self.minimum_members
            complete = bool(expected) and set(expected) <= self.joined
            if enough and (complete or now >= self.deadline):
                return replace(
                    self,
                    phase=BoardPhase.AGREEING,
                    members=tuple(sorted(self.joined)),
                    deadline=now + self.patience_seconds,
                )
            if now >= self.deadline:
                return replace(self, deadline=now + self.patience_seconds)
            return self
        if self.phase is BoardPhase.AGREEING and now >= self.deadline:
            return self.next_epoch(now)
        return self

    def next_epoch(self, now: float) -> "KeyBoard":
        """Begin a new epoch: at a rotation, on a change of membership, or after a failure."""
        return KeyBoard(
            epoch=self.epoch + 1,
            phase=BoardPhase.JOINING,
            deadline=now + self.patience_seconds,
            patience_seconds=self.patience_seconds,
            minimum_members=self.minimum_members,
        )

    def readable(self, epoch: int, stage: str) -> bool:
        """Whether a stage's messages may be read now: who joined, only once the list is closed."""
        return epoch == self.epoch and (stage != JOIN or self.phase is not BoardPhase.JOINING)

    def waiting_for(self, expected: Collection[str]) -> tuple[str, ...]:
        """Members whose message the board waits for, sorted."""
        if self.phase is BoardPhase.JOINING:
            return tuple(sorted(set(expected) - self.joined))
        if self.phase is BoardPhase.AGREEING:
            return tuple(sorted(set(self.members) - self.confirmations))
        return ()


def first_epoch(now: float, patience_seconds: float, minimum_members: int) -> KeyBoard:
    """The board of a run that begins now."""
    return KeyBoard(
        epoch=1,
        phase=BoardPhase.JOINING,
        deadline=now + patience_seconds,
        patience_seconds=patience_seconds,
        minimum_members=minimum_members,
    )


def to_record(board: KeyBoard) -> dict[str, object]:
    """What has to survive a restart; deadlines do not, since the clock starts anew."""
    return {
        "epoch": board.epoch,
        "phase": board.phase.value,
        "members": list(board.members),
        "joined": sorted(board.joined),
        "confirmations": sorted(board.confirmations),
    }


def from_record(
    record: Mapping[str, object], now: float, patience_seconds: float, minimum_members: int
) -> KeyBoard:
    """Rebuild a board from `to_record`, with a full deadline ahead."""

    def names(key: str) -> tuple[str, ...]:
        value = record[key]
        return tuple(str(name) for name in value) if isinstance(value, list) else ()

    return KeyBoard(
        epoch=int(str(record["epoch"])),
        phase=BoardPhase(record["phase"]),
        deadline=now + patience_seconds,
        patience_seconds=patience_seconds,
        minimum_members=minimum_members,
        members=names("members"),
        joined=frozenset(names("joined")),
        confirmations=frozenset(names("confirmations")),
    )
