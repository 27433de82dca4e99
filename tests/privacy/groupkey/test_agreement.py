"""The key agreement: one key for exactly the pinned members, and a named refusal for every attack."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmosaic.privacy.groupkey import messages
from fedmosaic.privacy.groupkey.agreement import KeyAgreement, check_confirmations, plan_epoch
from fedmosaic.privacy.groupkey.key import GroupKey, commitment_to
from fedmosaic.protos.errors import KeyAgreementError

ROSTER = tuple(f"clinic-{letter}" for letter in "abcdef")
IDENTITIES = {name: Ed25519PrivateKey.generate() for name in (*ROSTER, "mallory")}
KEYS = {name: IDENTITIES[name].public_key().public_bytes_raw() for name in ROSTER}
MEMBERS = ROSTER[:5]
SECRET = bytes(range(256)) * 4
ROSTER_HASH, PARAMETERS_HASH = b"R" * 32, b"P" * 32


def plan(number: int = 1, members: tuple[str, ...] = MEMBERS, **changes: bytes) -> messages.Epoch:
    hashes = {"roster_hash": ROSTER_HASH, "parameters_hash": PARAMETERS_HASH} | changes
    return plan_epoch("federation", number, members, KEYS, **hashes)


class Exchange:
    """All members of one epoch and an honest server, step by step."""

    def __init__(
        self, epoch: messages.Epoch | None = None, members: tuple[str, ...] = MEMBERS, secret: bytes = SECRET
    ) -> None:
        epoch = epoch or plan(members=members)
        self.sides = {
            name: KeyAgreement(IDENTITIES[name], name, epoch, lambda: secret, len(secret)) for name in members
        }

    def openings(self) -> dict[str, bytes]:
        return {name: side.opening() for name, side in self.sides.items()}

    def open(self) -> dict[str, bytes]:
        """Let everybody accept the openings; return the leader's boxes."""
        openings = self.openings()
        boxes = [
            boxes for side in self.sides.values() if (boxes := side.accept_openings(openings)) is not None
        ]
        assert len(boxes) == 1
        return boxes[0]

    @property
    def leader(self) -> str:
        leader = next(iter(self.sides.values())).leader
        assert leader is not None
        return leader

    @property
    def followers(self) -> list[str]:
        return [name for name in self.sides if name != self.leader]

    def share(self) -> None:
        for name, box in self.open().items():
            self.sides[name].accept_box(box)

    def confirmations(self) -> dict[str, bytes]:
        return {name: side.confirmation() for name, side in self.sides.items()}

    def check(self, name: str, confirmations: dict[str, bytes]) -> GroupKey:
        side = self.sides[name]
        check_confirmations(side.epoch, side.unconfirmed(), confirmations)
        return side.unconfirmed()

    def finish(self) -> dict[str, GroupKey]:
        confirmations = self.confirmations()
        return {name: self.check(name, confirmations) for name in self.sides}


@pytest.mark.parametrize("count", [4, 5, 6])
@pytest.mark.parametrize("secret", [SECRET, b""])
def test_all_members_end_with_the_same_key(count: int, secret: bytes) -> None:
    exchange = Exchange(members=ROSTER[:count], secret=secret)
    exchange.share()
    keys = exchange.finish()
    assert len({(key.master, key.ckks_secret, key.fingerprint, key.transcript) for key in keys.values()}) == 1
    key = next(iter(keys.values()))
    assert key.members == ROSTER[:count]
    assert (key.federation, key.epoch, key.parameters_hash) == ("federation", 1, PARAMETERS_HASH)
    assert key.ckks_secret == secret
    assert len(key.master) == 32
    assert key.fingerprint == commitment_to(key.transcript, key.master, key.ckks_secret)


