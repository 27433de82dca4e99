"""A scenario in one process: real sessions and server, resumable, and the same result for the same seed."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from fedmosaic.client.colora import read_shared
from fedmosaic.client.model.examples import read_examples
from fedmosaic.client.settings import ClientSettings
from fedmosaic.experiments.comparison.record import read_run
from fedmosaic.experiments.comparison.report import merged_statement, show
from fedmosaic.experiments.comparison.runs import compared_run
from fedmosaic.experiments.runs import command as runner
from fedmosaic.experiments.runs.processes import check_as_processes, client_process
from fedmosaic.experiments.scenario.participants import Evaluation, read_evaluations
from fedmosaic.experiments.scenario.terms import RunFailedError, ScenarioClient, ScenarioTask
from fedmosaic.experiments.simulation import simulate as simulation
from fedmosaic.experiments.simulation.client import StreamLearner
from fedmosaic.experiments.simulation.models import AdapterState, SharedModel
from fedmosaic.privacy.accounting.epsilon import epsilon
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.configuration import read_configuration
from fedmosaic.privacy.files import hold_directory
from fedmosaic.privacy.ledger.ledger import read_ledger
from fedmosaic.protos.errors import ConfigurationError, StateError
from tiny import last_adapters


def _state(directory: Path, client: str) -> Path:
    return directory / "federation" / "clients" / client / "state"


def test_a_run_in_one_process_leaves_what_the_report_reads(tmp_path: Path, tiny_scenario: Any) -> None:
    console = Console(file=io.StringIO(), width=200)
    directory = runner.run_here(tiny_scenario(evaluate_every=1), tmp_path, tmp_path, console)
    record = read_run(directory)
    assert set(record.clients) == {f"client-{n}" for n in range(4)}
    for result in record.clients.values():
        assert set(result) >= {"before", "after", "traffic", "seconds"}
        assert len(result["after"]) == 4
        assert result["traffic"]["adapter"]["sent"] > 0
    statement = merged_statement(record)
    assert statement is not None
    assert statement.transport == "in_process"
    own = json.loads((_state(directory, "client-0") / "statement.json").read_text())
    (profile,) = (c for c in own["clients"][0]["channels"] if c["channel"] == "profile")
    assert 0.0 <= profile["clipped_share"] <= 1.0, "counted as in a client's own process"
    assert len(record.server["results"]) == 2
    assert sorted(read_evaluations(_state(directory, "client-0"))) == [0, 1, 2]
    show(record, console)
    assert "100% of the training" in console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO


def test_clients_that_are_not_drawn_agree_on_the_key_of_those_who_are(
    tmp_path: Path, tiny_scenario: Any
) -> None:
    model = {"path": "small"}
    clients = [
        {"id": f"c{n}", "task": f"t{n}", "model": model, "train": f"train-{n % 4}.jsonl"} for n in range(6)
    ]
    scenario = tiny_scenario(
        clients=[client | {"test": f"test-{n % 4}.jsonl"} for n, client in enumerate(clients)],
        adapter={"rank": 2, "blocks": 2, "protection": "encrypted"},
        encryption={"backend": "mask"},
        allow_plaintext=False,
        schedule={"rounds": 4, "quorum": 4, "sampled_clients": 4, "rotate_key_every": 2},
    )
    directory = runner.run_here(scenario, tmp_path, tmp_path, Console(quiet=True))
    results = read_run(directory).server["results"]
    assert [len(result["uploaded"]) for result in results] == [4] * 4
    assert [result["key_epoch"] for result in results] == [1, 1, 2, 2]
    assert all(result["received"] for result in results[:-1])


def test_the_same_seed_gives_the_same_adapters_and_another_seed_others(
    tmp_path: Path, tiny_pair: Any
) -> None:
    def run(seed: int) -> dict[str, np.ndarray]:
        scenario = tiny_pair(seed=seed, unsafe_test_noise_seed=5)
        return last_adapters(runner.run_here(scenario, tmp_path, tmp_path, Console(quiet=True)))

    first, again, other = run(0), run(0), run(1)
    for name, adapter in first.items():
        np.testing.assert_array_equal(adapter, again[name])
        assert not np.array_equal(adapter, other[name])


def test_a_blended_branch_begins_half_way_to_what_is_received(
    tmp_path: Path, tiny_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, blend = StreamLearner.train, StreamLearner._blend_received
    ends: dict[str, np.ndarray] = {}
    moved: list[int] = []

    def blended(self: StreamLearner) -> None:
        blend(self)
        begins, received = (read_shared(self._model, branch) for branch in ("local", "global"))
        client = self.example_ids[0]
        if client in ends:
            half_way = (ends[client] + received) / 2
            np.testing.assert_allclose(begins, half_way, rtol=1e-5, atol=1e-8)
            moved.append(not np.allclose(begins, ends[client]))

    def watched(self: StreamLearner, *arguments: Any) -> None:
        with self.shared.with_adapter(self.adapter):
            train(self, *arguments)
            ends[self.example_ids[0]] = read_shared(self._model, "local")

    monkeypatch.setattr(StreamLearner, "train", watched)
    monkeypatch.setattr(StreamLearner, "_blend_received", blended)
    scenario = tiny_pair(method="fedmosaic-blend")
    runner.run_here(scenario, tmp_path, tmp_path, Console(quiet=True))
    assert moved == [True] * 2


def test_a_blended_branch_is_trained_privately_within_the_budget(tmp_path: Path, tiny_pair: Any) -> None:
    scenario = tiny_pair(
        method="fedmosaic-blend",
        adapter={"rank": 2, "blocks": 2, "protection": "dp"},
        # As many as a client has: without sampling the accountants have closed forms.
        adapter_privacy={"target_epsilon": 8.0, "expected_batch_size": 55, "steps_per_round": 1},
    )
    directory = runner.run_here(scenario, tmp_path, tmp_path, Console(quiet=True))
    assert 7.0 < (compared_run(directory).epsilon["server"] or 0.0) <= 8.0


def test_a_stopped_run_goes_on_to_the_same_result(
    tmp_path: Path, tiny_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = tiny_pair(method="fedmosaic-blend", unsafe_test_noise_seed=5, stream="dynamic")
    whole = last_adapters(
        runner.run_here(scenario, tmp_path / "whole", tmp_path / "whole", Console(quiet=True))
    )
    train = StreamLearner.train

    def dies(self: StreamLearner, round_number: int, *others: Any) -> None:
        if round_number == 2 and self.family == "small":
            raise RuntimeError("the machine was switched off")
        train(self, round_number, *others)

    monkeypatch.setattr(StreamLearner, "train", dies)
    with pytest.raises(RunFailedError, match="switched off"):
        runner.run_here(scenario, tmp_path / "cut", tmp_path / "cut", Console(quiet=True))
    monkeypatch.undo()
    (directory,) = (tmp_path / "cut").iterdir()
    runner.resume(directory, Console(quiet=True))
    for name, adapter in last_adapters(directory).items():
        np.testing.assert_array_equal(adapter, whole[name])


def test_two_processes_cannot_run_in_one_directory(tmp_path: Path, tiny_scenario: Any) -> None:
    # A baseline has no client's state directory, which would be held as well.
    scenario = tiny_scenario(method="local", schedule={"rounds": 1, "quorum": 4})
    directory = tmp_path / "run"
    directory.mkdir()
    with (
        hold_directory(directory / "run.lock", ""),
        pytest.raises(StateError, match="in use by another process"),
    ):
        runner.run_at(scenario, directory, Console(quiet=True))
    runner.run_at(scenario, directory, Console(quiet=True))
    assert read_run(directory).clients


def test_a_stream_releases_one_profile_per_round_which_compose_in_parallel(
    tmp_path: Path, tiny_scenario: Any, tiny_folder: Path
) -> None:
    # A round's part of the stream must be enough for a profile.
    pairs = [tiny_folder / f"train-{number}.jsonl" for number in range(4)]
    both = [tmp_path / f"both-{number}.jsonl" for number in range(2)]
    for number, path in enumerate(both):
        path.write_text("".join(pair.read_text() for pair in pairs[2 * number : 2 * number + 2]))

    plain = tiny_scenario(stream="dynamic")
    clients = [c.model_copy(update={"train": both[n // 2]}) for n, c in enumerate(plain.clients)]
    scenario = plain.model_copy(update={"clients": tuple(clients)})
    directory = runner.run_here(scenario, tmp_path, tmp_path, Console(quiet=True))
    rows = read_ledger(_state(directory, "client-1") / "ledger.sqlite")
    released = [row for row in rows if row.channel == "profile" and row.kind == "RELEASED"]
    assert len(released) == 2
    (client,) = json.loads((_state(directory, "client-1") / "statement.json").read_text())["clients"]
    (channel,) = (c for c in client["channels"] if c["channel"] == "profile")
    # The rounds share no example, so each example pays for one of the two releases.
    alone = epsilon([GaussianEvent(scenario.profile.noise_multiplier, 1.0, 1)], client["delta"])
    assert channel["epsilon"] == pytest.approx(alone, rel=1e-6)
    assert all(row.disjoint for row in rows if row.channel == "profile" and row.kind == "RESERVED")


def test_a_host_keeps_the_clients_apart(tiny_scenario: Any) -> None:
    hosts, _ = simulation.make_models(tiny_scenario())
    host: SharedModel = next(iter(hosts.values()))
    first, second = AdapterState(), AdapterState()
    with host.with_adapter(first) as model, torch.no_grad():
        for parameter in host._adapter.values():
            parameter.fill_(1.0)
    with host.with_adapter(second) as model:
        assert not read_shared(model).any()
    with host.with_adapter(first) as model:
        assert (read_shared(model) == 1.0).all()


def test_a_test_prompt_in_training_is_refused(tiny_scenario: Any, tiny_folder: Path) -> None:
    scenario = tiny_scenario()
    leaking = scenario.clients[0].model_copy(update={"train": tiny_folder / "test-3.jsonl"})
    with pytest.raises(ConfigurationError, match="test prompt"):
        Evaluation(scenario.model_copy(update={"clients": (leaking, *scenario.clients[1:])}))


def test_processes_refuse_what_they_do_not_know(tiny_scenario: Any) -> None:
    changes = {"method": "fedavg", "stream": "static", "discard_received": True, "equal_compute": True}
    with pytest.raises(ConfigurationError, match="'fedavg', stream 'static', discard_received, equal"):
        check_as_processes(tiny_scenario(**changes))
    check_as_processes(tiny_scenario())


def _with_two_tasks(scenario: Any) -> Any:
    """Client 0 has client 1's task besides its own."""
    first, second, *rest = scenario.clients
    tasks = [ScenarioTask(name=c.task, train=c.train, test=c.test) for c in (first, second)]
    both = ScenarioClient(id=first.id, tasks=tuple(tasks), model=first.model, family=first.family)
    return scenario.model_copy(update={"clients": (both, second, *rest)})


