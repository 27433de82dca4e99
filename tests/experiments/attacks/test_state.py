"""State directories that a real federation leaves behind: what runs on them, and what they contradict."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmosaic.experiments.attacks import command as attacks
from fedmosaic.experiments.attacks import report as attack_report
from fedmosaic.experiments.attacks.refusals.stand_in import founded, run_sessions
from fedmosaic.experiments.attacks.statistics.results import AttackResult
from fedmosaic.experiments.simulation.transport import InProcessTransport
from fedmosaic.protos.errors import ConfigurationError
from fedmosaic.server.summary import write_summary


@pytest.fixture(scope="module")
def federation() -> Iterator[Path]:
    """Directory of a federation of five that went through all rounds."""
    with founded() as (directory, coordinator):
        _, errors = run_sessions(directory, lambda name: InProcessTransport(coordinator, name))
        assert not errors
        write_summary(directory / "server/state", coordinator.summary())
        yield directory


def test_a_servers_state_gives_collusion_on_its_rows_and_spoofing_on_its_profiles(
    federation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert attacks.main([str(federation / "server/state"), "--parts", "federation", "text"]) == 0
    report = attack_report.read(tmp_path / "attacks-attempts")
    assert report is not None
    found: dict[str, list[AttackResult]] = {}
    for result in report.results:
        found.setdefault(result.attack, []).append(result)
    collusion = found["Collusion: solving for another member's adapter"]
    assert any("the rows that this server gave" in result.sees for result in collusion)
    (spoofing,) = found["Relevance spoofing: pulling or poisoning a victim's aggregate"]
    assert [figure.name for figure in spoofing.figures][:1] == ["one copy of the victim's profile"]
    assert [reason.partition(":")[0] for reason in report.skipped] == ["text"]
    assert "no server has them" in report.skipped[0]


def test_what_a_clients_state_lacks_is_told(
    federation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = federation / "clients/cid/state"
    assert attacks.main([str(state), "--parts", "federation"]) == 0
    report = attack_report.read(tmp_path / "attacks-attempts-cid")
    assert report is not None
    assert report.results == ()
    assert "a client's state holds none of it" in report.skipped[0]
    with pytest.raises(ConfigurationError, match="leave --client"):
        attacks.main([str(state), "--client", "ada"])
