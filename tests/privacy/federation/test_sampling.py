"""Who takes part in a round: K of N, alike for all who ask, and each member as often as any other."""

import contextlib
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from builders import founding, tiny_mechanism
from fedmosaic.client.planning import plan_adapter
from fedmosaic.privacy.federation import consortium, terms_checks
from fedmosaic.privacy.federation.kits import FederationConfig, MemberEntry
from fedmosaic.privacy.federation.roster import Roster, taking_part
from fedmosaic.privacy.federation.terms import GroupSumTerms, ScheduleTerms, Terms
from fedmosaic.privacy.secureaggregation.partition import Partition
from fedmosaic.protos import bounds
from fedmosaic.protos.errors import ConfigurationError

MEMBERS = tuple(f"m{number}" for number in range(10))
PLAIN: dict[str, Any] = {"adapter": {"protection": "none"}, "encryption": {"backend": "plain"}}
PLAIN |= {"allow_plaintext": True}


def test_each_round_has_so_many_members_drawn_by_a_rule_that_all_can_follow() -> None:
    first = taking_part(MEMBERS, 3, "run", 1)
    assert len(first) == 3
    assert first == taking_part(tuple(reversed(MEMBERS)), 3, "run", 1)
    assert len({taking_part(MEMBERS, 3, "run", number) for number in range(1, 20)}) > 10
    assert any(taking_part(MEMBERS, 3, f"run{i}", 1) != first for i in range(5))
    assert taking_part(MEMBERS, None, "run", 1) == taking_part(MEMBERS, 10, "run", 1) == frozenset(MEMBERS)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.text(max_size=9))
