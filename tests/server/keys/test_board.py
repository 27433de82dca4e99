"""The key board: phases, deadlines and who may post when."""

import pytest

from fedmosaic.server.keys.board import (
    BOX,
    CONFIRMATION,
    JOIN,
    OPENING,
    Answer,
    BoardPhase,
    KeyBoard,
    first_epoch,
    from_record,
    to_record,
)

NAMES = ("a", "b", "c", "d", "e")


def opened(names: tuple[str, ...] = NAMES) -> KeyBoard:
    board = first_epoch(0.0, 60.0, 4)
    for name in names:
        board, answer = board.post(name, 1, JOIN, 1.0)
        assert answer is Answer.ACCEPTED
    return board


def test_the_list_closes_when_everybody_has_joined() -> None:
    board = opened()
    assert not board.readable(1, JOIN)
    board = board.advance(NAMES, 2.0)
    assert board.phase is BoardPhase.AGREEING
    assert board.members == NAMES
    assert board.readable(1, JOIN)


def test_a_missing_member_is_left_out_at_the_deadline_and_cannot_slip_in_later() -> None:
    board = opened(("a", "b", "c", "d"))
    assert board.advance(NAMES, 59.0).phase is BoardPhase.JOINING
    board = board.advance(NAMES, 60.0)
    assert board.members == ("a", "b", "c", "d")
    board, answer = board.post("e", 1, JOIN, 61.0)
    assert answer is Answer.CLOSED
    assert "e" not in board.members
    assert board.post("e", 1, CONFIRMATION, 61.0)[1] is Answer.NOT_A_MEMBER


def test_too_few_members_never_close_an_epoch() -> None:
    board = opened(("a", "b", "c"))
    later = board.advance(NAMES, 1000.0)
    assert later.phase is BoardPhase.JOINING
    assert later.deadline == 1060.0


def test_all_confirmations_make_an_epoch_ready() -> None:
    board = opened().advance(NAMES, 2.0)
    assert board.post("a", 1, BOX, 3.0)[1] is Answer.ACCEPTED
    for name in NAMES[:-1]:
        board, _ = board.post(name, 1, CONFIRMATION, 3.0)
    assert board.phase is BoardPhase.AGREEING
    assert board.waiting_for(NAMES) == ("e",)
    assert board.post("a", 1, CONFIRMATION, 3.0)[1] is Answer.REPEATED
    board, _ = board.post("e", 1, CONFIRMATION, 4.0)
    assert board.phase is BoardPhase.READY
    assert board.advance(NAMES, 1e9) == board


def test_an_epoch_that_is_not_confirmed_in_time_is_replaced() -> None:
    board = opened().advance(NAMES, 2.0)
    board, _ = board.post("a", 1, CONFIRMATION, 3.0)
    replaced = board.advance(NAMES, 62.0)
    assert (replaced.epoch, replaced.phase, replaced.members) == (2, BoardPhase.JOINING, ())
    assert replaced.post("a", 1, CONFIRMATION, 63.0)[1] is Answer.REPLACED


def agreed(board: KeyBoard, joining: tuple[str, ...], silent: dict[str, set[str]], now: float) -> KeyBoard:
    """Let all join who may, and post openings and confirmations except those in `silent`."""
    for name in joining:
        board, answer = board.post(name, board.epoch, JOIN, now)
        assert (answer is Answer.EXCLUDED) == (name in board.excluded)
    board = board.advance(joining, now)
    for stage in (OPENING, CONFIRMATION):
        for name in set(board.members) - silent.get(stage, set()):
            board, _ = board.post(name, board.epoch, stage, now)
    return board


def test_who_never_confirms_is_not_in_the_next_epoch_and_may_join_a_later_one() -> None:
    board = agreed(first_epoch(0.0, 60.0, 4), NAMES, {CONFIRMATION: {"e"}}, 1.0)
    assert board.phase is BoardPhase.AGREEING
    board = board.advance(NAMES, 61.0)
    assert (board.epoch, board.excluded) == (2, {"e"})
    assert board.waiting_for(NAMES) == ("a", "b", "c", "d")
    board = from_record(to_record(board), 62.0, 60.0, 4)
    board = agreed(board, NAMES, {}, 63.0)
    assert (board.phase, board.members) == (BoardPhase.READY, ("a", "b", "c", "d"))
    later = agreed(board.next_epoch(70.0), NAMES, {}, 71.0)
    assert (later.phase, later.members) == (BoardPhase.READY, NAMES)


def test_without_an_opening_nobody_can_confirm_and_only_its_sender_is_to_blame() -> None:
    silent = {OPENING: {"b"}, CONFIRMATION: set(NAMES)}
    board = agreed(first_epoch(0.0, 60.0, 4), NAMES, silent, 1.0).advance(NAMES, 61.0)
    assert board.excluded == {"b"}


def test_nobody_is_left_out_of_an_epoch_that_would_have_too_few_members_then() -> None:
    for unconfirmed in (set(NAMES), {"a", "b"}):
        board = agreed(first_epoch(0.0, 60.0, 4), NAMES, {CONFIRMATION: unconfirmed}, 1.0)
        assert board.advance(NAMES, 61.0).excluded == frozenset()


def test_too_few_without_those_left_out_begin_again_with_everybody() -> None:
    board = agreed(first_epoch(0.0, 60.0, 4), NAMES, {CONFIRMATION: {"e"}}, 1.0).advance(NAMES, 61.0)
    for name in ("a", "b", "c"):
        board, _ = board.post(name, 2, JOIN, 62.0)
    board = board.advance(NAMES, 121.0)
    assert (board.epoch, board.joined, board.excluded) == (3, frozenset(), frozenset())
    assert agreed(board, NAMES, {}, 122.0).phase is BoardPhase.READY


@pytest.mark.parametrize("count", [5, 6, 24])
def test_one_member_that_makes_others_look_silent_cannot_spoil_every_epoch(count: int) -> None:
    """As a leader whose boxes open for three others only, or for nobody."""
    names = tuple(f"member-{number:02d}" for number in range(count))
    for spared in (0, 3):
        for cheat in names:
            board, now = first_epoch(0.0, 60.0, 4), 0.0
            for _ in range(40):
                others = [name for name in names if name not in (cheat, *board.excluded)]
                unconfirmed = set() if cheat in board.excluded else set(others[spared:])
                board = agreed(board, names, {CONFIRMATION: unconfirmed}, now)
                if board.phase is BoardPhase.READY:
                    break
                now += 61.0
                board = board.advance(names, now)
            assert board.phase is BoardPhase.READY
            assert len(board.members) >= 4


def test_a_restart_keeps_everything_but_the_clock() -> None:
    board = opened().advance(NAMES, 2.0)
    board, _ = board.post("b", 1, CONFIRMATION, 3.0)
    again = from_record(to_record(board), 500.0, 60.0, 4)
    assert again.deadline == 560.0
    assert (again.epoch, again.phase, again.members) == (board.epoch, board.phase, board.members)
    assert again.confirmations == {"b"}
