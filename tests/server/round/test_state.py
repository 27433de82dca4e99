"""The round as a state machine: scenarios, and laws that hold in any order of events."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from fedmosaic.protos import bounds
from fedmosaic.protos.messages import Phase, ReceiptStatus
from fedmosaic.server.round import state as rounds
from fedmosaic.server.round.state import (
    Aggregated,
    Answer,
    CloseRound,
    Extended,
    KeyReady,
    OpenRound,
    Pushed,
    Reject,
    Round,
    Seen,
    Tick,
    describe,
    first_round,
    resume_round,
    step,
)

NAMES = ("a", "b", "c", "d", "e")


def digest(client: str, content: int = 0) -> bytes:
    return f"{client}{content}".encode().ljust(32, b".")


def push(
    state: Round, client: str, number: int = 1, *, content: int = 0, stored: bytes | None = None,
    contributes: bool = True, now: float = 0.0,
) -> tuple[Round, object]:  # fmt: skip
    event = Pushed(client, number, digest(client, content), contributes, stored)
    state, (decision,) = step(state, event, now)
    return state, decision


def opened(quorum: int = 4, count: int = 3, names: tuple[str, ...] = NAMES) -> Round:
    return first_round(names, quorum, count, 60.0, 0.0)


def with_uploads(*names: str, state: Round | None = None) -> Round:
    state = state or opened()
    for name in names:
        state, answer = push(state, name, state.number)
        assert answer == Answer(ReceiptStatus.ACCEPTED)
    return state


def closed(state: Round, now: float) -> Round:
    state, decisions = step(state, Tick(), now)
    assert isinstance(decisions[0], CloseRound)
    return state


def test_a_round_closes_as_soon_as_everybody_has_uploaded() -> None:
    state = with_uploads(*NAMES[:-1])
    assert step(state, Tick(), 1.0) == (state, ())
    state = with_uploads("e", state=state)
    state, decisions = step(state, Tick(), 1.0)
    assert decisions == (CloseRound(frozenset(NAMES)),)
    assert state.phase is Phase.CLOSED
    assert step(state, Tick(), 1e9) == (state, ())


def test_a_deadline_closes_a_round_that_has_its_quorum() -> None:
    state = with_uploads("a", "b", "c", "d")
    assert step(state, Tick(), 59.9)[1] == ()
    assert step(state, Tick(), 60.0)[1] == (CloseRound(frozenset("abcd")),)


def test_below_the_quorum_the_deadline_is_extended_and_says_for_whom() -> None:
    state, decisions = step(with_uploads("a", "b"), Tick(), 60.0)
    (extended,) = decisions
    assert isinstance(extended, Extended)
    assert "2 contributions, the quorum is 4" in extended.message
    assert "missing c, d, e" in extended.message
    assert state.deadline == 120.0
    assert state.phase is Phase.OPEN
    assert step(state, Tick(), 119.0)[1] == ()
    assert step(state, Tick(), 120.0)[0].extensions == 2


def test_late_and_repeated_uploads_get_their_answers() -> None:
    state = with_uploads("a", "b", "c", "d")
    assert push(state, "a", stored=digest("a"))[1] == Answer(ReceiptStatus.DUPLICATE)
    _, rejected = push(state, "a", content=1, stored=digest("a"))
    assert isinstance(rejected, Reject)
    assert rejected.reason == "UPLOAD_DIFFERS"
    state = closed(state, 60.0)
    assert push(state, "e")[1] == Answer(ReceiptStatus.LATE)
    assert push(state, "a", stored=digest("a"))[1] == Answer(ReceiptStatus.DUPLICATE)
    state, decisions = step(state, Aggregated(), 61.0)
    assert decisions == (OpenRound(2),)
    assert push(state, "e", 1)[1] == Answer(ReceiptStatus.LATE)
    assert push(state, "a", 1, stored=digest("a"))[1] == Answer(ReceiptStatus.DUPLICATE)
    assert push(state, "a", 2)[1] == Answer(ReceiptStatus.ACCEPTED)


def test_an_upload_for_a_round_to_come_is_refused() -> None:
    state, rejected = push(opened(), "a", 2)
    assert isinstance(rejected, Reject)
    assert rejected.reason == "ROUND_NOT_OPEN"
    assert "open round is 1" in rejected.message
    assert not state.arrived


def test_a_member_that_missed_a_round_is_not_waited_for_until_it_is_seen() -> None:
    state = closed(with_uploads("a", "b", "c", "d"), 60.0)
    state, _ = step(state, Aggregated(), 60.0)
    assert state.absent == {"e"}
    assert state.waiting_for == set("abcd")
    assert "not waited for: e" in describe(state, 60.0).message
    without = with_uploads("a", "b", "c", "d", state=state)
    assert step(without, Tick(), 61.0)[1] == (CloseRound(frozenset("abcd")),)
    back, _ = step(without, Seen("e"), 61.0)
    assert step(back, Tick(), 61.0)[1] == ()
    assert back.waiting_for == {"e"}


def test_absent_members_can_still_make_up_a_quorum_that_is_out_of_reach_otherwise() -> None:
    state = replace(opened(), absent=frozenset("de"))
    state = with_uploads("a", "b", "c", state=state)
    assert step(state, Tick(), 1.0)[1] == ()
    assert isinstance(step(state, Tick(), 60.0)[1][0], Extended)


def test_abstentions_count_as_arrived_but_not_for_the_quorum() -> None:
    state = with_uploads("a", "b", "c")
    state, _ = push(state, "d", contributes=False)
    assert isinstance(step(state, Tick(), 60.0)[1][0], Extended)
    everybody, _ = push(state, "e", contributes=False)
    assert step(everybody, Tick(), 1.0)[1] == (CloseRound(frozenset("abc")),)


def test_the_last_round_finishes_the_run() -> None:
    state = closed(with_uploads(*NAMES, state=opened(count=1)), 1.0)
    state, decisions = step(state, Aggregated(), 1.0)
    assert decisions == (OpenRound(2),)
    assert state.phase is Phase.FINISHED
    assert describe(state, 1.0).message == "all 1 rounds are finished"
    assert push(state, "a", 1)[1] == Answer(ReceiptStatus.LATE)
    assert step(state, Tick(), 1e9) == (state, ())


def test_only_holders_of_the_key_are_waited_for_and_the_deadline_starts_with_the_key() -> None:
    state, _ = step(opened(), KeyReady(frozenset("abcd")), 50.0)
    assert state.deadline == 110.0
    assert state.waiting_for == set("abcd")
    state = with_uploads("a", "b", "c", "d", state=state)
    assert step(state, Tick(), 51.0)[1] == (CloseRound(frozenset("abcd")),)
    seen, _ = step(state, Seen("e"), 51.0)
    assert seen.waiting_for == frozenset()
    assert "e" not in seen.absent


def test_a_restart_goes_on_with_the_round_and_a_full_deadline() -> None:
    fresh = first_round(NAMES, 4, 3, 60.0, 500.0)
    state = resume_round(fresh, 2, {"a": digest("a")}, ["a"], ["e", "gone"])
    assert (state.number, state.phase, state.deadline) == (2, Phase.OPEN, 560.0)
    assert state.absent == {"e"}
    assert push(state, "a", 2, stored=digest("a"))[1] == Answer(ReceiptStatus.DUPLICATE)
    assert resume_round(fresh, 4, {}, [], []).phase is Phase.FINISHED


def test_the_status_line_says_what_the_architecture_promises() -> None:
    names = tuple(f"clinic-{c}" for c in "abcdefgh")
    state = first_round(names, 4, 5, 60.0, 0.0)
    state = replace(state, number=3)
    for name in names:
        if name != "clinic-b":
            state, _ = push(state, name, 3)
    status = describe(state, 19.0)
    assert status.message == "round 3: 7 of 8 uploads, waiting for clinic-b, 41 s left"
    assert status.waiting_for == ("clinic-b",)
    assert status.seconds_left == 41.0


def test_long_lists_of_names_are_shortened() -> None:
    state = first_round([f"c{i:03d}" for i in range(300)], 4, 3, 60.0, 0.0)
    assert "and 290 more" in describe(state, 0.0).message
    assert len(describe(state, 0.0).waiting_for) == 300


events = st.lists(
    st.one_of(
        st.builds(
            lambda c, r, k, s: ("push", c, r, k, s),
            st.sampled_from(NAMES),
            st.integers(1, 4),
            st.integers(0, 1),
            st.booleans(),
        ),
        st.builds(lambda c: ("seen", c), st.sampled_from(NAMES)),
        st.builds(lambda s: ("tick", s), st.floats(0.0, 100.0)),
        st.just(("aggregated",)),
    ),
    max_size=60,
)


@given(events)
@settings(max_examples=300)
def test_laws_in_any_order_of_events(sequence: list[tuple[object, ...]]) -> None:
    state, now = opened(quorum=3, count=3), 0.0
    stored: dict[tuple[str, int], bytes] = {}
    closings: list[int] = []
    for name, *values in sequence:
        before = state
        if name == "push":
            client, number, content, contributes = values
            key = (str(client), int(str(number)))
            event = Pushed(
                key[0], key[1], digest(key[0], int(str(content))), bool(contributes), stored.get(key)
            )
            state, (decision,) = step(state, event, now)
            if decision == Answer(ReceiptStatus.ACCEPTED):
                assert before.phase is Phase.OPEN
                assert key[1] == before.number
                assert key not in stored
                stored[key] = event.content_hash
            else:
                assert state == before
            if decision == Answer(ReceiptStatus.DUPLICATE):
                assert stored[key] == event.content_hash
        elif name == "seen":
            state, _ = step(state, Seen(str(values[0])), now)
        elif name == "tick":
            now += float(str(values[0]))
            state, decisions = step(state, Tick(), now)
            for decision in decisions:
                if isinstance(decision, CloseRound):
                    closings.append(state.number)
                    assert decision.contributors <= state.arrived.keys()
                    reached = len(decision.contributors) >= 3
                    assert reached or state.arrived.keys() == state.members
        elif before.phase is Phase.CLOSED:
            state, _ = step(state, Aggregated(), now)
            assert state.number == before.number + 1
        assert state.number >= before.number
        assert state.contributors <= state.arrived.keys() <= state.members
        assert not state.waiting_for & state.absent
        assert all(stored[client, state.number] == h for client, h in state.arrived.items())
        assert describe(state, now).seconds_left >= 0.0
    assert closings == sorted(set(closings))


def test_a_status_with_the_longest_names_fits_the_wire() -> None:
    names = tuple(f"{'hospital-' * 6}{number:09d}" for number in range(60))
    assert {len(name) for name in names} == {63}
    state = closed(with_uploads(*names[:30], state=opened(names=names)), 60.0)
    state, _ = step(state, Aggregated(), 60.0)
    message = describe(state, 60.0).message
    assert message.startswith("round 2: 0 of 60 uploads, waiting for hospital-")
    assert "and 25 more, quorum is 4, 60 s left, not waited for: hospital-" in message
    assert message.endswith("and 25 more (missed the last round)")
    assert rounds.one_line("x" * 2000) == "x" * (bounds.MAX_TEXT - 1) + "…"


def test_decisions_are_data() -> None:
    assert Answer(ReceiptStatus.LATE) == Answer(ReceiptStatus.LATE)
    with pytest.raises(AttributeError):
        rounds.Tick().number  # type: ignore[attr-defined]  # noqa: B018