def test_a_process_has_all_its_tasks_in_one_file(tiny_scenario: Any, tmp_path: Path) -> None:
    scenario = _with_two_tasks(tiny_scenario(evaluation_examples=5, others_examples=2))
    settings = {}
    for client in scenario.clients:
        kit = tmp_path / "federation" / "clients" / client.id
        kit.mkdir(parents=True)
        client_process(scenario, client, tmp_path, 7443)
        settings[client.id] = read_configuration(kit / "client.json", ClientSettings)
    first, last = settings["client-0"].data, settings["client-3"].data
    parts = [read_examples(task.train) for task in scenario.clients[0].task_list]
    assert isinstance(first.train, Path)
    merged = read_examples(first.train)
    assert len(merged) == sum(map(len, parts))
    assert [example.prompt for example in merged] == [e.prompt for part in parts for e in part]
    assert {example.id.partition("/")[0] for example in merged} == {"task-0", "task-1"}
    # Limits are for each task, and the files are cut to them.
    assert (first.evaluation_examples, first.others_examples) == (0, 0)
    assert isinstance(first.test, Path)
    assert len(read_examples(first.test)) == 10
    others = {}
    for name, path in last.others.items():
        assert isinstance(path, Path)
        others[name] = len(read_examples(path))
    assert others == {"client-0": 4, "client-1": 2, "client-2": 2}
    assert last.train == scenario.clients[3].train