def test_messages_have_fixed_lengths_and_hold_no_secret() -> None:
    exchange = Exchange()
    boxes = exchange.open()
    assert {len(opening) for opening in exchange.openings().values()} == {messages.OPENING_BYTES}
    assert len({len(box) for box in boxes.values()}) == 1
    assert set(boxes) == set(exchange.followers)
    for name, box in boxes.items():
        exchange.sides[name].accept_box(box)
    assert {len(c) for c in exchange.confirmations().values()} == {messages.CONFIRMATION_BYTES}
    traffic = b"".join([*exchange.openings().values(), *boxes.values(), *exchange.confirmations().values()])
    key = exchange.finish()[MEMBERS[0]]
    assert key.master not in traffic
    assert SECRET[:32] not in traffic


def test_epochs_have_unrelated_keys_and_changing_leaders() -> None:
    leaders, masters = set(), set()
    for number in range(12):
        exchange = Exchange(plan(number))
        exchange.share()
        leaders.add(exchange.leader)
        masters.add(exchange.finish()[MEMBERS[0]].master)
    assert len(masters) == 12
    assert len(leaders) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": ROSTER[:3]}, "at least 4 are required"),
        ({"members": (*ROSTER[:4], "mallory")}, "outside the pinned roster: mallory"),
        ({"members": (*ROSTER[:4], ROSTER[0])}, "names one twice"),
        ({"members": ()}, "0 members take part"),
        ({"number": -1}, "epoch is -1"),
        ({"roster_hash": b"short"}, "32 bytes"),
    ],
)
def test_plans_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(KeyAgreementError, match=message):
        plan(**changes)


def test_an_identity_that_the_roster_does_not_pin_cannot_start() -> None:
    with pytest.raises(KeyAgreementError, match="pins another identity key"):
        KeyAgreement(IDENTITIES["mallory"], MEMBERS[0], plan(), lambda: SECRET, len(SECRET))
    with pytest.raises(KeyAgreementError, match="does not take part"):
        KeyAgreement(IDENTITIES[ROSTER[5]], ROSTER[5], plan(), lambda: SECRET, len(SECRET))


def opening_of(
    name: str, epoch: messages.Epoch, signer: str | None = None, public_key: bytes | None = None
) -> bytes:
    fresh = Ed25519PrivateKey.generate().public_key().public_bytes_raw()  # any 32 bytes that look like a key
    return messages.write_opening(epoch, name, public_key or fresh, IDENTITIES[signer or name])


VICTIM, OTHER = MEMBERS[0], MEMBERS[1]

Tamper = Callable[[dict[str, bytes]], dict[str, bytes]]


def other(**changes: Any) -> Tamper:
    """The opening of `OTHER` as of another epoch than the one that is planned."""
    epoch = replace(plan(), federation="x") if "federation" in changes else plan(**changes)
    return lambda o: o | {OTHER: opening_of(OTHER, epoch)}


OPENING_ATTACKS: dict[str, tuple[Tamper, str]] = {
    "drop": (lambda o: {n: m for n, m in o.items() if n != OTHER}, f"missing: {OTHER}"),
    "add a stranger": (lambda o: o | {"mallory": o[OTHER]}, "outside the agreed list of members: mallory"),
    "add a pinned member": (
        lambda o: o | {ROSTER[5]: opening_of(ROSTER[5], plan(members=ROSTER))},
        f"outside the agreed list of members: {ROSTER[5]}",
    ),
    "swap the key": (
        lambda o: o | {OTHER: opening_of(OTHER, plan(), signer="mallory")},
        f"opening of '{OTHER}' is not signed by the identity key",
    ),
    "exchange two members": (
        lambda o: o | {OTHER: o[MEMBERS[2]], MEMBERS[2]: o[OTHER]},
        f"opening of '{OTHER}' is not signed",
    ),
    "own opening replaced": (
        lambda o: o | {VICTIM: opening_of(VICTIM, plan())},
        "is not the one this member",
    ),
    "replay an epoch": (other(number=0), "is of epoch 0, expected 1: it was replayed"),
    "other list of members": (other(members=ROSTER), "for another roster or list of members"),
    "other roster": (other(roster_hash=b"Q" * 32), "for another roster or list of members"),
    "other parameters": (other(parameters_hash=b"Q" * 32), "for another set of encryption parameters"),
    "other federation": (other(federation="x"), "for another federation"),
    "cut short": (
        lambda o: o | {OTHER: o[OTHER][:-1]},
        f"{messages.OPENING_BYTES - 1} bytes, expected {messages.OPENING_BYTES}",
    ),
    "empty": (lambda o: o | {OTHER: b""}, "has 0 bytes"),
    "copied ephemeral key": (
        lambda o: o | {OTHER: opening_of(OTHER, plan(), public_key=o[MEMBERS[2]][-96:-64])},
        "the same ephemeral key",
    ),
}


