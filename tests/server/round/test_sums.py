"""Members over a relay and the sums of a round: in step, in spite of those who vanish, refused by name."""

import threading
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from waiting import at_once

from fedmosaic.client.round.group_session import take_part
from fedmosaic.privacy.secureaggregation.masks import from_words, unpack
from fedmosaic.privacy.secureaggregation.member import SumMember
from fedmosaic.privacy.secureaggregation.partition import NO_ROUND, Partition, RoundTotals, sum_context
from fedmosaic.privacy.secureaggregation.terms import SumTerms
from fedmosaic.protos.errors import EncryptionError, PolicyError, WireError
from fedmosaic.protos.refusal import Refusal
from fedmosaic.server.round.sums import AGREE, OPEN, SHARE, STEPS, UNMASK, VECTOR, RoundSums, liars

SIZE = 9


class Round:
    """A round's sums with a clock of its own, and one thread per member."""

    def __init__(self, groups: list[list[str]], minimum: int, colluders: int) -> None:
        names = sorted(name for group in groups for name in group)
        self.identities = {name: Ed25519PrivateKey.generate() for name in names}
        keys = {name: key.public_key().public_bytes_raw() for name, key in self.identities.items()}
        self.terms = {
            name: SumTerms(bytes(32), tuple(group), {n: keys[n] for n in group}, minimum, colluders, SIZE)
            for group in groups
            for name in group
        }
        self.sums = RoundSums(2, [self.terms[group[0]] for group in groups], dict.fromkeys(STEPS, 10.0), 0.0)
        self.expected, self.now = set(names), 0.0
        self.vectors = {name: np.full(SIZE, 3**index) for index, name in enumerate(names)}
        self.changed, self.sent = threading.Condition(), list[str]()
        self.errors: dict[str, Exception] = {}
        self.alive, self.waiting = set(names), set[str]()

    def draw(self, name: str) -> npt.NDArray[np.int64]:
        self.sent.append(name)
        return self.vectors[name]

    def answered(self, name: str, vanish_at: str | None, step: str, payload: bytes) -> dict[str, bytes]:
        with self.changed:
            if step == vanish_at:
                raise ConnectionError("killed")
            self.sums.post(name, step, payload)
            self.move()
            while not (found := self.sums.read(name, step)):
                self.waiting.add(name)
                self.move()
                self.changed.wait_for(lambda: name not in self.waiting)
            return found

    def move(self) -> None:
        """Close what is due; where everybody waits, let the time pass that they wait for."""
        moved = self.advance()
        if self.waiting and self.waiting == self.alive:
            self.now += 1000.0
            moved |= self.advance()
        if moved:
            self.waiting.clear()
            self.changed.notify_all()

    def advance(self) -> bool:
        moved = self.sums.advance(self.expected, self.now)
        for finish in self.sums.due():
            finish()
        return moved

    def run(self, vanish: dict[str, str] | None = None) -> RoundTotals:
        def member(name: str) -> None:
            part = SumMember(self.terms[name], name, self.identities[name])
            try:
                answered = partial(self.answered, name, (vanish or {}).get(name))
                take_part(part, answered, partial(self.draw, name))
            except (Refusal, EncryptionError, ConnectionError) as error:
                self.errors[name] = error
            finally:
                with self.changed:
                    self.alive.discard(name)
                    self.move()

        at_once(member, self.identities)
        return self.sums.totals()


def _total(vector: bytes) -> npt.NDArray[np.int64]:
    return from_words(unpack(vector, SIZE, 32), 32)


GROUPS = [["a1", "a2", "a3", "a4", "a5", "a6", "a7"], ["b1", "b2", "b3", "b4", "b5"]]


def test_every_group_gets_the_sum_of_its_members() -> None:
    running = Round(GROUPS, 5, 1)
    totals = running.run()
    assert not running.advance(), "nothing is open any more"
    assert not running.errors
    assert totals.contributors == tuple(map(tuple, GROUPS))
    for group, vector in zip(GROUPS, totals.vectors, strict=True):
        assert np.array_equal(_total(vector), sum(running.vectors[name] for name in group))


