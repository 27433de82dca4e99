"""A synchronous round as a state machine: events in, decisions out, no clock and no I/O inside.

    OPEN ── all who are waited for have arrived, or the deadline is past with a quorum ──► CLOSED
     ▲                                                                                       │
     └────────────── the aggregates are stored; one round further, or FINISHED ◄─────────────┘

A deadline that passes below the quorum is extended. A member that misses a round is not waited for again
until it shows up, so that one dead machine costs one deadline and not one per round.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from fedmosaic.protos import bounds
from fedmosaic.protos.messages import Phase, ReceiptStatus, RoundStatus

_NAMES_SHOWN = 10
_NAMES_LENGTH = 360
"""Longest list of names, in characters: two of them fit a message beside what else it says."""


@dataclass(frozen=True)
class Round:
    """Where the run is.

    Attributes:
        number: the round that is open or being aggregated, from 1; rounds + 1 once the run is finished.
        rounds: how many rounds the run has.
        phase: OPEN takes uploads, CLOSED is being aggregated.
        members: everybody on the roster.
        quorum: least number of contributions with which a deadline closes the round.
        duration: seconds from the opening of a round to its deadline.
        deadline: in the clock of the events.
        arrived: content hash of every upload of this round that is stored, by client.
        contributors: those of `arrived` whose upload has sections.
        absent: members that are not waited for, because they missed a round and were not seen since.
        able: members that can upload at all; without the group key of the epoch a member cannot.
        extensions: how often the deadline of this round was extended.
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
    able: frozenset[str] = frozenset()
    extensions: int = 0
    asked: frozenset[str] = frozenset()
    given_up: frozenset[str] = frozenset()

    @property
    def waiting_for(self) -> frozenset[str]:
        """Members whose upload would let the round close at once."""
        if self.phase is not Phase.OPEN:
            return frozenset()
        return self.able - self.absent - self.given_up - self.arrived.keys()


@dataclass(frozen=True)
class Pushed:
    """An upload is at the door: valid, but not yet stored.

    Attributes:
        client: who sends it.
        round: which round it is for.
        content_hash: digest of the upload.
        contributes: whether it has sections.
        stored_hash: digest of the upload that is stored for this client and round, if there is one.
    """

    client: str
    round: int
    content_hash: bytes
    contributes: bool
    stored_hash: bytes | None


@dataclass(frozen=True)
class Seen:
    """A member showed that it is alive."""

    client: str


@dataclass(frozen=True)
class KeyReady:
    """The group key of the epoch is agreed; only now can uploads come, so the deadline starts now.

    Attributes:
        holders: members that hold the key.
    """

    holders: frozenset[str]


@dataclass(frozen=True)
class Unable:
    """A member has lost the group key of the epoch, so it is not waited for."""

    client: str


@dataclass(frozen=True)
class Damaged:
    """Stored uploads of the closed round are not what their clients sent; it opens again for these.

    Attributes:
        clients: whose they are.
        patience: seconds in which they are to send them again.
    """

    clients: frozenset[str]
    patience: float


@dataclass(frozen=True)
class Tick:
    """Time has passed, or something has changed."""


@dataclass(frozen=True)
class Aggregated:
    """The aggregates of the closed round are stored."""


Event = Pushed | Seen | KeyReady | Unable | Damaged | Tick | Aggregated


@dataclass(frozen=True)
class Answer:
    """Answer the upload so; ACCEPTED asks for it to be stored before the answer goes out."""

    status: ReceiptStatus


@dataclass(frozen=True)
class Reject:
    """Refuse the upload: it is for a round to come, or differs from one that is stored."""

    reason: str
    message: str
    remedy: str


@dataclass(frozen=True)
class CloseRound:
    """Aggregate what these clients contributed."""

    contributors: frozenset[str]


@dataclass(frozen=True)
class Extended:
    """The deadline passed below the quorum and was extended."""

    message: str


@dataclass(frozen=True)
class OpenRound:
    """This round is open now; rounds + 1 means that the run is finished."""

    number: int


Decision = Answer | Reject | CloseRound | Extended | OpenRound


def first_round(members: Collection[str], quorum: int, rounds: int, duration: float, now: float) -> Round:
    """The first round, just opened; see `Round` for the arguments."""
    everybody = frozenset(members)
    return Round(1, rounds, Phase.OPEN, everybody, quorum, duration, now + duration, able=everybody)


def resume_round(
    state: Round,
    number: int,
    arrived: Mapping[str, bytes],
    contributors: Iterable[str],
    absent: Iterable[str],
) -> Round:
    """The round a restarted server was in, with a full new deadline.

    Args:
        state: from `first_round` at the time of the restart.
        number: the round that was open; rounds + 1 if the run was finished.
        arrived: content hashes of the uploads that are stored for it.
        contributors: those with sections.
        absent: members that were not waited for.
    """
    return replace(
        state,
        number=number,
        phase=Phase.FINISHED if number > state.rounds else Phase.OPEN,
        arrived=dict(arrived),
        contributors=frozenset(contributors),
        absent=frozenset(absent) & state.members,
    )