@pytest.mark.parametrize("attack", OPENING_ATTACKS)
def test_every_attack_on_openings_is_refused_by_name(attack: str) -> None:
    exchange = Exchange()
    tamper, message = OPENING_ATTACKS[attack]
    side = exchange.sides[VICTIM]
    with pytest.raises(KeyAgreementError, match=message):
        side.accept_openings(tamper(exchange.openings()))
    # Once refused, the epoch is over for this member, even with good messages.
    with pytest.raises(KeyAgreementError, match="next is a new epoch"):
        side.accept_openings(exchange.openings())
    with pytest.raises(KeyAgreementError, match="holds no key"):
        side.confirmation()


@settings(max_examples=40)
@given(position=st.integers(0, messages.OPENING_BYTES - 1), flip=st.integers(1, 255))
def test_any_altered_byte_of_an_opening_is_refused(position: int, flip: int) -> None:
    exchange = Exchange()
    openings = exchange.openings()
    altered = bytearray(openings[OTHER])
    altered[position] ^= flip
    with pytest.raises(KeyAgreementError, match="is not signed by the identity key"):
        exchange.sides[VICTIM].accept_openings(openings | {OTHER: bytes(altered)})


def test_members_shown_different_openings_do_not_share_a_key() -> None:
    """The server plays two fresh openings of one member to two halves: their transcripts differ."""
    exchange = Exchange()
    openings = exchange.openings()
    twin = opening_of(MEMBERS[4], plan())
    for name in MEMBERS[:2]:
        exchange.sides[name].accept_openings(openings)
    for name in MEMBERS[2:4]:
        exchange.sides[name].accept_openings(openings | {MEMBERS[4]: twin})
    for first, second in ((0, 2), (2, 0)):
        receiver, sender = exchange.sides[MEMBERS[first]], exchange.sides[MEMBERS[second]]
        assert receiver._transcript != sender._transcript
    with pytest.raises(KeyAgreementError, match="is not the one this member sent"):
        exchange.sides[MEMBERS[4]].accept_openings(openings | {MEMBERS[4]: twin})


@pytest.mark.parametrize("point", [bytes(32), b"\1" + bytes(31)])
def test_a_point_of_small_order_is_refused_by_everybody(point: bytes) -> None:
    exchange = Exchange()
    openings = exchange.openings() | {OTHER: opening_of(OTHER, plan(), public_key=point)}
    for name in MEMBERS:
        if name != OTHER:
            with pytest.raises(KeyAgreementError, match=f"'{OTHER}' is a point of small order"):
                exchange.sides[name].accept_openings(openings)


BoxTamper = Callable[[Exchange, dict[str, bytes], str], bytes]


def box_attack(tamper: BoxTamper, message: str) -> None:
    exchange = Exchange()
    boxes = exchange.open()
    victim = exchange.followers[0]
    side = exchange.sides[victim]
    with pytest.raises(KeyAgreementError, match=message):
        side.accept_box(tamper(exchange, boxes, victim))
    with pytest.raises(KeyAgreementError, match="next is a new epoch"):
        side.accept_box(boxes[victim])


def resign(exchange: Exchange, body: bytes, signer: str = "") -> bytes:
    """What a dishonest leader can do: alter a box and sign it again."""
    return body + IDENTITIES[signer or exchange.leader].sign(b"fedmosaic/key-agreement/v1\n" + body)


def of_another_exchange(exchange: Exchange, boxes: dict[str, bytes], victim: str) -> bytes:
    while True:
        again = Exchange()
        replayed = again.open()
        if again.leader == exchange.leader:
            return replayed[victim]