def test_masks_are_taken_off_by_whoever_asks_and_not_where_the_last_share_comes_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = Round(GROUPS, 5, 1)
    given: list[tuple[int, int, int]] = []
    due = running.sums.due

    def ask() -> list[Callable[[], None]]:
        found = due()
        given.append((len(found), len(due()), running.sums.totals().vectors.count(b"")))
        return found

    monkeypatch.setattr(running.sums, "due", ask)
    running.run()
    assert sum(found for found, _, _ in given) == len(GROUPS)
    assert all(again == 0 for _, again, _ in given)
    assert all(missing >= found for found, _, missing in given), "no sum was there before"


@pytest.mark.parametrize("step", STEPS)
def test_members_may_vanish_at_any_step(step: str) -> None:
    running = Round(GROUPS, 5, 1)
    totals = running.run({"a2": step, "a6": step})
    assert set(running.errors) == {"a2", "a6"}
    gone = {"a2", "a6"} if step in (OPEN, SHARE, VECTOR) else set()
    assert set(totals.contributors[0]) == set(GROUPS[0]) - gone
    assert np.array_equal(_total(totals.vectors[0]), sum(running.vectors[n] for n in totals.contributors[0]))


def test_a_group_with_too_few_forms_no_sum_and_says_why() -> None:
    running = Round(GROUPS, 5, 1)
    totals = running.run({"b3": SHARE})
    assert totals.contributors[1] == ()
    assert totals.vectors[1] == b""
    assert totals.contributors[0] == tuple(GROUPS[0]), "the other group has its own"
    assert all("a sum needs 5" in str(running.errors[name]) for name in ("b1", "b2", "b4", "b5"))
    assert not set(running.sent) & set(GROUPS[1]), "nobody had paid for a vector"


def test_a_late_or_foreign_message_is_refused_by_name() -> None:
    running = Round(GROUPS, 5, 1)
    with pytest.raises(Refusal, match="'x9' is in no group"):
        running.sums.post("x9", OPEN, bytes(128))
    with pytest.raises(Refusal, match="step 'sum-vector' of 'a1' came while 'sum-open'"):
        running.sums.post("a1", VECTOR, bytes(4 * SIZE))
    with pytest.raises(Refusal, match="an opening of 3 bytes"):
        running.sums.post("a1", OPEN, b"abc")
    running.run({"a2": SHARE})
    with pytest.raises(Refusal, match="step 'sum-vector' of 'a2' came while 'over'"):
        running.sums.post("a2", VECTOR, bytes(4 * SIZE))


def test_whoever_disagrees_with_more_than_may_lie_has_lied() -> None:
    """One of each pair lies, and at most t do: an honest one is in dispute with no more than those."""
    disputes = {("a1", "a2"), ("a3", "a2"), ("a4", "a2"), ("a4", "a5"), ("a2", "a2")}
    assert set(liars(disputes, 2)) == {"a2"}
    assert set(liars(disputes, 1)) == {"a2", "a4"}
    assert not liars({("a1", "a2"), ("a2", "a1")}, 1)


def test_nothing_can_be_read_before_its_step_is_over() -> None:
    running = Round(GROUPS, 5, 1)
    assert all(running.sums.read("a1", step) == {} for step in (*STEPS, "other"))
    running.run()
    assert all(running.sums.read("a1", step) for step in STEPS)
    signed = running.sums.read("a1", AGREE)
    assert len(signed) == 5, "k of 7: every member would check the others too"
    assert set(signed) < set(GROUPS[0])
    assert running.sums.read("a1", UNMASK) == {"server": b""}


# ---- what members check of the partition, and the chain ----

MIXING = {name: (0.5, 0.5) for group in GROUPS for name in group}
NAMES = [name for group in GROUPS for name in group]


