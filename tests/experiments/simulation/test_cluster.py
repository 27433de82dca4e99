"""A scenario on Ray: the adapters of a run in one process, also where machines are lost on the way."""

import io
import os
import pickle
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fedmosaic.client.state import read_record
from fedmosaic.experiments.comparison.record import read_run
from fedmosaic.experiments.comparison.report import merged_statement
from fedmosaic.experiments.runs import command as runner
from fedmosaic.experiments.scenario.terms import RunFailedError
from fedmosaic.experiments.simulation import cluster
from fedmosaic.experiments.simulation.cluster import Cluster, _shares
from fedmosaic.experiments.simulation.worker import state_of
from fedmosaic.protos.errors import ConfigurationError
from tiny import last_adapters

ROUNDS = 8


def _scenario(make: Any, **changes: Any) -> Any:
    schedule = {"rounds": ROUNDS, "quorum": 3, "sampled_clients": 3}
    return make(unsafe_test_noise_seed=5, schedule=schedule, **changes)


def test_actors_are_shared_out_in_proportion_and_every_architecture_has_one() -> None:
    assert _shares(4, [9, 3]) == [3, 1]
    assert _shares(2, [100, 1]) == [1, 1]
    assert _shares(8, [2, 1]) == [2, 1], "no more than there are clients"


def test_what_a_cluster_cannot_run_is_refused(tmp_path: Path, tiny_scenario: Any) -> None:
    with pytest.raises(ConfigurationError, match="leave --engine ray out"):
        runner.run_here(tiny_scenario(method="local"), tmp_path, tmp_path, Console(quiet=True), Cluster())
    for wrong in ({"actors": 2}, {"engine": "ray", "processes": True}):
        with pytest.raises(ConfigurationError, match="--engine ray"):
            runner._cluster(runner.Arguments(Path("x.toml"), **wrong))


def _stand_in(**given: Any) -> Any:
    class Lost(Exception):
        pass

    return SimpleNamespace(exceptions=SimpleNamespace(RayError=Lost), **given)


def test_without_an_address_no_other_cluster_of_the_machine_is_joined_and_a_failure_is_one_line() -> None:
    asked = list[Any]()

    def init(address: str, **_: Any) -> Any:
        asked.append(address)
        if address != "local":
            raise Exception("no token\nand ten lines more")
        return SimpleNamespace(dashboard_url="127.0.0.1:8265")

    console = Console(file=io.StringIO())
    cluster._connect(_stand_in(init=init), None, console)
    assert asked == ["local"]
    assert "http://127.0.0.1:8265" in console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    with pytest.raises(ConfigurationError, match=r"--address far:6379: .*\(no token\); .*RAY_AUTH_MODE"):
        cluster._connect(_stand_in(init=init), "far:6379", console)


