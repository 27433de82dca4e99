"""The round as a state machine: scenarios, and laws that hold in any order of events."""

from dataclasses import replace

import hypothesis.strategies as st
from hypothesis import given

from fedmosaic.protos import bounds
from fedmosaic.protos.messages import Phase, ReceiptStatus
from fedmosaic.server.round.state import Rejected, Round, first_round, one_line

NAMES = ("a", "b", "c", "d", "e")


def digest(client: str, content: int = 0) -> bytes:
    return f"{client}{content}".encode().ljust(32, b".")


def push(
    state: Round,
    client: str,
    number: int = 1,
    *,
    content: int = 0,
    stored: bytes | None = None,
    contributes: bool = True,
) -> tuple[Round, ReceiptStatus | Rejected]:
    return state.judged(client, number, digest(client, content), stored, contributes=contributes)


def opened(quorum: int = 4, count: int = 3, names: tuple[str, ...] = NAMES) -> Round:
    return first_round(names, quorum, count, 60.0, 0.0)


def with_uploads(*names: str, state: Round | None = None) -> Round:
    state = state or opened()
    for name in names:
        state, status = push(state, name, state.number)
        assert status is ReceiptStatus.ACCEPTED
    return state


def closed(state: Round, now: float) -> Round:
    state = state.ticked(now)
    assert state.phase is Phase.CLOSED
    return state


def test_a_round_closes_as_soon_as_everybody_has_uploaded() -> None:
    state = with_uploads(*NAMES[:-1])
    assert state.ticked(1.0) == state
    state = closed(with_uploads("e", state=state), 1.0)
    assert state.contributors == frozenset(NAMES)
    assert state.ticked(1e9) == state


def test_a_deadline_closes_a_round_that_has_its_quorum() -> None:
    state = with_uploads("a", "b", "c", "d")
    assert state.ticked(59.9) == state
    assert closed(state, 60.0).contributors == frozenset("abcd")


def test_a_member_that_missed_a_round_is_not_waited_for_until_it_is_seen() -> None:
    state = closed(with_uploads("a", "b", "c", "d"), 60.0).following(60.0)
    assert state.absent == {"e"}
    assert state.waiting_for == set("abcd")
    assert "not waited for: e" in state.status(60.0).message
    without = with_uploads("a", "b", "c", "d", state=state)
    assert closed(without, 61.0).contributors == frozenset("abcd")
    back = without.seen("e")
    assert back.ticked(61.0) == back
    assert back.waiting_for == {"e"}


def test_absent_members_can_still_make_up_a_quorum_that_is_out_of_reach_otherwise() -> None:
    state = with_uploads("a", "b", "c", state=replace(opened(), absent=frozenset("de")))
    assert state.ticked(1.0) == state
    assert state.ticked(60.0).extensions == 1


def test_abstentions_count_as_arrived_but_not_for_the_quorum() -> None:
    state, _ = push(with_uploads("a", "b", "c"), "d", contributes=False)
    assert state.ticked(60.0).extensions == 1
    everybody, _ = push(state, "e", contributes=False)
    assert closed(everybody, 1.0).contributors == frozenset("abc")


def test_the_last_round_finishes_the_run() -> None:
    state = closed(with_uploads(*NAMES, state=opened(count=1)), 1.0).following(1.0)
    assert (state.number, state.phase) == (2, Phase.FINISHED)
    assert state.status(1.0).message == "all 1 rounds are finished"
    assert push(state, "a", 1)[1] is ReceiptStatus.LATE
    assert state.ticked(1e9) == state


def test_only_holders_of_the_key_are_waited_for_and_the_deadline_starts_with_the_key() -> None:
    state = opened().key_agreed(frozenset("abcd"), 50.0)
    assert state.deadline == 110.0
    assert state.waiting_for == set("abcd")
    state = with_uploads("a", "b", "c", "d", state=state)
    assert closed(state, 51.0).contributors == frozenset("abcd")
    seen = state.seen("e")
    assert seen.waiting_for == frozenset()
    assert "e" not in seen.absent


def test_a_restart_goes_on_with_the_round_and_a_full_deadline() -> None:
    fresh = first_round(NAMES, 4, 3, 60.0, 500.0)
    state = fresh.resumed(2, {"a": digest("a")}, ["a"], ["e", "gone"])
    assert (state.number, state.phase, state.deadline) == (2, Phase.OPEN, 560.0)
    assert state.absent == {"e"}
    assert push(state, "a", 2, stored=digest("a"))[1] is ReceiptStatus.DUPLICATE
    assert fresh.resumed(4, {}, [], []).phase is Phase.FINISHED


