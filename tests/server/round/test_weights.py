"""Weight rows: capped, integer, within the policy, or refused with the reason."""

from collections.abc import Sequence

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from fedmosaic.experiments.attacks.statistics.collusion import smallest_coalition
from fedmosaic.privacy.policy import AggregationPolicy, integer_weights
from fedmosaic.server.round.relevance import Relevance, corrected_cosine, plain_cosine, softmax_weights
from fedmosaic.server.round.weights import Group, Plan, groups, plan

NAMES = ("a", "b", "c", "d", "e")
POLICY = AggregationPolicy(minimum_contributors=3, weight_cap=0.5)


def group(contributors: str = "abcde", recipients: str = "abcde") -> Group:
    return Group("shared", "", 10, frozenset(contributors), frozenset(recipients))


def vectors(count: int = 5) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 6))


def planned(
    found: Group,
    policy: AggregationPolicy = POLICY,
    names: Sequence[str] = NAMES,
    similar: Relevance | None = None,
    bits: int = 15,
    temperature: float = 0.5,
) -> Plan:
    similar = plain_cosine(vectors()) if similar is None else similar
    return plan(found, names, similar, temperature=temperature, policy=policy, bits=bits)


def planned_for(
    names: Sequence[str],
    similar: Relevance,
    policy: AggregationPolicy,
    bits: int = 15,
    temperature: float = 0.5,
) -> Plan:
    everybody = Group("shared", "", 10, frozenset(names), frozenset(names))
    return planned(everybody, policy, names, similar, bits, temperature)


def matrix(names: Sequence[str], result: Plan) -> np.ndarray:
    rows = np.zeros((len(names), len(names)))
    for recipient, row in result.rows.items():
        for contributor, weight in zip(row.contributors, row.weights, strict=True):
            rows[names.index(recipient), names.index(contributor)] = weight / 2**row.bits
    return rows


def profiles_of_tasks(count: int, seed: int) -> np.ndarray:
    """Clients in pairs of one task each."""
    rng = np.random.default_rng(seed)
    return np.repeat(rng.normal(size=(count, 64)), 2, axis=0)[:count] + 0.8 * rng.normal(size=(count, 64))


def test_rows_are_the_rounded_softmax_where_no_limit_bites() -> None:
    names = tuple("abcdefghi")
    exact = softmax_weights(plain_cosine(vectors(9)), 2.0, np.ones(9, dtype=bool))
    result = planned_for(names, plain_cosine(vectors(9)), POLICY, temperature=2.0)
    assert not result.refusals
    assert result.smallest_coalition is None
    for i, recipient in enumerate(names):
        row = result.rows[recipient]
        assert row.bits == 15
        assert row.contributors == tuple(n for n in names if n != recipient)
        shares = np.array(row.weights) / 2**15
        np.testing.assert_allclose(shares, np.delete(exact[i], i), atol=2.0**-15)


