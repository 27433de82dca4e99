"""The key epochs behind the coordinator: one epoch per round, nothing before all hold the key."""

import json
from typing import Any

import numpy as np
import pytest

from fedmosaic.privacy.encryption.parameters import MaskParameters
from fedmosaic.privacy.encryption.records import RoundContext, upload_header
from fedmosaic.protos.messages import KeyMessage, ReceiptStatus, Section
from fedmosaic.protos.refusal import Refusal


def refused(reason: str) -> Any:
    return pytest.raises(Refusal, check=lambda error: error.reason == reason)


ENCRYPTED = {
    "encryption": MaskParameters(),
    "schedule": {"gathering_seconds": 30.0, "rotate_key_every": 2, "rounds": 4},
}


@pytest.fixture
def coordinator(begin: Any) -> Any:
    return begin(**ENCRYPTED)


def post(coordinator: Any, sender: str, stage: str, epoch: int = 1, to: str = "", text: bytes = b"x") -> None:
    coordinator.post_key_message(sender, KeyMessage(epoch, stage, to, text))


def post_all(coordinator: Any, members: tuple[str, ...], stage: str, epoch: int = 1) -> None:
    for member in members:
        post(coordinator, member, stage, epoch)


def agree(coordinator: Any, members: tuple[str, ...], epoch: int = 1) -> None:
    post_all(coordinator, members, "join", epoch)
    coordinator.advance()
    leader = members[0]
    post_all(coordinator, members, "opening", epoch)
    for member in members[1:]:
        post(coordinator, leader, "box", epoch, member, f"for {member}".encode())
    post_all(coordinator, members, "confirmation", epoch)


def upload(federation: Any, coordinator: Any, client: str, number: int, epoch: int) -> Any:
    context = RoundContext("fed", epoch, number, "shared", federation.dimensions)
    words = np.random.default_rng(1).integers(0, 2**32, federation.dimensions, dtype=np.uint32)
    nonce = client.encode().ljust(16)[:16]
    record = upload_header(MaskParameters(), context, client).encode(nonce) + words.astype("<u4").tobytes()
    return federation.upload(
        coordinator.run_id, client, number, key_epoch=epoch, sections=(Section("shared", record),)
    )


def push(federation: Any, coordinator: Any, number: int, epoch: int, members: tuple[str, ...] = ()) -> None:
    """Enrol and push."""
    for client in members or federation.clients:
        coordinator.enrol(client, federation.enrolment())
        coordinator.push(client, upload(federation, coordinator, client, number, epoch))


def test_uploads_wait_for_the_key_and_the_deadline_waits_too(
    federation: Any, coordinator: Any, clock: Any
) -> None:
    with refused("KEY_NOT_AGREED"):
        coordinator.push("clinic-a", upload(federation, coordinator, "clinic-a", 1, 1))
    status = coordinator.status("clinic-a")
    assert "agreeing on the group key of epoch 1" in status.message
    assert status.waiting_for == federation.clients
    clock.now += 29
    agree(coordinator, federation.clients)
    clock.now += 40  # past what would have been the round's deadline
    assert not coordinator.advance()
    assert coordinator.status("clinic-a").seconds_left == 20.0
    receipt = coordinator.push("clinic-a", upload(federation, coordinator, "clinic-a", 1, 1))
    assert receipt.status is ReceiptStatus.ACCEPTED


def test_boxes_reach_the_one_they_are_for(federation: Any, coordinator: Any) -> None:
    agree(coordinator, federation.clients)
    assert coordinator.read_key_messages("clinic-c", 1, "box") == {"clinic-a": b"for clinic-c"}
    assert coordinator.read_key_messages("clinic-a", 1, "box") == {}
    assert set(coordinator.read_key_messages("clinic-b", 1, "confirmation")) == set(federation.clients)


