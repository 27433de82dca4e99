"""The clients of a scenario as processes of their own: what they cannot do, their files, their start."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

from fedmosaic.client.model.examples import read_examples
from fedmosaic.experiments.scenario.participants import write_examples
from fedmosaic.experiments.scenario.processes import ManagedProcess, python_module
from fedmosaic.experiments.scenario.terms import Scenario, ScenarioClient
from fedmosaic.protos.errors import ConfigurationError


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
        f"seed {scenario.seed}": scenario.seed != 0,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ConfigurationError(
            f"scenario {scenario.name} has {', '.join(found)}, which client processes do not know; run it in "
            "one process, without --processes"
        )


def client_process(
    scenario: Scenario, client: ScenarioClient, directory: Path, port: int, compare_alone: bool = False
) -> ManagedProcess:
    """Write a client's settings into its kit in the run's directory; gives the process, not started yet."""
    place = directory / "federation" / "clients" / client.id
    others = {
        other.id: str(_data_file(other, "others", scenario.others_examples, directory))
        for other in scenario.clients
        if other.id != client.id
    }
    settings = {
        "kit": str(place),
        "server": f"localhost:{port}",
        "state_dir": str(place / "state"),
        "model": client.model.model_dump(exclude_none=True),
        "probe": scenario.probe.model_dump(exclude_none=True),
        **({"projector": str(client.projector)} if client.projector else {}),
        "data": {
            "train": str(_data_file(client, "train", 0, directory)),
            # Every run of a scenario is an experiment of its own, on data that many of them share.
            "ledger": str(place / "ledger"),
            "test": str(_data_file(client, "test", scenario.evaluation_examples, directory)),
            "others": others,
            **({"pictures": str(scenario.images)} if scenario.images else {}),
        },
        "training": scenario.training.model_dump(mode="json", exclude_none=True),
        "profile_max_length": scenario.profile.max_length,
        "compare_alone": compare_alone,
        "threads": 1,
    }
    path = place / "client.json"
    path.write_text(json.dumps(settings, indent=2) + "\n")
    return ManagedProcess(
        client.id, python_module("fedmosaic.client", str(path)), directory / f"{client.id}.log"
    )


def _data_file(
    client: ScenarioClient, part: Literal["train", "test", "others"], limit: int, run: Path
) -> Path:
    """A client's own file, or one of all its tasks, each cut to its first examples (0 for all)."""
    files = [task.train if part == "train" else task.test for task in client.task_list]
    if len(files) == 1 and not limit:
        return files[0]
    path = run / "data" / f"{client.id}.{part}.jsonl"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        named = zip(client.task_list, files, strict=True)
        cut = [(task.name, e) for task, file in named for e in read_examples(file)[: limit or None]]
        write_examples(path, [replace(example, id=f"{name}/{example.id}") for name, example in cut])
    return path
