"""The key board: phases, deadlines and who may post when."""

from fedmosaic.server.key_board import (
    BOX,
    CONFIRMATION,
    JOIN,
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


def test_a_restart_keeps_everything_but_the_clock() -> None:
    board = opened().advance(NAMES, 2.0)
    board, _ = board.post("b", 1, CONFIRMATION, 3.0)
    again = from_record(to_record(board), 500.0, 60.0, 4)
    assert again.deadline == 560.0
    assert (again.epoch, again.phase, again.members) == (board.epoch, board.phase, board.members)
    assert again.confirmations == {"b"}