def test_nobody_takes_part_twice_in_a_cycle_nor_in_more_rounds_than_noise_is_planned_for(
    count: int, sampled: int, rounds: int, run_id: str
) -> None:
    members, sampled = tuple(f"m{number}" for number in range(count)), min(sampled, count)
    drawn = [taking_part(members, sampled, run_id, number + 1) for number in range(rounds)]
    assert {len(round) for round in drawn} == {sampled}
    cycle = count // sampled
    for begin in range(0, rounds, cycle):
        taken = [name for round in drawn[begin : begin + cycle] for name in round]
        assert len(taken) == len(set(taken))
    most = max(Counter(name for round in drawn for name in round).values())
    # Built without its checks: a draw of one is never founded, but the rule holds for it too.
    assert most <= ScheduleTerms.model_construct(rounds=rounds, sampled_clients=sampled).turns(count)
    assert most == -(-rounds // cycle) or count % sampled, "and where K divides n, in exactly as many"


@pytest.mark.parametrize("number", [1, 3, 4])
def test_in_every_round_each_member_and_each_pair_is_drawn_equally_often(number: int) -> None:
    runs = 3000
    drawn = np.array([[m in taking_part(MEMBERS, 3, f"r{i}", number) for m in MEMBERS] for i in range(runs)])
    # Six standard deviations of a binomial share; for pairs 3 · 2 / (10 · 9).
    assert np.abs(drawn.mean(axis=0) - 0.3).max() < 6 * np.sqrt(0.3 * 0.7 / runs)
    pairs = (drawn.T.astype(float) @ drawn) / runs
    off = pairs[~np.eye(len(MEMBERS), dtype=bool)]
    assert np.abs(off - 1 / 15).max() < 6 * np.sqrt(1 / 15 / runs)


def test_noise_is_planned_for_the_turns_by_an_accountant_of_others_too() -> None:
    """K of 4·K members are drawn in 40 rounds: ten turns, whose ε dp_accounting finds to be the target."""
    privacy = {"target_epsilon": 8.0, "expected_batch_size": 8, "steps_per_round": 2, "largest_delta": 1e-5}
    plain = PLAIN | {"adapter": {"protection": "dp"}, "adapter_privacy": privacy}
    members = tuple(f"m{number}" for number in range(16))
    schedule = {"rounds": 40, "sampled_clients": 4}
    agreed = founding(
        *members, profile=tiny_mechanism(noise_multiplier=4.0), schedule=schedule, **plain
    ).terms
    steps = agreed.private_steps(len(members))
    assert (steps, agreed.schedule.turns(15)) == (20, 14)
    sigma = plan_adapter(agreed, 400, 1e-5, 8.0, steps).noise_multiplier
    losses = privacy_loss_distribution.from_gaussian_mechanism(
        sigma, value_discretization_interval=1e-3, sampling_prob=8 / 400
    ).self_compose(steps)
    losses = losses.compose(
        privacy_loss_distribution.from_gaussian_mechanism(4.0, value_discretization_interval=1e-3)
    )
    assert 7.9 < losses.get_epsilon_for_delta(1e-5) < 8.02


def _roster(config: FederationConfig) -> Roster:
    member = {"id": "a", "identity_key": "0" * 64, "tls_key_sha256": "0" * 64}
    return Roster.model_validate(
        {"federation": "x", "serial": 1, "issued": "now", "members": [member], "terms": config.terms}
    )


def test_a_roster_without_sampling_keeps_the_hash_that_it_had_before_sampling_existed() -> None:
    assert b"sampled" not in _roster(founding(**PLAIN))._canonical()
    sampled = founding("a", "b", "c", "d", "e", schedule={"sampled_clients": 4}, **PLAIN)
    assert b'"sampled_clients":4' in _roster(sampled)._canonical()


def test_whoever_is_drawn_last_is_enough_for_a_group_key() -> None:
    mask: dict[str, Any] = {"adapter": {"protection": "encrypted"}, "encryption": {"backend": "mask"}}
    few: dict[str, Any] = {"schedule": {"sampled_clients": 3, "quorum": 3}}
    few["policy"] = {"minimum_contributors": 2, "squares_cap": 0.5}
    assert founding(*MEMBERS, schedule={"sampled_clients": 6}, **mask)
    assert founding(*MEMBERS, **PLAIN, **few)
    with pytest.raises(ValidationError, match="a group key has 4 holders: take at least 4"):
        founding(*MEMBERS, **mask, **few)


def _sums(**changes: Any) -> dict[str, Any]:
    return {
        "adapter": {"protection": "distributed-dp"},
        "adapter_privacy": {"steps_per_round": 1, "expected_batch_size": 10, "largest_delta": 1e-3},
        "encryption": {"backend": "plain"},
        "group_sums": {"minimum_contributors": 3} | changes,
    }


@pytest.mark.parametrize(
    ("sampled", "quorum", "groups", "words"),
    [
        (5, 4, 2, "2 groups with sums of at least 3 and a quorum of 4 take at least 6"),
        (6, 6, 2, "a quorum of 6 take at least 7"),
        (6, 5, 2, ""),
    ],
)
def test_a_round_is_large_enough_for_the_sums_of_all_groups(
    sampled: int, quorum: int, groups: int, words: str
) -> None:
    """Shares of K are rounded down, so of two groups a round may have one member less than K."""
    schedule = {"sampled_clients": sampled, "quorum": quorum}
    with pytest.raises(ValidationError, match=words) if words else contextlib.nullcontext():
        founding(*MEMBERS, schedule=schedule, **_sums(groups=groups))


@given(st.data())
def test_of_every_group_enough_are_drawn_and_nobody_more_often_than_planned(data: st.DataObject) -> None:
    least = data.draw(st.integers(3, 6))
    sampled = data.draw(st.integers(least, 30))
    members = data.draw(st.integers(sampled, 80))
    terms = Terms.model_construct(  # type: ignore[call-arg]  # of which no profile is read
        group_sums=GroupSumTerms(minimum_contributors=least),
        schedule=ScheduleTerms.model_construct(rounds=20, sampled_clients=sampled),
    )
    size = terms.least_group(members)
    assert terms.schedule.share(size, members) >= least > terms.schedule.share(size - 1, members)
    group = data.draw(st.integers(size, members))
    names = tuple(f"m{number:02}" for number in range(members))
    partition = Partition(groups=(names[:group],), mixing={})
    roster = SimpleNamespace(terms=terms, members=names)
    drawn = [partition.drawn(roster, "run", number).groups[0] for number in range(1, 21)]  # type: ignore[arg-type]
    assert all(len(names) >= least and list(names) == sorted(names) for names in drawn)
    assert max(Counter(name for names in drawn for name in names).values()) <= terms.schedule.turns(members)


def test_noise_of_sums_is_planned_for_the_turns_and_families_have_to_fill_their_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned: list[int] = []

    def noting(*found: Any) -> float:
        planned.append(found[-1])
        return 1.5

    monkeypatch.setattr(terms_checks, "noise_multiplier_for", noting)
    monkeypatch.setattr(terms_checks, "check_plannable", lambda *found: planned.append(found[-1]))
    members = tuple(f"m{number:02}" for number in range(12))
    schedule = {"rounds": 40, "sampled_clients": 4, "quorum": 4}
    agreed = consortium.planned(founding(*members, schedule=schedule, **_sums())).terms
    assert (agreed.group_sums.noise_multiplier, set(planned)) == (1.5, {14})
    entries = tuple(MemberEntry(id=name, family="ab"[n > 3]) for n, name in enumerate(members))
    split = founding(*members, schedule=schedule | {"sampled_clients": 6}, **_sums(groups=2))
    words = r"family 'a' has 4 of the 12 members.* fewer than 6 nobody receives"
    with pytest.raises(ConfigurationError, match=words):
        consortium.planned(split.model_copy(update={"members": entries}))


@pytest.mark.parametrize(
    ("sampled", "quorum", "words"),
    [(3, 3, "take at least 4"), (4, 5, "take at least 5"), (11, 4, "with 10 members")],
)
def test_a_round_is_not_smaller_than_quorum_and_policy_nor_larger_than_the_federation(
    sampled: int, quorum: int, words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        founding(*MEMBERS, schedule={"sampled_clients": sampled, "quorum": quorum}, **PLAIN)


def test_a_federation_too_large_for_one_round_has_to_sample() -> None:
    names = [f"m{number}" for number in range(bounds.MAX_CONTRIBUTORS + 1)]
    with pytest.raises(ValidationError, match=r"terms\.schedule\.sampled_clients"):
        founding(*names, **PLAIN)
    assert founding(*names, schedule={"sampled_clients": 64}, **PLAIN)


def test_of_a_group_whose_share_is_nobody_nobody_is_drawn() -> None:
    assert taking_part(("a",), 0, "run", 2) == frozenset()
