"""Who takes part in a round: K of N, alike for all who ask, and each member as often as any other."""

import numpy as np
import pytest
from pydantic import ValidationError

from builders import founding
from fedmosaic.privacy.federation.kits import FederationConfig
from fedmosaic.privacy.federation.roster import Roster, taking_part
from fedmosaic.protos import bounds

MEMBERS = tuple(f"m{number}" for number in range(10))
PLAIN = {"adapter": {"protection": "none"}, "encryption": {"backend": "plain"}, "allow_plaintext": True}


def test_each_round_has_so_many_members_drawn_by_a_rule_that_all_can_follow() -> None:
    first = taking_part(MEMBERS, 3, "run", 1)
    assert len(first) == 3
    assert first == taking_part(tuple(reversed(MEMBERS)), 3, "run", 1)
    assert len({taking_part(MEMBERS, 3, "run", number) for number in range(20)}) > 10
    assert any(taking_part(MEMBERS, 3, f"run{i}", 1) != first for i in range(5))
    assert taking_part(MEMBERS, None, "run", 1) == taking_part(MEMBERS, 10, "run", 1) == frozenset(MEMBERS)


def test_every_member_and_every_pair_is_drawn_equally_often() -> None:
    rounds = 3000
    drawn = np.array([[m in taking_part(MEMBERS, 3, "run", n) for m in MEMBERS] for n in range(rounds)])
    # Six standard deviations of a binomial share; for pairs 3 · 2 / (10 · 9).
    assert np.abs(drawn.mean(axis=0) - 0.3).max() < 6 * np.sqrt(0.3 * 0.7 / rounds)
    pairs = (drawn.T.astype(float) @ drawn) / rounds
    off = pairs[~np.eye(len(MEMBERS), dtype=bool)]
    assert np.abs(off - 1 / 15).max() < 6 * np.sqrt(1 / 15 / rounds)


def _roster(config: FederationConfig) -> Roster:
    member = {"id": "a", "identity_key": "0" * 64, "tls_key_sha256": "0" * 64}
    return Roster.model_validate(
        {"federation": "x", "serial": 1, "issued": "now", "members": [member], "terms": config.terms}
    )


def test_a_roster_without_sampling_keeps_the_hash_that_it_had_before_sampling_existed() -> None:
    assert b"sampled" not in _roster(founding(**PLAIN))._canonical()
    sampled = founding("a", "b", "c", "d", "e", schedule={"sampled_clients": 4}, **PLAIN)
    assert b'"sampled_clients":4' in _roster(sampled)._canonical()


def test_a_group_key_hinders_no_draw_and_the_groups_of_sums_do() -> None:
    mask = {"adapter": {"protection": "encrypted"}, "encryption": {"backend": "mask"}}
    sums = {
        "adapter": {"protection": "distributed-dp"},
        "adapter_privacy": {"steps_per_round": 1},
        "encryption": {"backend": "plain"},
    }
    assert founding(*MEMBERS, schedule={"sampled_clients": 6}, **mask)
    few = {"policy": {"minimum_contributors": 2, "squares_cap": 0.5}}
    assert founding(*MEMBERS, schedule={"sampled_clients": 3, "quorum": 3}, **PLAIN, **few)
    with pytest.raises(ValidationError, match="a group key has 4 holders: take at least 4"):
        founding(*MEMBERS, schedule={"sampled_clients": 3, "quorum": 3}, **mask, **few)
    with pytest.raises(ValidationError, match="groups of its sums are agreed"):
        founding(*MEMBERS, schedule={"sampled_clients": 6}, **sums)


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