def test_the_status_line_says_what_the_architecture_promises() -> None:
    names = tuple(f"clinic-{c}" for c in "abcdefgh")
    state = replace(first_round(names, 4, 5, 60.0, 0.0), number=3)
    state = with_uploads(*(name for name in names if name != "clinic-b"), state=state)
    status = state.status(19.0)
    assert status.message == "round 3: 7 of 8 uploads, waiting for clinic-b, 41 s left"
    assert status.waiting_for == ("clinic-b",)
    assert status.seconds_left == 41.0


events = st.lists(
    st.one_of(
        st.tuples(
            st.just("push"), st.sampled_from(NAMES), st.integers(1, 4), st.integers(0, 1), st.booleans()
        ),
        st.tuples(st.just("seen"), st.sampled_from(NAMES)),
        st.tuples(st.just("tick"), st.floats(0.0, 100.0)),
        st.just(("aggregated",)),
    ),
    max_size=60,
)


@given(events)
def test_laws_in_any_order_of_events(sequence: list[tuple[object, ...]]) -> None:
    state, now = opened(quorum=3, count=3), 0.0
    stored: dict[tuple[str, int], bytes] = {}
    closings: list[int] = []
    for event in sequence:
        before = state
        match event:
            case "push", str(client), int(number), int(content), bool(contributes):
                known = stored.get((client, number))
                state, status = push(
                    state, client, number, content=content, stored=known, contributes=contributes
                )
                if status is ReceiptStatus.ACCEPTED:
                    assert (before.phase, before.number, known) == (Phase.OPEN, number, None)
                    stored[client, number] = digest(client, content)
                else:
                    assert state == before
                assert (status is ReceiptStatus.DUPLICATE) == (known == digest(client, content))
            case "seen", str(client):
                state = state.seen(client)
            case "tick", float(seconds):
                now += seconds
                state = state.ticked(now)
                if state.phase is not before.phase:
                    closings.append(state.number)
                    assert len(state.contributors) >= 3 or state.arrived.keys() == state.members
            case _ if before.phase is Phase.CLOSED:
                state = state.following(now)
                assert state.number == before.number + 1
        assert state.number >= before.number
        assert state.contributors <= state.arrived.keys() <= state.members
        assert not state.waiting_for & state.absent
        assert all(stored[client, state.number] == h for client, h in state.arrived.items())
        assert state.status(now).seconds_left >= 0.0
    assert closings == sorted(set(closings))


def test_a_status_with_the_longest_names_fits_the_wire() -> None:
    names = tuple(f"{'hospital-' * 6}{number:09d}" for number in range(60))
    assert {len(name) for name in names} == {63}
    state = closed(with_uploads(*names[:30], state=opened(names=names)), 60.0).following(60.0)
    message = state.status(60.0).message
    assert len(state.status(60.0).waiting_for) == 30, "the list itself is whole"
    assert message.startswith("round 2: 0 of 60 uploads, waiting for hospital-")
    assert "and 25 more, quorum is 4, 60 s left, not waited for: hospital-" in message
    assert message.endswith("and 25 more (missed the last round)")
    assert one_line("x" * 2000) == "x" * (bounds.MAX_TEXT - 1) + "…"


def test_only_those_drawn_take_part_in_a_round() -> None:
    drawn = {1: frozenset("abc"), 2: frozenset("cde"), 3: frozenset("abd"), 4: frozenset("abc")}
    state = first_round(NAMES, 3, 3, 60.0, 0.0, drawn.__getitem__)
    _, answer = push(state, "d")
    assert isinstance(answer, Rejected)
    assert answer.reason == "NOT_DRAWN"
    state = with_uploads("a", "b", state=state)
    assert "2 of 3 uploads" in state.status(0.0).message
    assert state.status(0.0).waiting_for == ("c",)
    state = closed(with_uploads("c", state=state), 1.0).following(1.0)
    assert state.waiting_for == drawn[2]
    # One that is away holds up its own round only until the deadline, and later ones not at all.
    state = with_uploads("c", "d", state=state).ticked(62.0)
    assert state.phase is Phase.OPEN
    assert state.resumed(3, {}, (), ()).waiting_for == drawn[3]
