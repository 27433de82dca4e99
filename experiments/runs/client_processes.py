"""The clients of a scenario as processes of their own: what they cannot do, their files, their start."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Literal

from fedmosaic.client.model.examples import Example, read_examples
from fedmosaic.experiments.scenario.processes import ManagedProcess, python_module
from fedmosaic.experiments.scenario.terms import Scenario, ScenarioClient
from fedmosaic.experiments.tasks.labelled import write_examples
from fedmosaic.protos.errors import ConfigurationError

_Part = Literal["train", "test", "others"]


def check_as_processes(scenario: Scenario) -> None:
    """Refuse what only one process can do.

    Raises:
        ConfigurationError: naming what that is.
    """
    reasons = {
        f"method {scenario.method!r}": scenario.method != "fedmosaic",
        f"stream {scenario.stream!r}": scenario.stream != "all",
        "a fixed gate": scenario.fixed_gate is not None,
        "discard_received": scenario.discard_received,
        "family_sharing (give adapter.family_dimensions)": scenario.family_sharing,
        "question_only": scenario.question_only,
        "equal compute": scenario.equal_compute,
        "unseen clients": bool(scenario.unseen),
        "test noise": scenario.unsafe_test_noise_seed is not None,
        "a metric other than accuracy": any(
            task.metric != "accuracy" for client in scenario.clients for task in client.task_list
        ),
        f"seed {scenario.seed}": scenario.seed != 0,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ConfigurationError(
            f"scenario {scenario.name} has {', '.join(found)}, which client processes do not know; run it in "
            "one process, without --processes"
        )


def client_process(scenario: Scenario, client: ScenarioClient, directory: Path, port: int) -> ManagedProcess:
    """Write a client's settings into its kit, and its tasks as one file where it has several.

    Args:
        scenario: paths resolved.
        client: one of its clients.
        directory: of the run; the kit is there already.
        port: of the server on this machine.

    Returns:
        The process, not started yet.
    """
    place = directory / "federation" / "clients" / client.id
    several = _several_tasks(scenario)
    settings = {
        "kit": str(place),
        "server": f"localhost:{port}",
        "state_dir": str(place / "state"),
        "model": client.model.model_dump(exclude_none=True),
        "probe": scenario.probe.model_dump(exclude_none=True),
        **({"projector": str(client.projector)} if client.projector else {}),
        "data": {
            "train": str(_data_file(client, "train", several, 0, directory)),
            # Every run of a scenario is an experiment of its own, on data that many of them share.
            "ledger": str(place / "ledger"),
            "test": str(_data_file(client, "test", several, scenario.evaluation_examples, directory)),
            "others": _others(scenario, client, directory),
            # A limit is for each task: where clients have several, their files are cut already.
            "evaluation_examples": 0 if several else scenario.evaluation_examples,
            "others_examples": 0 if several else scenario.others_examples,
            **({"pictures": str(scenario.pictures)} if scenario.pictures else {}),
        },
        "training": scenario.training.model_dump(mode="json", exclude_none=True),
        "profile_max_length": scenario.profile.max_length,
        "threads": 1,
    }
    path = place / "client.json"
    path.write_text(json.dumps(settings, indent=2) + "\n")
    return ManagedProcess(
        client.id, python_module("fedmosaic.client", str(path)), directory / f"{client.id}.log"
    )


def _several_tasks(scenario: Scenario) -> bool:
    return any(len(client.task_list) > 1 for client in scenario.clients)


def _others(scenario: Scenario, client: ScenarioClient, directory: Path) -> dict[str, str]:
    """Test sets of the others, by task, or by client where that has several; of a task alike there is one."""
    several, limit = _several_tasks(scenario), scenario.others_examples
    return {
        other.task or other.id: str(_data_file(other, "others", several, limit, directory))
        for other in scenario.clients
        if other.id != client.id and (not other.task or other.task != client.task)
    }


def _data_file(client: ScenarioClient, part: _Part, several: bool, limit: int, directory: Path) -> Path:
    """A client's own file, or one of all its tasks, each cut to its first examples (0 for all)."""
    paths = [task.train if part == "train" else task.test for task in client.task_list]
    if len(paths) == 1 and (part == "train" or not several):
        return paths[0]
    merged = directory / "data" / f"{client.id}.{part}.jsonl"
    if not merged.exists():
        merged.parent.mkdir(exist_ok=True)
        tasks = [read_examples(path)[: limit or None] for path in paths]
        names = [task.name for task in client.task_list]
        write_examples(merged, list(_alternating(names, tasks)))
    return merged


def _alternating(names: Sequence[str], tasks: Sequence[Sequence[Example]]) -> Iterator[Example]:
    """Examples of the tasks in turn; ids name their task."""
    named = [[replace(e, id=f"{name}/{e.id}") for e in task] for name, task in zip(names, tasks, strict=True)]
    return (example for example in chain.from_iterable(zip_longest(*named)) if example is not None)