def step(state: Round, event: Event, now: float) -> tuple[Round, tuple[Decision, ...]]:
    """Take one event.

    Args:
        state: before the event.
        event: what happened.
        now: seconds, in the clock of `state.deadline`.

    Returns:
        The state after the event, and what to do, in order.
    """
    match event:
        case Seen(client):
            return replace(state, absent=state.absent - {client}), ()
        case KeyReady(holders):
            able = state.members & holders
            absent = state.absent | (state.members - able)
            return replace(state, able=able, absent=absent, deadline=now + state.duration), ()
        case Unable(client):
            # Not absent: it is there, and the next round begins with a key for it too.
            return replace(state, able=state.able - {client}), ()
        case Damaged(clients, patience):
            return _reopen(state, clients, now + patience), ()
        case Pushed():
            return _push(state, event)
        case Tick():
            return _tick(state, now)
        case Aggregated():
            return _next_round(state, now)


def _push(state: Round, event: Pushed) -> tuple[Round, tuple[Decision, ...]]:
    if event.stored_hash == event.content_hash:
        return state, (Answer(ReceiptStatus.DUPLICATE),)
    if event.round > state.number:
        return state, (
            Reject(
                "ROUND_NOT_OPEN",
                f"the upload is for round {event.round}, the open round is {state.number}",
                f"pull round {state.number} and go on from there",
            ),
        )
    if event.round < state.number or state.phase is not Phase.OPEN:
        return state, (Answer(ReceiptStatus.LATE),)
    if event.stored_hash is not None:
        return state, (
            Reject(
                "UPLOAD_DIFFERS",
                f"another upload of {event.client!r} is stored for round {event.round}; the first one counts",
                "send the stored bytes again when retrying; go on with the next round",
            ),
        )
    contributors = state.contributors | {event.client} if event.contributes else state.contributors
    accepted = replace(
        state,
        arrived={**state.arrived, event.client: event.content_hash},
        contributors=contributors,
        absent=state.absent - {event.client},
    )
    return accepted, (Answer(ReceiptStatus.ACCEPTED),)


def _reopen(state: Round, damaged: frozenset[str], deadline: float) -> Round:
    return replace(
        state,
        phase=Phase.OPEN,
        deadline=deadline,
        arrived={client: digest for client, digest in state.arrived.items() if client not in damaged},
        contributors=state.contributors - damaged,
        asked=state.asked | damaged,
    )


def _tick(state: Round, now: float) -> tuple[Round, tuple[Decision, ...]]:
    if state.phase is not Phase.OPEN:
        return state, ()
    if now >= state.deadline and state.asked:
        state = replace(state, given_up=state.asked - state.arrived.keys(), asked=frozenset())
    enough = len(state.contributors) >= state.quorum
    everybody = state.able - state.given_up <= state.arrived.keys()
    # With everybody here no upload can come any more, so a quorum out of reach is not waited for either.
    if everybody or (enough and (not state.waiting_for or now >= state.deadline)):
        return replace(state, phase=Phase.CLOSED), (CloseRound(state.contributors),)
    if now < state.deadline:
        return state, ()
    extended = replace(state, deadline=now + state.duration, extensions=state.extensions + 1)
    missing = _names(state.able - state.arrived.keys())
    message = (
        f"round {state.number}: deadline passed with {len(state.contributors)} contributions, the quorum is "
        f"{state.quorum}; extended by {state.duration:.0f} s, missing {missing}"
    )
    return extended, (Extended(message),)


def _next_round(state: Round, now: float) -> tuple[Round, tuple[Decision, ...]]:
    number = state.number + 1
    opened = replace(
        state,
        number=number,
        phase=Phase.FINISHED if number > state.rounds else Phase.OPEN,
        deadline=now + state.duration,
        arrived={},
        contributors=frozenset(),
        absent=(state.absent | state.able) - state.arrived.keys(),
        extensions=0,
        asked=frozenset(),
        given_up=frozenset(),
    )
    return opened, (OpenRound(number),)


def describe(state: Round, now: float) -> RoundStatus:
    """What the server is waiting for, with one line for people.

    Args:
        state: the round.
        now: seconds, in the clock of `state.deadline`.
    """
    left = max(0.0, state.deadline - now) if state.phase is Phase.OPEN else 0.0
    have = f"{len(state.arrived)} of {len(state.members)} uploads"
    if state.phase is Phase.FINISHED:
        message = f"all {state.rounds} rounds are finished"
    elif state.phase is Phase.CLOSED:
        message = f"round {state.number}: closed with {have}, aggregating"
    else:
        parts = [f"round {state.number}: {have}"]
        if state.waiting_for:
            parts.append(f"waiting for {_names(state.waiting_for)}")
        if len(state.contributors) < state.quorum:
            parts.append(f"quorum is {state.quorum}")
        parts.append(f"{left:.0f} s left")
        if state.extensions:
            parts.append(f"deadline extended {state.extensions} ×")
        if state.absent:
            parts.append(f"not waited for: {_names(state.absent)} (missed the last round)")
        message = ", ".join(parts)
    return RoundStatus(
        state.number,
        state.phase,
        tuple(sorted(state.arrived)),
        tuple(sorted(state.waiting_for)),
        left,
        one_line(message),
    )


def one_line(message: str) -> str:
    """A message cut to what a `RoundStatus` carries."""
    return message if len(message) <= bounds.MAX_TEXT else f"{message[: bounds.MAX_TEXT - 1]}…"


def _names(clients: Collection[str]) -> str:
    shown = sorted(clients)[:_NAMES_SHOWN]
    while len(", ".join(shown)) > _NAMES_LENGTH:
        shown.pop()
    more = len(clients) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