def test_repeats_are_harmless_and_changes_are_refused(federation: Any, coordinator: Any) -> None:
    post(coordinator, "clinic-a", "join")
    post(coordinator, "clinic-a", "join")
    with refused("KEY_MESSAGE_DIFFERS"):
        post(coordinator, "clinic-a", "join", text=b"y")
    assert coordinator._run.store.key_messages(1, "join", "clinic-b") == {"clinic-a": b"x"}


def test_messages_out_of_place_are_refused(federation: Any, coordinator: Any) -> None:
    for stage, to, epoch, reason in (
        ("confirmation", "", 1, "NOT_IN_KEY_EPOCH"),
        ("opening", "", 2, "KEY_EPOCH_REPLACED"),
        ("gossip", "", 1, "UNKNOWN_STAGE"),
        ("join", "clinic-b", 1, "WRONG_RECIPIENT"),
        ("box", "", 1, "WRONG_RECIPIENT"),
        ("box", "clinic-b", 1, "NOT_IN_KEY_EPOCH"),
    ):
        with refused(reason):
            post(coordinator, "clinic-a", stage, epoch, to)
    for stage, epoch, reason in (("join", 0, "KEY_EPOCH_REPLACED"), ("x\n" * 99, 1, "UNKNOWN_STAGE")):
        with refused(reason):
            coordinator.read_key_messages("clinic-a", epoch, stage)


def test_a_member_that_does_not_join_is_left_out_and_gets_in_with_the_next_round(
    federation: Any, coordinator: Any, clock: Any
) -> None:
    four = federation.clients[:4]
    post_all(coordinator, four, "join")
    clock.now += 30
    coordinator.advance()
    for member in four:
        post(coordinator, member, "opening")
        post(coordinator, member, "confirmation")
    with refused("KEY_EPOCH_CLOSED"):
        post(coordinator, "clinic-e", "join")
    coordinator.enrol("clinic-e", federation.enrolment())
    push(federation, coordinator, 1, 1, four)
    # Nobody waits for a member that cannot encrypt.
    assert coordinator.advance()
    assert coordinator.status("clinic-a").round == 2
    assert coordinator.pull("clinic-a", 2).upload_key_epoch == 2
    assert coordinator.pull("clinic-a", 2).key_epoch == 1
    with refused("KEY_EPOCH_REPLACED"):
        coordinator.push("clinic-a", upload(federation, coordinator, "clinic-a", 2, 1))
    agree(coordinator, federation.clients, epoch=2)
    push(federation, coordinator, 2, 2)
    coordinator.advance()
    assert len(coordinator.pull("clinic-e", 3).sections[0].row.contributors) == 4


def test_a_member_that_never_confirms_costs_one_epoch(federation: Any, coordinator: Any, clock: Any) -> None:
    four, silent = federation.clients[:4], federation.clients[4]
    for member in federation.clients:
        coordinator.enrol(member, federation.enrolment())
        post(coordinator, member, "join")
    coordinator.advance()
    post_all(coordinator, federation.clients, "opening")
    post_all(coordinator, four, "confirmation")
    clock.now += 30
    coordinator.advance()
    with refused("KEY_EPOCH_CLOSED"):
        post(coordinator, silent, "join", 2)
    agree(coordinator, four, epoch=2)
    push(federation, coordinator, 1, 2, four)
    coordinator.enrol(silent, federation.enrolment())
    assert coordinator.advance()
    assert coordinator.status("clinic-a").round == 2
    assert coordinator.pull(silent, 2).upload_key_epoch == 3
    agree(coordinator, federation.clients, epoch=3)
    push(federation, coordinator, 2, 3)
    assert coordinator.advance()


def test_no_epoch_has_fewer_members_than_clients_accept(federation: Any, begin: Any, clock: Any) -> None:
    coordinator = begin(**ENCRYPTED, policy={"minimum_contributors": 2})
    post_all(coordinator, federation.clients[:3], "join")
    clock.now += 30
    coordinator.advance()
    assert coordinator.read_key_messages("clinic-a", 1, "join") == {}
    post(coordinator, "clinic-d", "join")
    clock.now += 30
    coordinator.advance()
    assert len(coordinator.read_key_messages("clinic-a", 1, "join")) == 4