def other_commitment(exchange: Exchange, boxes: dict[str, bytes], victim: str) -> bytes:
    body = bytearray(boxes[victim][:-64])
    body[8 + 32 + 32] ^= 1  # first byte of the commitment
    return resign(exchange, bytes(body))


def sealed_other_key(exchange: Exchange, boxes: dict[str, bytes], victim: str) -> bytes:
    """The commitment of the true key around the content of another one."""
    leader = exchange.sides[exchange.leader]
    key = leader._key
    assert key is not None
    leader._key = replace(key, master=b"Z" * 32)
    box = leader._sealed(victim, exchange.openings()[victim][-96:-64])
    leader._key = key
    return box


BOX_ATTACKS: dict[str, tuple[BoxTamper, str]] = {
    "for someone else": (lambda e, boxes, _: boxes[e.followers[1]], "for another member"),
    "of another exchange": (of_another_exchange, "for another set of openings"),
    "of someone who does not lead": (
        lambda e, boxes, victim: resign(e, boxes[victim][:-64], e.followers[1]),
        "is not signed by the identity key",
    ),
    "cut short": (lambda _, boxes, victim: boxes[victim][:-1], "bytes, expected"),
    "too long": (lambda _, boxes, victim: boxes[victim] + b"x", "bytes, expected"),
    "empty": (lambda *_: b"", "has 0 bytes"),
    # The commitment is bound into the sealing, so the box does not even open.
    "another commitment": (other_commitment, "does not open"),
    "another key than committed to": (sealed_other_key, "sealed another key than it committed to"),
    "an encapsulated key of small order": (
        lambda e, boxes, victim: resign(e, boxes[victim][:104] + bytes(32) + boxes[victim][136:-64]),
        "does not open",
    ),
}


@pytest.mark.parametrize("attack", BOX_ATTACKS)
def test_every_attack_on_boxes_is_refused_by_name(attack: str) -> None:
    box_attack(*BOX_ATTACKS[attack])


@settings(max_examples=30)
@given(position=st.integers(0, 2000), flip=st.integers(1, 255))
def test_any_altered_byte_of_a_box_is_refused(position: int, flip: int) -> None:
    def altered(_: Exchange, boxes: dict[str, bytes], victim: str) -> bytes:
        content = bytearray(boxes[victim])
        content[position % len(content)] ^= flip
        return bytes(content)

    box_attack(altered, "is not signed by the identity key")


@pytest.mark.parametrize("part", ["recipient", "epoch", "leader", "transcript"])
def test_a_box_sealed_for_another_exchange_does_not_open(part: str) -> None:
    """The leader signs it as if it were for the victim: only what HPKE binds tells."""

    def misdirected(exchange: Exchange, boxes: dict[str, bytes], victim: str) -> bytes:
        leader = exchange.sides[exchange.leader]
        recipient_key = exchange.openings()[victim][-96:-64]
        changes: dict[str, dict[str, object]] = {
            "recipient": {},
            "epoch": {"epoch": replace(leader.epoch, number=2)},
            "leader": {"leader": victim},
            "transcript": {"_transcript": b"T" * 32},
        }
        before = dict(vars(leader))
        vars(leader).update(changes[part])
        sealed = leader._sealed(exchange.followers[1] if part == "recipient" else victim, recipient_key)
        vars(leader).update(before)
        return resign(exchange, boxes[victim][:104] + sealed[104:-64])

    box_attack(misdirected, "does not open")


def test_a_leader_that_hands_out_different_keys_is_found_out() -> None:
    exchange = Exchange()
    boxes = exchange.open()
    leader = exchange.sides[exchange.leader]
    deceived = exchange.followers[0]
    openings = exchange.openings()
    true_key = leader._key
    leader._key = leader._new_key(b"Z" * 32, SECRET)
    boxes[deceived] = leader._sealed(deceived, openings[deceived][-96:-64])
    leader._key = true_key
    for name, box in boxes.items():
        exchange.sides[name].accept_box(box)
    confirmations = exchange.confirmations()
    for name in (deceived, exchange.followers[1]):
        with pytest.raises(KeyAgreementError, match="handed out different keys"):
            exchange.check(name, confirmations)


