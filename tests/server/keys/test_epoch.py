"""The key epoch: phases, deadlines and who may post when."""

import pytest

from fedmosaic.server.keys.epoch import (
    BOX,
    CONFIRMATION,
    JOIN,
    OPENING,
    Answer,
    EpochPhase,
    KeyEpoch,
    first_epoch,
    from_record,
    to_record,
)

NAMES = ("a", "b", "c", "d", "e")


def opened(names: tuple[str, ...] = NAMES) -> KeyEpoch:
    epoch = first_epoch(0.0, 60.0, 4)
    for name in names:
        epoch, answer = epoch.post(name, 1, JOIN, 1.0)
        assert answer is Answer.ACCEPTED
    return epoch


def test_all_confirmations_make_an_epoch_ready() -> None:
    epoch = opened().advance(NAMES, 2.0)
    assert epoch.post("a", 1, BOX, 3.0)[1] is Answer.ACCEPTED
    for name in NAMES[:-1]:
        epoch, _ = epoch.post(name, 1, CONFIRMATION, 3.0)
    assert epoch.phase is EpochPhase.AGREEING
    assert epoch.waiting_for(NAMES) == ("e",)
    assert epoch.post("a", 1, CONFIRMATION, 3.0)[1] is Answer.REPEATED
    assert epoch.post("f", 1, CONFIRMATION, 4.0)[1] is Answer.NOT_A_MEMBER
    epoch, _ = epoch.post("e", 1, CONFIRMATION, 4.0)
    assert epoch.phase is EpochPhase.READY
    assert epoch.advance(NAMES, 1e9) == epoch


def agreed(epoch: KeyEpoch, joining: tuple[str, ...], silent: dict[str, set[str]], now: float) -> KeyEpoch:
    """Let all join who may, and post openings and confirmations except those in `silent`."""
    for name in joining:
        epoch, answer = epoch.post(name, epoch.epoch, JOIN, now)
        assert (answer is Answer.EXCLUDED) == (name in epoch.excluded)
    epoch = epoch.advance(joining, now)
    for stage in (OPENING, CONFIRMATION):
        for name in set(epoch.members) - silent.get(stage, set()):
            epoch, _ = epoch.post(name, epoch.epoch, stage, now)
    return epoch


def test_who_never_confirms_is_not_in_the_next_epoch_and_may_join_a_later_one() -> None:
    epoch = agreed(first_epoch(0.0, 60.0, 4), NAMES, {CONFIRMATION: {"e"}}, 1.0)
    assert epoch.phase is EpochPhase.AGREEING
    epoch = epoch.advance(NAMES, 61.0)
    assert (epoch.epoch, epoch.excluded) == (2, frozenset({"e"}))
    assert epoch.waiting_for(NAMES) == ("a", "b", "c", "d")
    epoch = from_record(to_record(epoch), 62.0, 60.0, 4)
    epoch = agreed(epoch, NAMES, {}, 63.0)
    assert (epoch.phase, epoch.members) == (EpochPhase.READY, ("a", "b", "c", "d"))
    later = agreed(epoch.next_epoch(70.0), NAMES, {}, 71.0)
    assert (later.phase, later.members) == (EpochPhase.READY, NAMES)


def test_without_an_opening_nobody_can_confirm_and_only_its_sender_is_to_blame() -> None:
    silent = {OPENING: {"b"}, CONFIRMATION: set(NAMES)}
    epoch = agreed(first_epoch(0.0, 60.0, 4), NAMES, silent, 1.0).advance(NAMES, 61.0)
    assert epoch.excluded == {"b"}


def test_nobody_is_left_out_of_an_epoch_that_would_have_too_few_members_then() -> None:
    for unconfirmed in (set(NAMES), {"a", "b"}):
        epoch = agreed(first_epoch(0.0, 60.0, 4), NAMES, {CONFIRMATION: unconfirmed}, 1.0)
        assert epoch.advance(NAMES, 61.0).excluded == frozenset()


def test_too_few_without_those_left_out_begin_again_with_everybody() -> None:
    epoch = agreed(first_epoch(0.0, 60.0, 4), NAMES, {CONFIRMATION: {"e"}}, 1.0).advance(NAMES, 61.0)
    for name in ("a", "b", "c"):
        epoch, _ = epoch.post(name, 2, JOIN, 62.0)
    epoch = epoch.advance(NAMES, 121.0)
    assert (epoch.epoch, epoch.joined, epoch.excluded) == (3, frozenset(), frozenset())
    assert agreed(epoch, NAMES, {}, 122.0).phase is EpochPhase.READY


def test_who_loses_an_agreement_twice_is_left_out_at_once_and_two_of_them_cannot_take_turns() -> None:
    """Nobody waits for a confirmation that cannot come; before, all waited until the deadline."""
    names = (*NAMES, "f")
    epoch, begun = first_epoch(0.0, 60.0, 4), 0
    for _ in range(20):
        epoch = agreed(epoch, names, {CONFIRMATION: {"a", "b"}}, 1.0)
        losing = sorted({"a", "b"} & set(epoch.members))
        if not losing:
            break
        epoch, answer = epoch.lose(losing[begun % len(losing)], epoch.epoch, 1.0, unused=True)
        assert answer is Answer.ACCEPTED
        begun += 1
    assert (epoch.phase, epoch.members, begun) == (EpochPhase.READY, ("c", "d", "e", "f"), 4)


def test_a_loss_that_would_leave_too_few_keeps_the_list() -> None:
    epoch = agreed(first_epoch(0.0, 60.0, 4), NAMES[:4], {CONFIRMATION: {"a"}}, 60.0)
    for _ in range(2):
        epoch, _ = epoch.lose("a", epoch.epoch, 60.0, unused=True)
        epoch = agreed(epoch, NAMES[:4], {CONFIRMATION: {"a"}}, 120.0)
    assert (epoch.epoch, epoch.phase, epoch.lost) == (2, EpochPhase.AGREEING, frozenset({"a"}))


@pytest.mark.parametrize("count", [5, 6, 24])
def test_one_member_that_makes_others_look_silent_cannot_spoil_every_epoch(count: int) -> None:
    """As a leader whose boxes open for three others only, or for nobody."""
    names = tuple(f"member-{number:02d}" for number in range(count))
    for spared in (0, 3):
        for cheat in names:
            epoch, now = first_epoch(0.0, 60.0, 4), 0.0
            for _ in range(40):
                others = [name for name in names if name not in (cheat, *epoch.excluded)]
                unconfirmed = set() if cheat in epoch.excluded else set(others[spared:])
                epoch = agreed(epoch, names, {CONFIRMATION: unconfirmed}, now)
                if epoch.phase is EpochPhase.READY:
                    break
                now += 61.0
                epoch = epoch.advance(names, now)
            assert epoch.phase is EpochPhase.READY
            assert len(epoch.members) >= 4


def test_a_restart_keeps_everything_but_the_clock() -> None:
    epoch = opened().advance(NAMES, 2.0)
    epoch, _ = epoch.post("b", 1, CONFIRMATION, 3.0)
    again = from_record(to_record(epoch), 500.0, 60.0, 4)
    assert again.deadline == 560.0
    assert (again.epoch, again.phase, again.members) == (epoch.epoch, epoch.phase, epoch.members)
    assert again.confirmations == {"b"}