def test_the_key_epoch_survives_a_kill(federation: Any, begin: Any) -> None:
    before = begin(**ENCRYPTED)
    agree(before, federation.clients)
    before.push("clinic-a", upload(federation, before, "clinic-a", 1, 1))
    federation.crash(before)
    after = begin(**ENCRYPTED)
    assert set(after.read_key_messages("clinic-a", 1, "confirmation")) == set(federation.clients)
    for client in federation.clients[1:]:
        assert after.push(client, upload(federation, after, client, 1, 1)).status is ReceiptStatus.ACCEPTED
    assert after.advance()


def test_a_changed_roster_changes_the_key_at_once(federation: Any, begin: Any) -> None:
    before = begin(**ENCRYPTED)
    agree(before, federation.clients)
    before.close()
    after = begin(**ENCRYPTED, serial=2)
    assert after.pull("clinic-a", 1).upload_key_epoch == 2
    with refused("KEY_EPOCH_REPLACED"):
        after.push("clinic-a", upload(federation, after, "clinic-a", 1, 1))
    after.close()
    again = begin(**ENCRYPTED, serial=2)
    assert again.pull("clinic-a", 1).upload_key_epoch == 2, "once is enough"


def test_under_a_changed_roster_a_round_closes_with_the_uploads_it_has(federation: Any, begin: Any) -> None:
    before = begin(**ENCRYPTED)
    agree(before, federation.clients)
    for client in federation.clients:
        before.enrol(client, federation.enrolment())
    before.push("clinic-a", upload(federation, before, "clinic-a", 1, 1))
    before.close()
    begin(**ENCRYPTED, serial=2).close()
    after = begin(**ENCRYPTED, serial=2)
    assert after.advance(), "killed before it closed the round, it does so now"
    with refused("ROSTER_CHANGED"):
        after.pull("clinic-b", 2)
    for client in federation.clients:
        after.enrol(client, federation.enrolment())
    answer = after.pull("clinic-b", 2)
    assert answer.upload_key_epoch == 2
    assert "1 contributors other than the recipient" in answer.sections[0].refusal
    agree(after, federation.clients, 2)
    for client in federation.clients:
        after.push(client, upload(federation, after, client, 2, 2))
    assert after.advance()
    assert after.pull("clinic-a", 3).sections[0].row is not None


def test_a_plain_run_has_no_key_epoch(begin: Any) -> None:
    with refused("NOTHING_ENCRYPTED"):
        post(begin(), "clinic-a", "join")


class Killed(BaseException):
    """Stands for the end of the process."""


def killed(*_: object, **__: object) -> None:
    raise Killed