def test_changes_on_the_command_line_are_checked(tiny_scenario: Any) -> None:
    arguments = runner.Arguments(Path("x.toml"), set=("relevance.temperature=0.2", "stream=static"), seed=3)
    changed = runner._changed(tiny_scenario(), arguments)
    assert (changed.relevance.temperature, changed.stream, changed.seed) == (0.2, "static", 3)
    assert changed.variant == "relevance.temperature=0.2 stream=static"
    for wrong in ("temperature", "relevance.temprature=1", "nothing.here=1"):
        with pytest.raises(ConfigurationError):
            runner._changed(tiny_scenario(), runner.Arguments(Path("x.toml"), set=(wrong,)))


@pytest.mark.slow
def test_processes_still_run_a_scenario(tmp_path: Path, tiny_scenario: Any) -> None:
    directory = runner.run(_with_two_tasks(tiny_scenario()), tmp_path, tmp_path, Console(quiet=True))
    record = read_run(directory)
    assert set(record.clients) == {f"client-{n}" for n in range(4)}
    assert all("after" in result for result in record.clients.values())
    with pytest.raises(ConfigurationError, match="no run of one process"):
        runner.resume(directory, Console(quiet=True))


def _sampled_sums(make: Any) -> Any:
    base = make(
        adapter={"rank": 2, "blocks": 2, "protection": "distributed-dp"},
        adapter_privacy={"steps_per_round": 1, "expected_batch_size": 4, "largest_delta": 1e-3},
        group_sums={"minimum_contributors": 3, "least_examples": 8, "noise_multiplier": 2.0},
        schedule={"rounds": 3, "quorum": 2, "sampled_clients": 3},
        unsafe_test_noise_seed=5,
        score="nothing",
    )
    alike = base.clients[1].model_dump()
    clients = tuple(ScenarioClient.model_validate(alike | {"id": f"c{n}"}) for n in range(6))
    return base.model_copy(update={"clients": clients})


def test_sums_in_one_process_are_of_those_drawn_and_reach_all(tmp_path: Path, tiny_scenario: Any) -> None:
    """A turn ends with its round: the member that closes one would wait alone in the next one's sum."""
    console = Console(file=io.StringIO(), width=200)
    record = read_run(runner.run_here(_sampled_sums(tiny_scenario), tmp_path, tmp_path, console))
    results = record.server["results"]
    assert [len(result["uploaded"]) for result in results] == [6, 3, 3]
    assert [len(result["received"]) for result in results] == [0, 6, 6], "whoever was not drawn too"
    assert "100% of the training" in console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO


@pytest.mark.slow
def test_the_same_seed_gives_the_same_sums_of_those_drawn(tmp_path: Path, tiny_scenario: Any) -> None:
    scenario, console = _sampled_sums(tiny_scenario), Console(quiet=True)
    one, again = (
        last_adapters(runner.run_here(scenario, tmp_path, tmp_path / f"r{n}", console)) for n in range(2)
    )
    assert all(np.array_equal(adapter, again[name]) for name, adapter in one.items())
