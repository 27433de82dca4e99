"""A synchronous round as a state machine: every event gives the state after it, no clock and no I/O inside.

    OPEN ── all who are waited for have arrived, or the deadline is past with a quorum ──► CLOSED
     ▲                                                                                       │
     └────────────── the aggregates are stored; one round further, or FINISHED ◄─────────────┘

A deadline that passes below the quorum is extended. A member that misses a round is not waited for again
until it shows up, so that one dead machine costs one deadline and not one per round.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

from fedmosaic.protos import bounds
from fedmosaic.protos.messages import Phase, ReceiptStatus, RoundStatus

Draw = Callable[[int], frozenset[str]]
"""The members that take part in a round, by its number."""
_NAMES_SHOWN = 10
_NAMES_LENGTH = 360
"""Longest list of names, in characters: two of them fit a message beside what else it says."""


@dataclass(frozen=True)
class Rejected:
    """An upload is refused: it is for a round to come, or differs from one that is stored."""

    reason: str
    message: str
    remedy: str


@dataclass(frozen=True)
class Round:
    """Where the run is.

    Attributes:
        number: the round that is open or being aggregated, from 1; rounds + 1 once the run is finished.
        phase: OPEN takes uploads, CLOSED is being aggregated.
        quorum: least number of contributions with which a deadline closes the round.
        duration: seconds from the opening of a round to its deadline, which is in the clock of the events.
        arrived: content hash of every upload of this round that is stored, by client.
        contributors: those of `arrived` whose upload has sections.
        absent: members that are not waited for, because they missed a round and were not seen since.
        drawn: members that take part in this round.
        holders: members that hold the group key of the epoch; all of them where nothing is encrypted.
        draw: who takes part, by round; None where everybody does in every one.
        asked: members whose stored upload of this round was damaged, and who were asked for it again.
        given_up: those of them who did not send it in time; this round goes on without them.
    """

    number: int
    rounds: int
    phase: Phase
    members: frozenset[str]
    quorum: int
    duration: float
    deadline: float
    arrived: Mapping[str, bytes] = field(default_factory=dict)
    contributors: frozenset[str] = frozenset()
    absent: frozenset[str] = frozenset()
    drawn: frozenset[str] = frozenset()
    holders: frozenset[str] = frozenset()
    extensions: int = 0
    asked: frozenset[str] = frozenset()
    given_up: frozenset[str] = frozenset()
    draw: Draw | None = None

    @property
    def able(self) -> frozenset[str]:
        """Members that can upload at all."""
        return self.drawn & self.holders

    @property
    def sharing_key(self) -> frozenset[str]:
        """Members that agree on a group key: all that are there, drawn or not, with a turn ahead of them."""
        here = self.members - self.absent
        if self.draw is None:
            return here
        last = _last_turns(self.draw, self.members, self.rounds)
        return frozenset(name for name in here if last.get(name, 0) >= self.number)

    @property
    def needing_key(self) -> frozenset[str]:
        """Members that encrypt in this round, or in the next one decrypt what is encrypted in this."""
        if self.draw is None or self.number >= self.rounds:
            return self.drawn
        return self.drawn | self.draw(self.number + 1)

    @property
    def waiting_for(self) -> frozenset[str]:
        """Members whose upload would let the round close at once."""
        if self.phase is not Phase.OPEN:
            return frozenset()
        return self.able - self.absent - self.given_up - self.arrived.keys()

    def resumed(
        self, number: int, arrived: Mapping[str, bytes], contributors: Iterable[str], absent: Iterable[str]
    ) -> "Round":
        """The round a restarted server was in, with this round's full deadline; arguments as of `Round`."""
        return replace(
            self,
            number=number,
            phase=Phase.FINISHED if number > self.rounds else Phase.OPEN,
            drawn=self._drawn_in(number),
            arrived=dict(arrived),
            contributors=frozenset(contributors),
            absent=frozenset(absent) & self.members,
        )

    def _drawn_in(self, number: int) -> frozenset[str]:
        return self.members if self.draw is None else self.draw(number)

    def seen(self, client: str) -> "Round":
        """A member showed that it is alive."""
        return replace(self, absent=self.absent - {client})

    def key_agreed(self, holders: frozenset[str], now: float) -> "Round":
        """The group key is agreed among `holders`; only now can uploads come, so the deadline starts now."""
        absent = self.absent | (self.members - holders)
        return replace(self, holders=self.members & holders, absent=absent, deadline=now + self.duration)

    def key_lost(self, client: str) -> "Round":
        """A member has lost the group key of the epoch, so it is not waited for.

        It is there, so it is not absent, and the next round begins with a key for it too.
        """
        return replace(self, holders=self.holders - {client})

    def judged(
        self, client: str, number: int, content_hash: bytes, stored_hash: bytes | None, *, contributes: bool
    ) -> tuple["Round", ReceiptStatus | Rejected]:
        """What becomes of a valid upload; ACCEPTED asks for it to be stored before the answer goes out.

        `stored_hash` is the digest of what is stored for this client and round; `contributes` means sections.
        """
        if stored_hash == content_hash:
            return self, ReceiptStatus.DUPLICATE
        if number > self.number:
            return self, Rejected(
                "ROUND_NOT_OPEN",
                f"the upload is for round {number}, the open round is {self.number}",
                f"pull round {self.number} and go on from there",
            )
        if number < self.number or self.phase is not Phase.OPEN:
            return self, ReceiptStatus.LATE
        if client not in self.drawn:
            return self, Rejected(
                "NOT_DRAWN",
                f"{client!r} does not take part in round {number}: others were drawn for it",
                "wait for a round that this member is drawn for",
            )
        if stored_hash is not None:
            return self, Rejected(
                "UPLOAD_DIFFERS",
                f"another upload of {client!r} is stored for round {number}; the first one counts",
                "send the stored bytes again when retrying; go on with the next round",
            )
        accepted = replace(
            self,
            arrived={**self.arrived, client: content_hash},
            contributors=self.contributors | {client} if contributes else self.contributors,
            absent=self.absent - {client},
        )
        return accepted, ReceiptStatus.ACCEPTED

    def ticked(self, now: float) -> "Round":
        """Time has passed, or something has changed: CLOSED, a later deadline, or as before."""
        if self.phase is not Phase.OPEN:
            return self
        state = self
        if now >= state.deadline and state.asked:
            state = replace(state, given_up=state.asked - state.arrived.keys(), asked=frozenset())
        enough = len(state.contributors) >= state.quorum
        everybody = state.able - state.given_up <= state.arrived.keys()
        # With everybody here no upload can come any more, so a quorum out of reach is not waited for either:
        # but for its deadline, where nobody who was drawn has the key, or a run would be over in a moment.
        if everybody and not state.arrived and state.draw is not None:
            everybody = now >= state.deadline
        if everybody or (enough and (not state.waiting_for or now >= state.deadline)):
            return replace(state, phase=Phase.CLOSED)
        if now < state.deadline:
            return state
        return replace(state, deadline=now + state.duration, extensions=state.extensions + 1)

    def reopened(self, damaged: frozenset[str], deadline: float) -> "Round":
        """What the `damaged` sent is not what is stored; the round opens again, for these to resend."""
        return replace(
            self,
            phase=Phase.OPEN,
            deadline=deadline,
            arrived={client: digest for client, digest in self.arrived.items() if client not in damaged},
            contributors=self.contributors - damaged,
            asked=self.asked | damaged,
        )

    def following(self, now: float) -> "Round":
        """The aggregates of the closed round are stored: the next round, open, or the run is finished."""
        number = self.number + 1
        return replace(
            self,
            number=number,
            phase=Phase.FINISHED if number > self.rounds else Phase.OPEN,
            deadline=now + self.duration,
            drawn=self._drawn_in(number),
            arrived={},
            contributors=frozenset(),
            absent=(self.absent | self.able) - self.arrived.keys(),
            extensions=0,
            asked=frozenset(),
            given_up=frozenset(),
        )

    def extended(self) -> str:
        """What to say when the deadline has passed below the quorum."""
        missing = _names(self.able - self.arrived.keys())
        return (
            f"round {self.number}: deadline passed with {len(self.contributors)} contributions, the quorum "
            f"is {self.quorum}; extended by {self.duration:.0f} s, missing {missing}"
        )

    def status(self, now: float) -> RoundStatus:
        """What the server is waiting for, with one line for people; `now` in the clock of `deadline`."""
        arrived, waiting = tuple(sorted(self.arrived)), tuple(sorted(self.waiting_for))
        return RoundStatus(self.number, self.phase, arrived, waiting, self._left(now), self.message(now))

    def _left(self, now: float) -> float:
        return max(0.0, self.deadline - now) if self.phase is Phase.OPEN else 0.0

    def message(self, now: float) -> str:
        """What the server is waiting for, in one line for people."""
        have = f"{len(self.arrived)} of {len(self.drawn)} uploads"
        if self.phase is Phase.FINISHED:
            return f"all {self.rounds} rounds are finished"
        if self.phase is Phase.CLOSED:
            return f"round {self.number}: closed with {have}, aggregating"
        parts = [f"round {self.number}: {have}"]
        if self.waiting_for:
            parts.append(f"waiting for {_names(self.waiting_for)}")
        if len(self.contributors) < self.quorum:
            parts.append(f"quorum is {self.quorum}")
        parts.append(f"{self._left(now):.0f} s left")
        if self.extensions:
            parts.append(f"deadline extended {self.extensions} ×")
        if missing := self.drawn & self.absent:
            parts.append(f"not waited for: {_names(missing)} (missed the last round)")
        return one_line(", ".join(parts))