def test_a_kill_after_the_commit_that_closes_a_round_leaves_the_key_epoch_that_is_due(
    federation: Any, begin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = begin(**ENCRYPTED)
    agree(before, federation.clients)
    push(federation, before, 1, 1)
    before.advance()
    monkeypatch.setattr(before._run.keys, "adopt", killed)
    push(federation, before, 2, 1)
    with pytest.raises(Killed):
        before.advance()
    federation.crash(before)
    after = begin(**ENCRYPTED)
    assert after.status("clinic-a").round == 3
    assert after.enrol("clinic-a", federation.enrolment()).key_epoch == 2
    agree(after, federation.clients, 2)
    push(federation, after, 3, 2)
    after.advance()
    assert after.status("clinic-a").round == 4


def test_a_round_that_an_older_server_left_without_its_key_epoch_gets_it(federation: Any, begin: Any) -> None:
    before = begin(**ENCRYPTED)
    agree(before, federation.clients)
    push(federation, before, 1, 1)
    before.advance()
    board = json.loads(before._run.store.get("key_board") or "")
    push(federation, before, 2, 1)
    before.advance()
    del board["first_round"]  # it was not stored then
    before._run.store.put({"key_board": json.dumps(board)})
    federation.crash(before)
    after = begin(**ENCRYPTED)
    assert after.enrol("clinic-a", federation.enrolment()).key_epoch == 2


def test_a_member_that_lost_its_key_is_not_waited_for_and_has_one_in_the_next_round(
    federation: Any, coordinator: Any
) -> None:
    agree(coordinator, federation.clients)
    push(federation, coordinator, 1, 1, federation.clients[:-1])
    coordinator.enrol("clinic-e", federation.enrolment())
    assert not coordinator.advance()
    post(coordinator, "clinic-e", "lost")
    post(coordinator, "clinic-e", "lost")  # said twice, it is still one
    assert coordinator.advance(), "nobody else is waited for"
    assert coordinator.status("clinic-a").round == 2
    assert coordinator.enrol("clinic-e", federation.enrolment()).key_epoch == 2
    assert coordinator.status("clinic-a").waiting_for == federation.clients


def test_before_anything_is_encrypted_a_lost_key_begins_a_new_epoch_once_for_each_member(
    federation: Any, coordinator: Any
) -> None:
    agree(coordinator, federation.clients)
    post(coordinator, "clinic-e", "lost")
    agree(coordinator, federation.clients, 2)
    post(coordinator, "clinic-d", "lost", 2)
    agree(coordinator, federation.clients, 3)
    # Nobody can keep the others agreeing: the second time in a round they go on without it.
    post(coordinator, "clinic-e", "lost", 3)
    assert coordinator.enrol("clinic-a", federation.enrolment()).key_epoch == 3
    assert coordinator.status("clinic-a").waiting_for == federation.clients[:-1]


@pytest.mark.parametrize("posted", [0, 1, 5])
def test_an_agreement_that_a_member_lost_begins_again_at_once(
    federation: Any, coordinator: Any, posted: int
) -> None:
    post_all(coordinator, federation.clients[: max(1, posted)], "join")
    coordinator.advance()
    post(coordinator, "clinic-a", "lost")
    assert coordinator.enrol("clinic-a", federation.enrolment()).key_epoch == 2
    agree(coordinator, federation.clients, 2)
    assert "agreeing" not in coordinator.status("clinic-a").message


CROWD = tuple(f"m{number:02d}" for number in range(60))
ROUNDS = 12


@pytest.fixture
def crowd(make_federation: Any, begin: Any) -> Any:
    """Sixty members of whom eight are drawn for each round, and their server, begun or gone on with."""
    federation = make_federation(clients=CROWD)
    schedule = {"gathering_seconds": 30.0, "rounds": ROUNDS, "sampled_clients": 8, "quorum": 4}
    terms = {"encryption": MaskParameters(), "schedule": {**schedule, "round_deadline_seconds": 60.0}}
    return federation, lambda: begin(federation, **terms)


def play_sampled(federation: Any, coordinator: Any, number: int, *away: str) -> None:
    """A round of all who are drawn for it, but for those away."""
    epoch, here = coordinator._run.keys.epoch, coordinator.taking_part(number) - set(away)
    push(federation, coordinator, number, epoch, tuple(here))


def test_all_members_agree_on_the_key_and_only_those_drawn_are_waited_for(crowd: Any) -> None:
    federation, begin = crowd
    coordinator = begin()
    ahead = set().union(*(coordinator.taking_part(number) for number in range(1, ROUNDS + 1)))
    assert set(coordinator.status("m00").waiting_for) == ahead, "of those who are never drawn it needs none"
    assert len(ahead) > 40
    agree(coordinator, CROWD)
    for number in range(1, ROUNDS + 1):
        drawn = coordinator.taking_part(number)
        assert set(coordinator.status("m00").waiting_for) == drawn
        (idle, *_) = sorted(set(CROWD) - drawn)
        with refused("NOT_DRAWN"):
            coordinator.push(idle, upload(federation, coordinator, idle, number, 1))
        play_sampled(federation, coordinator, number)
        assert coordinator.advance()
    results = coordinator.summary()["results"]
    assert {result["key_epoch"] for result in results} == {1}
    for result in results[:-1]:
        assert set(result["received"]) == coordinator.taking_part(result["round"] + 1)


def test_who_missed_the_agreement_gets_a_key_for_its_next_turn_and_not_before(crowd: Any, clock: Any) -> None:
    federation, begin = crowd
    coordinator = begin()
    turn = {name: next(n for n in range(1, 99) if name in coordinator.taking_part(n)) for name in CROWD}
    late = max((n for n in CROWD if turn[n] < ROUNDS), key=turn.__getitem__)
    others = tuple(name for name in CROWD if name != late)
    post_all(coordinator, others, "join")
    clock.now += 30
    agree(coordinator, others)
    coordinator.enrol(late, federation.enrolment())
    number, soon = 1, turn[late] - 1
    while number < soon:
        play_sampled(federation, coordinator, number, late)
        coordinator.advance()
        number += 1
        assert coordinator._run.keys.epoch == 1 + (number == soon)
    waiting = set(coordinator.status(late).waiting_for)
    assert late in waiting
    assert waiting > coordinator.taking_part(number)


@pytest.mark.parametrize("holds_key", [False, True])
def test_who_is_away_for_good_costs_one_wait_and_no_key_epoch(
    crowd: Any, clock: Any, holds_key: bool
) -> None:
    federation, begin = crowd
    coordinator = begin()
    gone = sorted(coordinator.taking_part(2))[0]
    coordinator.enrol(gone, federation.enrolment())
    there = tuple(name for name in CROWD if holds_key or name != gone)
    post_all(coordinator, there, "join")
    clock.now += 30
    agree(coordinator, there)
    waits = 0
    for number in range(1, ROUNDS + 1):
        play_sampled(federation, coordinator, number, gone)
        if not coordinator.advance():
            assert coordinator.status("m00").waiting_for == (gone,)
            clock.now += 60
            assert coordinator.advance()
            waits += 1
    assert (waits, coordinator._run.keys.epoch) == (int(holds_key), 1)


def test_a_key_that_is_lost_is_agreed_on_anew_only_for_whoever_needs_it(crowd: Any) -> None:
    federation, begin = crowd
    coordinator = begin()
    agree(coordinator, CROWD)
    soon = coordinator.taking_part(1) | coordinator.taking_part(2)
    (idle, *_), (drawn, *_) = sorted(set(CROWD) - soon), sorted(soon)
    post(coordinator, idle, "lost")
    assert coordinator.enrol(idle, federation.enrolment()).key_epoch == 1
    assert set(coordinator.status(idle).waiting_for) == coordinator.taking_part(1)
    post(coordinator, drawn, "lost")
    assert coordinator.enrol(drawn, federation.enrolment()).key_epoch == 2


def test_a_killed_server_waits_for_those_who_were_drawn_and_hold_the_key(crowd: Any, clock: Any) -> None:
    federation, begin = crowd
    before = begin()
    drawn = before.taking_part(1)
    keyless, first, *_ = sorted(drawn)
    holders = tuple(name for name in CROWD if name != keyless)
    post_all(before, holders, "join")
    clock.now += 30
    agree(before, holders)
    before.push(first, upload(federation, before, first, 1, 1))
    federation.crash(before)
    after = begin()
    assert set(after.status("m00").waiting_for) == drawn - {keyless, first}
    play_sampled(federation, after, 1, keyless, first)
    assert after.advance()


def test_a_round_of_members_without_the_key_passes_at_its_deadline(crowd: Any, clock: Any) -> None:
    """Not before, or a run would be over before anybody is back; and not never."""
    _, begin = crowd
    coordinator = begin()
    holders = tuple(sorted(set(CROWD) - coordinator.taking_part(1)))[:4]
    post_all(coordinator, holders, "join")
    clock.now += 30
    agree(coordinator, holders)
    for seconds, opened in ((0, 1), (59, 1), (1, 2)):
        clock.now += seconds
        coordinator.advance()
        assert coordinator.available_round == opened
