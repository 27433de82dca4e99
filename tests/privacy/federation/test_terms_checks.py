"""Founding terms that no client could plan its noise under are refused, with a remedy that works."""

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import founding, tiny_mechanism
from fedmosaic import cli
from fedmosaic.privacy.accounting.calibrate import check_plannable
from fedmosaic.privacy.accounting.epsilon import default_delta, epsilon, within_resolution
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.configuration import canonical_json
from fedmosaic.privacy.federation import consortium
from fedmosaic.privacy.federation.consortium import create_federation
from fedmosaic.privacy.federation.roster import Roster, RosterMark
from fedmosaic.privacy.federation.terms import Terms
from fedmosaic.privacy.federation.terms_checks import check_plan, check_sums, with_bounded_delta
from fedmosaic.privacy.mechanism.projection import PublicBasis
from fedmosaic.protos.errors import AccountingError, ConfigurationError, MechanismError


def terms(
    rounds: int = 3, target: float = 8.0, profile: dict[str, Any] | None = None, **adapter: Any
) -> Terms:
    return founding(
        adapter={"protection": "dp", **adapter},
        adapter_privacy={"target_epsilon": target},
        profile=tiny_mechanism(**(profile or {})),
        schedule={"rounds": rounds},
        encryption={"backend": "plain"},
        allow_plaintext=True,
    ).terms


def test_usual_terms_pass() -> None:
    check_plan(terms(), 4)
    check_plan(terms(rounds=1000), 4)
    check_plan(terms(rounds=100_000, protection="none"), 4)


def test_more_steps_than_can_be_accounted_for_are_refused_with_a_number_that_passes() -> None:
    with pytest.raises(ConfigurationError, match=r"2,000,000 private steps") as refused:
        check_plan(terms(rounds=100_000), 4)
    possible = re.search(r"at most ([\d,]+) rounds", str(refused.value))
    assert possible is not None
    check_plan(terms(rounds=int(possible.group(1).replace(",", ""))), 4)


def test_a_profile_that_spends_the_budget_is_refused_with_what_to_raise() -> None:
    with pytest.raises(ConfigurationError, match=r"noise_multiplier") as refused:
        check_plan(terms(target=0.5, profile={"noise_multiplier": 1.0}), 4)
    assert "Fewer rounds do not help" in str(refused.value)


def test_terms_that_suit_some_clients_only_are_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    check_plan(terms(target=0.5), 4)
    assert "1,000,000 examples could not plan" in caplog.text


def group_sums(**changes: Any) -> dict[str, Any]:
    sums = {"minimum_contributors": 4, "noise_multiplier": 1.0, **changes}
    return {
        "adapter": {"protection": "distributed-dp"},
        "adapter_privacy": {"steps_per_round": 1},
        "encryption": {"backend": "plain"},
        "group_sums": sums,
    }


def test_integers_with_no_room_for_all_members_are_refused_at_founding() -> None:
    agreed = founding("a", "b", "c", "d", **group_sums(bits=16)).terms
    with pytest.raises(ConfigurationError, match=r"group_sums.bits is 16: .*use more bits"):
        check_sums(agreed, "abcd")
    check_sums(founding("a", "b", "c", "d", **group_sums()).terms, "abcd")


@pytest.mark.parametrize(
    ("count", "changes", "size", "problem"),
    [
        (
            1000,
            {"groups": 64},
            {},
            "the groups and their weights may take 1,[0-9,]+ bytes with 1,000 members",
        ),
        (1000, {}, {"rank": 192, "blocks": 1}, "a sum and the names behind it may take 1,0[0-9,]+ bytes"),
    ],
)
def test_what_does_not_fit_one_message_is_refused_at_founding(
    count: int, changes: dict[str, Any], size: dict[str, int], problem: str
) -> None:
    """Found in the first round instead, it would end the run after the profiles are paid for."""
    names = [f"member-{number:04}" for number in range(count)]
    sums = group_sums(**changes)
    sums["adapter"] |= size
    agreed = founding("a", "b", "c", "d", **sums).terms
    with pytest.raises(ConfigurationError, match=problem):
        check_sums(agreed, names)
    check_sums(founding("a", "b", "c", "d", **group_sums(groups=3)).terms, names)


