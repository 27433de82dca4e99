"""Unseen clients begin with what relevance gives them, train few steps, and change nothing for others."""

import io
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from rich.console import Console

from fedmosaic.experiments.comparison.record import read_run
from fedmosaic.experiments.comparison.report import show
from fedmosaic.experiments.methods.fedavg import FedAvg
from fedmosaic.experiments.methods.fedmd import FedMd
from fedmosaic.experiments.methods.fedmkt import FedMkt
from fedmosaic.experiments.methods.local import LocalOnly
from fedmosaic.experiments.runs import command as runner
from fedmosaic.experiments.runs.client_processes import check_as_processes
from fedmosaic.experiments.scenario.participants import Evaluation, read_evaluations
from fedmosaic.experiments.scenario.unseen import UnseenClient, add_unseen, read_unseen, unseen_table
from fedmosaic.experiments.simulation import unseen
from fedmosaic.experiments.simulation.unseen import Federation
from fedmosaic.privacy.ledger.ledger import read_ledger
from fedmosaic.protos.errors import ConfigurationError


def _console() -> Console:
    return Console(file=io.StringIO(), width=200)


def _with_unseen(make: Any, method: str, **changes: Any) -> Any:
    """Three members and, as an unseen client, the fourth."""
    whole = make(
        method=method, schedule={"rounds": 1, "quorum": 3}, adaptation_steps=[0, 2, 3], score="own", **changes
    )
    return whole.model_copy(update={"clients": whole.clients[:3], "unseen": whole.clients[3:]})


def _run(scenario: Any, place: Path) -> Path:
    return runner.run_here(scenario, place, place / "runs", _console())


@pytest.mark.parametrize("method", ["fedmosaic", pytest.param("local", marks=pytest.mark.slow)])
def test_an_unseen_client_is_scored_after_each_number_of_steps(
    method: str, tmp_path: Path, tiny_scenario: Any
) -> None:
    directory = _run(_with_unseen(tiny_scenario, method), tmp_path)
    (client,) = read_unseen(directory)
    assert client.id == "client-3"
    assert list(client.scores) == [0, 2, 3]
    assert all(set(scores) == {"client-3/task-3"} for scores in client.scores.values())
    if method == "fedmosaic":
        assert not isinstance(client.begun_with, str)
        assert set(client.begun_with) <= {"client-0", "client-1", "client-2"}
        assert sum(client.begun_with.values()) == pytest.approx(1.0)
        assert max(client.begun_with.values()) <= 0.6 + 1e-4
        rows = read_ledger(directory / "unseen" / "client-3" / "ledger.sqlite")
        charged = [row.channel for row in rows if row.kind == "RESERVED"]
        assert charged == [row.channel for row in rows if row.kind == "RELEASED"] == ["profile"]
    console = _console()
    show(read_run(directory), console)
    assert "Unseen clients" in cast(io.StringIO, console.file).getvalue()
    # A finished run is only read: the client does not train again.
    before = (directory / "unseen.json").stat().st_mtime_ns
    runner.resume(directory, _console())
    assert (directory / "unseen.json").stat().st_mtime_ns == before


def test_members_do_not_notice(tmp_path: Path, tiny_scenario: Any) -> None:
    scenario = _with_unseen(tiny_scenario, "fedavg")
    alone = _run(scenario.model_copy(update={"unseen": ()}), tmp_path / "a")
    together = _run(scenario, tmp_path / "b")
    for client in scenario.clients:
        place = Path("federation") / "clients" / client.id / "state"
        assert read_evaluations(alone / place) == read_evaluations(together / place)
    assert read_unseen(alone) == ()


def test_an_unseen_client_begins_with_the_sum_that_its_row_says(
    tmp_path: Path, tiny_scenario: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    shares, write = Federation.shares, unseen.write_embedded

    def watched(self: Federation, entry: Any) -> Any:
        seen["federation"], seen["shares"] = self, shares(self, entry)
        return seen["shares"]

    def written(model: Any, vector: np.ndarray, rank: int) -> None:
        seen["vector"] = vector
        write(model, vector, rank)

    monkeypatch.setattr(Federation, "shares", watched)
    monkeypatch.setattr(unseen, "write_embedded", written)
    _run(_with_unseen(tiny_scenario, "fedmosaic"), tmp_path)
    members = seen["federation"].shared
    expected = sum(share * members[name] for name, share in seen["shares"].items())
    np.testing.assert_allclose(seen["vector"], expected, rtol=1e-6, atol=1e-9)
    assert np.abs(seen["vector"]).max() > 0


def test_what_methods_give() -> None:
    alike = {"a": np.ones(2, np.float32)}
    assert LocalOnly().for_unseen(alike, "x") is None
    assert FedAvg().for_unseen(alike, "x") is alike["a"]
    assert FedAvg().for_unseen({}, "x") is None
    assert FedMd().for_unseen(alike, "x") is None
    mkt = FedMkt()
    assert mkt.for_unseen(alike, "x") is None
    mkt.server_state["x"] = np.zeros(2, np.float32)
    assert mkt.for_unseen(alike, "x") is mkt.server_state["x"]


@pytest.mark.slow
def test_alone_an_unseen_client_gets_nothing(tmp_path: Path, tiny_scenario: Any) -> None:
    directory = _run(_with_unseen(tiny_scenario, "fedmosaic-alone"), tmp_path)
    assert read_unseen(directory)[0].begun_with == "a fresh adapter"


def test_what_cannot_be_is_refused(tmp_path: Path, tiny_scenario: Any) -> None:
    for steps in ([], [3, 3], [-1, 2]):
        with pytest.raises(ValueError, match="adaptation_steps must rise"):
            tiny_scenario(adaptation_steps=steps)
    unseen = [tiny_scenario().clients[0].model_dump(mode="json") | {"id": "late"}]
    impossible: tuple[dict[str, Any], ...] = (
        {"unseen": unseen}, {"stream": "dynamic"}, {"equal_compute": True}
    )  # fmt: skip
    for asked in impossible:
        with pytest.raises(ValueError, match="the noise is planned for one set of examples"):
            tiny_scenario(**asked, adapter={"rank": 2, "blocks": 2, "protection": "dp"})
    with pytest.raises(ValueError, match="ids must differ"):
        tiny_scenario(unseen=[unseen[0] | {"id": "client-0"}])
    with pytest.raises(ConfigurationError, match="unseen clients"):
        check_as_processes(tiny_scenario(unseen=unseen))
    # The unseen client's training examples are tested on nobody, and nobody trains on its tests.
    leak = unseen[0] | {"test": unseen[0]["train"]}
    with pytest.raises(ConfigurationError, match="test sets"):
        Evaluation(tiny_scenario(unseen=[leak]))


def test_damage_is_noticed_and_the_table_survives_gaps(tmp_path: Path) -> None:
    add_unseen(tmp_path, UnseenClient(id="a", begun_with={"x": 0.25, "y": 0.75}, scores={0: {"a/t": 0.5}}))
    add_unseen(tmp_path, UnseenClient(id="b", begun_with="a fresh adapter", scores={5: {"b/t": 1.0}}))
    console = _console()
    console.print(unseen_table(read_unseen(tmp_path)))
    text = cast(io.StringIO, console.file).getvalue()
    assert "0.75 y, 0.25 x" in text
    assert "0.50" in text
    (tmp_path / "unseen.json").write_text(json.dumps([{"id": "a"}]))
    with pytest.raises(ConfigurationError, match="damaged"):
        read_unseen(tmp_path)
