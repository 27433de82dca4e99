"""A scenario on Ray: the adapters of a run in one process, also where a machine is lost on the way."""

import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from rich.console import Console

from fedmosaic.client.state import read_record
from fedmosaic.experiments.comparison.record import read_run
from fedmosaic.experiments.comparison.report import merged_statement
from fedmosaic.experiments.runs import command as runner
from fedmosaic.experiments.simulation.cluster import Cluster, _shares
from fedmosaic.experiments.simulation.worker import state_of
from fedmosaic.protos.errors import ConfigurationError
from tiny import last_adapters

ROUNDS = 4


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


@pytest.fixture
def two_nodes() -> Iterator[tuple[Any, Any]]:
    ray = pytest.importorskip("ray", reason="Ray is not installed; make test-ray installs it")
    from ray.cluster_utils import Cluster as Machines

    machines = Machines(initialize_head=True, head_node_args={"num_cpus": 1})
    second = machines.add_node(num_cpus=1)
    ray.init(address=machines.address, log_to_driver=False)
    yield machines, second
    ray.shutdown()
    machines.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_loses_a_machine_ends_with_the_adapters_of_one_process(
    tmp_path: Path, tiny_scenario: Any, two_nodes: tuple[Any, Any]
) -> None:
    machines, second = two_nodes
    scenario = _scenario(tiny_scenario, training=tiny_scenario().training.model_copy(update={"steps": 20}))
    apart: list[Path] = []

    def run() -> None:
        apart.append(runner.run_here(scenario, tmp_path, tmp_path / "ray", console, Cluster(actors=2)))

    console = Console(file=io.StringIO(), width=200)
    thread = threading.Thread(target=run)
    thread.start()
    while thread.is_alive() and not _begun(tmp_path / "ray"):
        time.sleep(0.1)
    assert thread.is_alive(), "the run was over before a machine could be lost"
    assert _at_work_on(second), "a machine without clients is no loss"
    machines.remove_node(second, allow_graceful=False)
    thread.join(500)
    assert not thread.is_alive()
    (directory,) = apart
    record = read_run(directory)
    assert len(record.server["results"]) == ROUNDS
    assert merged_statement(record) is not None
    assert "min left" in console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    whole = runner.run_here(scenario, tmp_path, tmp_path / "one", Console(quiet=True))
    for name, adapter in last_adapters(whole).items():
        np.testing.assert_allclose(last_adapters(directory)[name], adapter, rtol=1e-4, atol=1e-6)


def _at_work_on(node: Any) -> list[str]:
    """Titles of the processes of a node that hold clients."""
    (raylet,) = node.all_processes["raylet"]
    titles = [child.cmdline()[0] for child in psutil.Process(raylet.process.pid).children()]
    return [title for title in titles if "client" in title.lower()]


def _begun(output: Path) -> bool:
    states = [state_of(run, f"client-{n}") for run in output.glob("tiny-*") for n in range(4)]
    return any(record.completed_round for state in states if (record := read_record(state)) is not None)