def test_fewer_members_than_a_sum_needs_are_refused_at_founding() -> None:
    with pytest.raises(ValueError, match="minimum_contributors is 6 with 4 members"):
        founding("a", "b", "c", "d", **group_sums(minimum_contributors=6))


def test_what_is_plannable_is_decided_without_the_slow_accountant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fedmosaic.privacy.accounting.epsilon._prv", lambda *_: pytest.fail("PRV was evaluated")
    )
    check_plannable(8.0, default_delta(1000), [GaussianEvent(8.0, 1.0, 1)], 0.032, 60)


def test_resolution_is_the_accountants_own() -> None:
    few, many = [GaussianEvent(2.0, 0.5, 100)], [GaussianEvent(2.0, 0.5, 10**9)]
    assert within_resolution(few, 1e-5)
    assert not within_resolution(few, 1e-13)
    assert not within_resolution(many, 1e-5)
    with pytest.raises(AccountingError, match=r"schedule\.rounds"):
        epsilon([GaussianEvent(4000.0, 0.5, 10**9)], 1e-5)


def test_another_basis_than_the_terms_name_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    agreed, other = (PublicBasis(centre=np.full(32, value, dtype=np.float32)) for value in (1.0, 2.0))
    for name, basis in (("agreed", agreed), ("other", other)):
        basis.save(tmp_path / name)
    config = founding(profile=tiny_mechanism(standardise="centre", basis_sha256=agreed.sha256))
    (tmp_path / "damaged").write_bytes(b"\xff" * 100)
    for basis_file, reason in (
        (tmp_path / "other", "same run of `fedmosaic probe`"),
        (tmp_path / "damaged", "no readable public basis"),
        (None, "no file is given"),
    ):
        with pytest.raises(MechanismError, match=reason):
            consortium.create(config, tmp_path / "made", basis_file)
    assert not (tmp_path / "made").exists()
    consortium.create(config, tmp_path / "made", tmp_path / "agreed")
    with pytest.raises(MechanismError, match="uses no public basis"):
        consortium.create(founding(), tmp_path / "second", tmp_path / "agreed")


def test_keys_init_refuses_terms_that_cannot_be_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "federation.json"
    config = founding().model_copy(update={"terms": terms(rounds=100_000)})
    file.write_text(config.model_dump_json(exclude_none=True))
    assert cli.main(["keys", "init", str(file), "--out", str(tmp_path / "made")]) == 2
    assert "rounds" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_founding_bounds_delta_and_a_roster_from_before_keeps_its_hash(tmp_path: Path) -> None:
    config = founding("a", "b", "c", "d")
    assert config.terms.adapter_privacy.largest_delta is None
    roster = create_federation(config, tmp_path / "new")
    assert roster.terms.adapter_privacy.largest_delta == 1e-5
    chosen: dict[str, Any] = {"adapter_privacy": {"largest_delta": 1.0}}
    assert with_bounded_delta(founding(**chosen).terms).adapter_privacy.largest_delta == 1.0
    before = roster.model_dump(mode="json")
    del before["terms"]["adapter_privacy"]["largest_delta"], before["witness"]
    del before["terms"]["schedule"]["sampled_clients"], before["terms"]["relevance"]["across_families"]
    old = Roster.model_validate(before)
    assert (roster.terms.relevance.across_families, old.terms.relevance.across_families) == (False, True)
    relevance = canonical_json(before["terms"]["relevance"]).encode()
    assert RosterMark.of(old).terms["relevance"] == hashlib.sha256(relevance).hexdigest()
    said = {name: value for name, value in before.items() if name != "signature"}
    del said["terms"]["group_sums"]
    assert old.hash == hashlib.sha256(canonical_json(said).encode()).digest()
    assert old.hash != roster.hash