def test_a_partition_comes_back_and_its_digest_is_of_all_of_it() -> None:
    partition = Partition(groups=tuple(map(tuple, GROUPS)), mixing=MIXING)
    assert Partition.decoded(partition.encoded()) == partition
    other = Partition(groups=partition.groups, mixing=MIXING | {"a1": (0.4, 0.6)})
    assert other.digest != partition.digest
    with pytest.raises(WireError, match="cannot be read"):
        Partition.decoded(b"{}")


@pytest.mark.parametrize(
    "content",
    [
        b'{"groups": [["a1\\n2026-01-01 all is well", "a2"]], "mixing": {}}',
        b'{"groups": [["a1", "a2"]], "mixing": {"a2\\u001b[2J": [1.0]}}',
        b'{"groups": [["a1", "a2"]], "mixing": {"a2": [NaN]}}',
        b'{"groups": [["a1", "a2"]], "mixing": {"a2": [Infinity]}}',
    ],
)
def test_a_partition_holds_names_of_members_and_finite_weights_alone(content: bytes) -> None:
    with pytest.raises(WireError, match="cannot be read") as caught:
        Partition.decoded(content)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("groups", "mixing", "problem"),
    [
        ([["a1", "a2", "a3"], ["a3", "a4", "a5"]], {}, "overlap"),
        ([["a1", "a2", "zz"]], {}, "zz, who are not on the roster"),
        ([["a2", "a3", "a4"]], {}, "leave 'a1' out"),
        ([["a2", "a1", "a3"]], {}, "ascending"),
        ([["a1", "a2", "a3"], ["b1", "b2"]], {}, "a group of 2, the terms say at least 3"),
        (
            [["a1", "a2", "a3"], ["a4", "a5", "a6"], ["b1", "b2", "b3"]],
            {},
            "3 groups, the terms say at most 2",
        ),
        ([["a1", "a2", "a3"]], {"a1": (0.5, 0.5)}, "no mixing weights"),
        ([["a1", "a2", "a3"]], {"a1": (-1.0,)}, "no mixing weights"),
        ([["a1", "a2", "a3"]], {}, "no mixing weights"),
        ([["a1", "a2", "b1"]], {"a1": (1.0,)}, "share sums with other families: b1"),
        ([["a1", "a2", "a3"], ["b1", "b2", "b3"]], {"a1": (0.9, 0.1)}, "other families: b1, b2, b3"),
    ],
)
def test_a_member_refuses_a_partition_that_does_not_protect_it(
    groups: list[list[str]], mixing: dict[str, tuple[float, ...]], problem: str
) -> None:
    partition = Partition(groups=tuple(map(tuple, groups)), mixing=mixing)
    with pytest.raises(PolicyError, match=problem):
        partition.check("a1", {name: name[0] for name in NAMES}, 3, 2)


def test_whoever_is_shown_other_sums_or_groups_computes_another_context() -> None:
    partition = Partition(groups=tuple(map(tuple, GROUPS)), mixing=MIXING)
    totals = RoundTotals(2, (("a1", "a2"), ()), (b"\x01\n\x02", b""))
    assert RoundTotals.from_messages(2, totals.messages(), 2) == totals
    chain = totals.follow(NO_ROUND)
    changed = [
        RoundTotals(3, totals.contributors, totals.vectors),
        RoundTotals(2, (("a1",), ()), totals.vectors),
        RoundTotals(2, totals.contributors, (b"\x01\n\x03", b"")),
    ]
    assert len({chain, *(other.follow(NO_ROUND) for other in changed)}) == 4
    contexts = {
        sum_context("f", "run", 3, bytes(32), partition, chain),
        sum_context("f", "run", 4, bytes(32), partition, chain),
        sum_context("f", "run", 3, bytes(32), partition, NO_ROUND),
        sum_context("f", "other", 3, bytes(32), partition, chain),
    }
    assert len(contexts) == 4
    with pytest.raises(WireError, match="no sum of group 1"):
        RoundTotals.from_messages(2, {"group-0": b"a\n"}, 2)
