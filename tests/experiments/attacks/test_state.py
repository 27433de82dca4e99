"""State directories that a real federation leaves behind: what runs on them, and what they contradict."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmosaic.client.client import Participant
from fedmosaic.client.statement import STATEMENT
from fedmosaic.experiments.attacks import command as attacks
from fedmosaic.experiments.attacks import report as attack_report
from fedmosaic.experiments.attacks.refusals.stand_in import founded, run_sessions
from fedmosaic.experiments.attacks.state import CLAIM, open_state
from fedmosaic.experiments.attacks.statistics.results import AttackResult
from fedmosaic.experiments.simulation.transport import InProcessTransport
from fedmosaic.privacy.statement.build import statement
from fedmosaic.protos.errors import ConfigurationError
from fedmosaic.server.summary import write_summary


@pytest.fixture(scope="module")
def federation() -> Iterator[Path]:
    """Directory of a federation of five that went through all rounds."""

    def conclude(member: Participant) -> None:
        text = statement(member.statement_inputs()).model_dump_json()
        (member.state.directory / STATEMENT).write_text(text)

    with founded() as (directory, coordinator):
        _, errors = run_sessions(directory, lambda name: InProcessTransport(coordinator, name), conclude)
        assert not errors
        write_summary(directory / "server/state", coordinator.summary())
        yield directory


def by_attack(results: list[AttackResult]) -> dict[str, list[AttackResult]]:
    return {name: [r for r in results if r.attack == name] for name in {r.attack for r in results}}


def test_a_servers_state_gives_collusion_on_its_rows_and_spoofing_on_its_profiles(
    federation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert attacks.main([str(federation / "server/state"), "--parts", "federation", "text"]) == 0
    report = attack_report.read(tmp_path / "attacks-attempts")
    assert report is not None
    found = by_attack(list(report.results))
    collusion = found["Collusion: solving for another member's adapter"]
    assert any("the rows that this server gave" in result.sees for result in collusion)
    (spoofing,) = found["Relevance spoofing: pulling or poisoning a victim's aggregate"]
    assert [figure.name for figure in spoofing.figures][:1] == ["one copy of the victim's profile"]
    assert [reason.partition(":")[0] for reason in report.skipped] == ["text"]
    assert "no server has them" in report.skipped[0]


def test_a_clients_claim_is_held_against_its_ledger_and_its_rows_against_the_statement(
    federation: Path,
) -> None:
    skipped: list[str] = []
    found = by_attack(open_state(federation / "clients/ada/state", 0).attack(skipped))
    assert not skipped
    claims = {result.release: result.figures[0] for result in found.pop(CLAIM)}
    assert set(claims) == {"profile"}, "of `encrypted` no ε is claimed"
    assert 0 < claims["profile"].value == pytest.approx(claims["profile"].bound)
    (rows,) = (result for results in found.values() for result in results)
    assert rows.figures[0].value == 4
    assert not rows.broken


def test_a_claim_below_the_ledger_and_a_smaller_row_than_told_are_broken(federation: Path) -> None:
    state = federation / "clients/ben/state"
    claim = json.loads((state / STATEMENT).read_text())
    for channel in claim["clients"][0]["channels"]:
        if channel["channel"] == "profile":
            channel["epsilon"] = 0.5 * channel["epsilon"]
    (state / STATEMENT).write_text(json.dumps(claim))
    rows = json.loads((state / "rows.json").read_text())
    label = next(iter(rows))
    rows[label][1] = 3
    (state / "rows.json").write_text(json.dumps(rows))
    results = open_state(state, 0).attack([])
    assert {result.release for result in results if result.broken} == {
        "profile",
        "weight rows that the client accepted",
    }


def test_what_a_state_lacks_is_told(federation: Path, tmp_path: Path) -> None:
    skipped: list[str] = []
    state = federation / "clients/cid/state"
    (state / STATEMENT).rename(tmp_path / STATEMENT)
    assert open_state(state, 0).attack(skipped) == []
    assert "holds no statement" in skipped[0]
    with pytest.raises(ConfigurationError, match="leave --client"):
        attacks.main([str(state), "--client", "ada"])