def first_round(
    members: Collection[str], quorum: int, rounds: int, duration: float, now: float, draw: Draw | None = None
) -> Round:
    """The first round, just opened; see `Round` for the arguments."""
    everybody = frozenset(members)
    drawn = everybody if draw is None else draw(1)
    deadline, holders = now + duration, everybody
    return Round(
        1, rounds, Phase.OPEN, everybody, quorum, duration, deadline, drawn=drawn, holders=holders, draw=draw
    )


@lru_cache(maxsize=4)
def _last_turns(draw: Draw, members: frozenset[str], rounds: int) -> Mapping[str, int]:
    """The last round in which each member takes part; without those who take part in none."""
    last: dict[str, int] = {}
    for number in range(rounds, 0, -1):
        last |= dict.fromkeys(draw(number) - last.keys(), number)
        if len(last) == len(members):
            break
    return last


def one_line(message: str) -> str:
    """A message cut to what a `RoundStatus` carries."""
    return message if len(message) <= bounds.MAX_TEXT else f"{message[: bounds.MAX_TEXT - 1]}…"


def _names(clients: Collection[str]) -> str:
    shown = sorted(clients)[:_NAMES_SHOWN]
    while len(", ".join(shown)) > _NAMES_LENGTH:
        shown.pop()
    more = len(clients) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