@given(
    st.integers(4, 9),
    st.floats(0.02, 5.0),
    st.floats(0.34, 1.0),
    st.integers(8, 20),
    st.integers(0, 2**32 - 1),
)
def test_every_row_keeps_the_policy(count: int, temperature: float, cap: float, bits: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = [f"c{i}" for i in range(count)]
    found = corrected_cosine(rng.normal(size=(count, 4)) * 3, rng.uniform(0, 2, count))
    policy = AggregationPolicy(minimum_contributors=3, weight_cap=cap)
    contributors = frozenset(rng.choice(names, size=rng.integers(1, count + 1), replace=False).tolist())
    everybody = Group("shared", "", 10, contributors, frozenset(names))
    result = planned(everybody, policy, names, found, bits, temperature)
    assert result.rows.keys() | result.refusals.keys() == set(names)
    assert not result.rows.keys() & result.refusals.keys()
    for recipient, row in result.rows.items():
        assert sum(row.weights) == 1 << bits
        assert recipient not in row.contributors
        assert set(row.contributors) <= contributors
        assert all(0 < w <= np.ceil(cap * (1 << bits)) for w in row.weights)
        assert len(row.contributors) >= 3
    for recipient in result.refusals:
        # Refused only where too few others contributed, or where their weights vanished.
        assert len(contributors - {recipient}) < 3 or temperature < 0.3


def test_permuting_the_clients_permutes_the_rows() -> None:
    order = [3, 0, 4, 1, 2]
    names = [NAMES[i] for i in order]
    there = planned(group())
    back = planned(group(), names=names, similar=plain_cosine(vectors()[order]))
    for recipient in NAMES:
        one = dict(zip(there.rows[recipient].contributors, there.rows[recipient].weights, strict=True))
        two = dict(zip(back.rows[recipient].contributors, back.rows[recipient].weights, strict=True))
        assert one.keys() == two.keys()
        # Equal remainders go to whoever stands first, so one unit may move.
        assert all(abs(one[name] - two[name]) <= 1 for name in one)


def test_too_few_contributors_are_a_refusal_in_words() -> None:
    result = planned(group("abc"))
    assert set(result.rows) == {"d", "e"}
    assert set(result.refusals) == {"a", "b", "c"}
    assert "2 contributors other than the recipient, at least 3 are required" in result.refusals["a"]


def test_a_weight_that_vanishes_does_not_count_as_a_contributor() -> None:
    policy = AggregationPolicy(minimum_contributors=4, squares_cap=1.0)
    result = planned(group(), policy, bits=8, temperature=0.02)
    assert any("has 3 contributors other than the recipient" in text for text in result.refusals.values())


def test_a_cap_that_cannot_hold_is_a_refusal() -> None:
    result = planned(group(), AggregationPolicy(minimum_contributors=1, weight_cap=0.2))
    assert not result.rows
    assert all("cannot each stay at or below 0.2" in text for text in result.refusals.values())


def test_families_share_among_themselves_only() -> None:
    uploaded = {
        "a": ["shared", "family"],
        "b": ["shared", "family"],
        "c": ["shared"],
        "d": ["family", "shared"],
        "e": [],
    }
    families = {"a": "llama", "b": "llama", "c": "llama", "d": "qwen"}
    shared, llama, qwen = groups(uploaded, NAMES, families, 10, {"llama": 7, "qwen": 9})  # type: ignore[arg-type]
    assert shared.contributors == frozenset("abcd")
    assert shared.recipients == frozenset(NAMES)
    assert (llama.contributors, llama.recipients, llama.dimensions) == (frozenset("ab"), frozenset("abc"), 7)
    assert (qwen.contributors, qwen.recipients, qwen.label) == (frozenset("d"), frozenset("d"), "family:qwen")


def test_a_small_family_never_receives_a_single_member() -> None:
    # The leak of the reference: with two members each would be handed the other's adapter verbatim.
    result = planned(Group("family", "llama", 7, frozenset("ab"), frozenset("ab")))
    assert not result.rows
    assert set(result.refusals) == {"a", "b"}


@pytest.mark.parametrize("count", [6, 8, 12])
def test_equal_weights_give_no_adapter_to_two_through_their_rounding(count: int) -> None:
    """Rounded to 12 bits, two recipients' equal rows differ by a unit in one place: one adapter, alone."""
    names = tuple(f"c{number:02d}" for number in range(count))
    rows = np.zeros((count, count))
    for i in range(count):
        others = np.arange(count) != i
        rows[i, others] = integer_weights(np.full(count - 1, 1 / (count - 1)), 12) / 4096
    assert smallest_coalition([rows]) == 2
    silent = plain_cosine(np.zeros((count, 4)))
    result = planned_for(names, silent, POLICY, bits=12)
    assert result.smallest_coalition is None
    found = matrix(names, result)
    assert found.any(axis=1).all()
    assert (found[found > 0] < 1.3 / (count - 1)).all()
    exact = smallest_coalition([found])
    assert exact is not None
    assert exact > 2


@pytest.mark.parametrize("seed", range(6))
def test_with_four_contributors_no_two_recipients_solve_or_one_of_them_gets_nothing(seed: int) -> None:
    policy = AggregationPolicy(minimum_contributors=4)
    result = planned_for(NAMES, plain_cosine(profiles_of_tasks(5, seed)), policy, bits=12)
    assert result.smallest_coalition is None
    exact = smallest_coalition([matrix(NAMES, result)])
    assert exact is None or exact > 2
    assert all("2 recipients together must not solve" in text for text in result.refusals.values())
    assert len(result.rows) >= 3


def test_among_four_members_two_recipients_suffice_and_the_plan_says_so() -> None:
    names = NAMES[:4]
    result = planned_for(names, plain_cosine(profiles_of_tasks(4, 0)), POLICY, bits=12)
    assert set(result.rows) == set(names)
    assert result.smallest_coalition == 2 == smallest_coalition([matrix(names, result)])


@pytest.mark.parametrize("count", [5, 6, 12])
def test_weights_still_follow_similarity(count: int) -> None:
    """Of every recipient, the member of the same task weighs most, by a wide margin over the mean."""
    names = tuple(f"c{number:02d}" for number in range(count))
    for seed in range(4):
        found = matrix(
            names, planned_for(names, plain_cosine(profiles_of_tasks(count, seed)), POLICY, bits=12)
        )
        for i in range(count - count % 2):
            if found[i].any():
                assert found[i].argmax() == i ^ 1
                assert found[i].max() > 1.4 / (count - 1)