def test_an_actor_that_cannot_load_its_model_says_where_and_why_in_a_line(
    tmp_path: Path, tiny_scenario: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny_scenario()
    util = SimpleNamespace(get_node_ip_address=lambda: "10.0.0.2")
    ray = _stand_in(get=lambda _: (made, None, {}), cloudpickle=pickle, util=util)
    monkeypatch.setitem(sys.modules, "ray", ray)
    actor = cluster._ClientActor(pickle.dumps(None), tmp_path / "of another machine", 0)
    asked: list[Callable[[], object]] = [actor.check_loaded, lambda: actor.turn(0, 1)]
    for ask in asked:
        with pytest.raises(RunFailedError, match=r"^10\.0\.0\.2: .*of another machine"):
            ask()


class Machines:
    """A cluster on this machine whose head does no work; what it is sent is stored as if it were large."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster as Nodes

        # Ray's processes otherwise give way to all others, on a busy machine for minutes.
        changed = {"max_direct_call_object_size": 1000, "worker_niceness": 0}
        head = {"num_cpus": 0, "include_dashboard": True, "_system_config": changed}
        self.nodes = Nodes(initialize_head=True, head_node_args=head)
        self.of = {node.node_id: node for node in (self.add(), self.add())}

    def add(self) -> Any:
        return self.nodes.add_node(num_cpus=1)

    def end(self) -> None:
        import ray

        ray.shutdown()
        self.nodes.shutdown()

    def lose(self, node_id: str) -> None:
        self.nodes.remove_node(self.of.pop(node_id), allow_graceful=False)


@pytest.fixture
def machines() -> Iterator[Machines]:
    ray = pytest.importorskip("ray", reason="Ray is not installed; make test-ray installs it")
    found = Machines()
    ray.init(address=found.nodes.address, log_to_driver=False)
    yield found
    found.end()


def _actors() -> dict[str, Any]:
    """As Ray's dashboard lists them, by the first words of their names."""
    from ray.util import state

    return {actor.name.partition(" of ")[0]: actor for actor in state.list_actors(detail=True)}


def _alive_elsewhere(node_id: str) -> bool:
    actor = _actors()["clients 1"]
    return bool(actor.state == "ALIVE" and actor.node_id != node_id)


def _begin(run: Callable[[], Path], output: Path) -> tuple[threading.Thread, list[Any]]:
    """Start a run and wait for a client's first turn; the list gets the run's directory, or its error."""
    found = list[Any]()

    def work() -> None:
        try:
            found.append(run())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive() and not _begun(output):
        time.sleep(0.1)
    assert thread.is_alive(), f"the run was over before anything could be lost: {found}"
    return thread, found


def _begun(output: Path) -> bool:
    states = [state_of(run, f"client-{n}") for run in output.glob("tiny-*") for n in range(4)]
    return any(record.completed_round for state in states if (record := read_record(state)) is not None)


def _same_adapters(one: Path, other: Path) -> None:
    for name, adapter in last_adapters(other).items():
        np.testing.assert_allclose(last_adapters(one)[name], adapter, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_loses_two_machines_and_its_server_ends_with_the_adapters_of_one_process(
    tmp_path: Path, tiny_scenario: Any, machines: Machines
) -> None:
    from ray.util import state

    scenario = _scenario(tiny_scenario, training=tiny_scenario().training.model_copy(update={"steps": 20}))
    console = Console(file=io.StringIO(), width=200)
    over = Cluster(actors=2)
    thread, found = _begin(
        lambda: runner.run_here(scenario, tmp_path, tmp_path / "ray", console, over), tmp_path / "ray"
    )
    actors = _actors()
    assert actors.keys() == {"server", "clients 0", "clients 1"}
    clients, names = {entry.id for entry in scenario.clients}, set[str]()
    expected = {"prepare", "load", "server: pull", "server: push"}
    while thread.is_alive() and not (
        expected <= names and names & clients
    ):  # it hears of them a second later
        tasks = state.list_tasks(limit=10_000)
        names = {task.name for task in tasks}
        turns = [task for task in tasks if task.name in clients]
        under_way = [task.actor_id for task in turns if task.state not in ("FINISHED", "FAILED")]
        assert max(map(under_way.count, under_way), default=0) <= 2, "more turns than are waited for"
    assert expected <= names
    # The machine of an actor is lost, and then the one to which it has moved.
    machines.of |= {node.node_id: node for node in (machines.add(),)}
    for moves in (1, 2):
        lost = _actors()["clients 1"].node_id
        machines.lose(lost)
        while thread.is_alive() and not _alive_elsewhere(lost):
            time.sleep(0.1)
        assert thread.is_alive(), f"the run was over before machine {moves} could be lost: {found}"
    os.kill(_actors()["server"].pid, signal.SIGKILL)
    thread.join(600)
    assert not thread.is_alive()
    (directory,) = found
    record = read_run(directory)
    assert len(record.server["results"]) == ROUNDS
    assert merged_statement(record) is not None
    assert "min left" in console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert int(_actors()["clients 1"].num_restarts) >= 2
    _same_adapters(directory, runner.run_here(scenario, tmp_path, tmp_path / "one", Console(quiet=True)))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_process_that_dies_more_often_than_it_may_ends_the_run_and_another_goes_on_with_it(
    tmp_path: Path, tiny_scenario: Any, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cluster._LASTING, "max_restarts", 1)
    scenario, quiet = _scenario(tiny_scenario), Console(quiet=True)
    thread, found = _begin(
        lambda: runner.run_here(scenario, tmp_path, tmp_path / "ray", quiet, Cluster(actors=2)),
        tmp_path / "ray",
    )
    while thread.is_alive():
        if (actor := _actors()["clients 0"]).state == "ALIVE":
            with suppress(ProcessLookupError):
                os.kill(actor.pid, signal.SIGKILL)
        time.sleep(0.1)
    (error,) = found
    (directory,) = (tmp_path / "ray").iterdir()
    assert isinstance(error, RunFailedError)
    assert f"name: clients 0 of {directory.name}" in str(error)
    assert f"fedmosaic run {directory} --engine ray" in str(error)
    assert "\n" not in str(error)
    machines.end()  # as a command does, whose processes are then gone
    console = Console(file=io.StringIO(), width=200)
    runner.resume(directory, console, Cluster(actors=2))
    told = re.findall(r"(\d+)% of the training", console.file.getvalue())  # type: ignore[attr-defined]  # a StringIO
    assert int(told[-1]) == 100, "every step is counted once"
    _same_adapters(directory, runner.run_here(scenario, tmp_path, tmp_path / "one", quiet))