def test_members_that_hold_no_key_cannot_confirm() -> None:
    exchange = Exchange()
    exchange.share()
    confirmations = exchange.confirmations()
    victim, liar = exchange.followers[0], exchange.followers[1]
    key = exchange.sides[victim].unconfirmed()
    confirmations[liar] = messages.write_about_key(
        messages.CONFIRMATION, key.transcript, liar, key.fingerprint, bytes(32), IDENTITIES[liar]
    )
    with pytest.raises(KeyAgreementError, match="cannot prove to hold"):
        exchange.check(victim, confirmations)


def test_attacks_on_confirmations_are_refused_by_name() -> None:
    def attack(tamper: Callable[[dict[str, bytes], str, str], dict[str, bytes]], message: str) -> None:
        exchange = Exchange()
        exchange.share()
        confirmations = exchange.confirmations()
        victim, other = exchange.followers[:2]
        with pytest.raises(KeyAgreementError, match=message):
            exchange.check(victim, tamper(confirmations, victim, other))

    attack(
        lambda c, _, other: {n: m for n, m in c.items() if n != other}, "confirmations of members are missing"
    )
    attack(lambda c, _, other: c | {"mallory": c[other]}, "confirmations came from outside")
    attack(lambda c, victim, other: c | {other: c[victim]}, "is not signed by the identity key")
    attack(lambda c, _, other: c | {other: c[other][:-1]}, "bytes, expected")
    attack(lambda c, _, other: c | {other: bytes(len(c[other]))}, "is not signed by the identity key")

    def of_another_kind(c: dict[str, bytes], victim: str, other: str) -> dict[str, bytes]:
        body = messages.BOX + c[other][8:-64]
        return c | {other: body + IDENTITIES[other].sign(b"fedmosaic/key-agreement/v1\n" + body)}

    attack(of_another_kind, "for another kind")

    replayed = Exchange()
    replayed.share()
    old = replayed.confirmations()
    attack(lambda c, _, other: c | {other: old[other]}, "for another set of openings")


def test_steps_out_of_turn_are_refused() -> None:
    exchange = Exchange()
    side = exchange.sides[VICTIM]
    with pytest.raises(KeyAgreementError, match="out of turn in epoch 1: next is accept_openings"):
        side.accept_box(b"")
    with pytest.raises(KeyAgreementError, match="accept_openings first"):
        side.confirmation()
    exchange.share()
    with pytest.raises(KeyAgreementError, match="out of turn in epoch 1: next is confirmation"):
        side.accept_box(b"")


def test_a_leader_whose_generator_fails_ends_the_epoch() -> None:
    def broken() -> bytes:
        raise RuntimeError("no homomorphic library")

    for generate, error in ((lambda: b"short", KeyAgreementError), (broken, RuntimeError)):
        epoch = plan()
        sides = {name: KeyAgreement(IDENTITIES[name], name, epoch, generate, 1024) for name in MEMBERS}
        openings = {name: side.opening() for name, side in sides.items()}
        leader = next(side for side in sides.values() if side.member == elected(openings))
        with pytest.raises(error, match=r"5 bytes, expected 1024|no homomorphic library"):
            leader.accept_openings(openings)
        with pytest.raises(KeyAgreementError, match="next is a new epoch"):
            leader.accept_openings(openings)


def elected(openings: dict[str, bytes]) -> str:
    transcript = messages.sha256(b"transcript", plan().terms_hash(), *(openings[name] for name in MEMBERS))
    return min(MEMBERS, key=lambda name: messages.sha256(b"leader", transcript, name.encode()))


def test_the_ephemeral_key_is_dropped_once_the_group_key_is_here() -> None:
    exchange = Exchange()
    exchange.share()
    for side in exchange.sides.values():
        assert side._ephemeral is None
