"""Write a DRAKE scenario as files that `fedmosaic run` takes: examples with named pictures, and the TOML.

Terms of the training are those that the authors state for their comparison.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from fedmosaic.client.model.examples import Example
from fedmosaic.experiments.tasks.drake.read import DrakeClient, DrakeTask, drake_scenario, read_dataset
from fedmosaic.experiments.tasks.labelled import write_examples
from fedmosaic.protos.errors import ConfigurationError

_PARTS: Final[tuple[Literal["train", "test"], ...]] = ("train", "test")
_MOST_CHOICES: Final = 26
_PROBES: Final = ("thkim0305/qwen2.5_0.5B_vl", "thkim0305/llama3.2_1B_vl")
"""The first of these that a scenario uses reads the task profiles; the first of all where it uses neither."""

_HEAD: Final = """# Written by `fedmosaic tasks drake`: {name}, with the authors' terms.
name = {name_text}
stream = "dynamic"
pictures = {pictures}
allow_plaintext = true
evaluate_every = 5

[probe]
path = {probe}

[profile]
public_data = {public}

[adapter]
rank = 128
alpha = 256
protection = "none"

[encryption]
backend = "plain"

[relevance]
temperature = 0.5

[schedule]
rounds = 20
quorum = {count}

[training]
steps = 100
per_device_train_batch_size = 4
max_length = {max_length}
learning_rate = 2e-5
shared_learning_rate = 5e-5
gate_learning_rate = 2e-5
"""


@dataclass(frozen=True)
class DrakeFiles:
    """What is written from what.

    Attributes:
        data: folder of the data sets, which the pictures' paths start from too.
        scenario: its name in the authors' repository.
        public: public examples, JSON lines.
        out: where to write; made if absent.
        model: in place of every client's model and of the probe; the scenario's own if None.
        projector: of that model, where it is no vision-language model itself.
        max_length: tokens of an example, pictures among them.
    """

    data: Path
    scenario: str
    public: Path
    out: Path
    model: str | None = None
    projector: Path | None = None
    max_length: int = 4096


def write_drake(files: DrakeFiles) -> Path:
    """Write the examples of every task and the scenario.

    Returns:
        The scenario file.

    Raises:
        ConfigurationError: a data set is missing or malformed, or a question that is scored by its choices
            has none.
    """
    clients = drake_scenario(files.scenario)
    lines = [_head(files, clients)]
    for client in clients:
        name = f"client-{client.number}"
        lines.append(_client(files, client, name))
        for task in client.tasks:
            parts = {part: _examples(files, task, part) for part in _PARTS}
            answers = {example.answer for examples in parts.values() for example in examples}
            for part, examples in parts.items():
                path = files.out / name / f"{task.name}.{part}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_examples(path, with_choices(task, examples, answers))
            lines.append(_task(task, name))
    path = files.out / f"{files.scenario}.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def with_choices(task: DrakeTask, examples: Sequence[Example], answers: Collection[str]) -> list[Example]:
    """Give each question its choices where it is scored by them.

    A prompt that lists none takes the answers of the whole task, if they are a closed set of 2 to 26.

    Args:
        task: whose questions they are.
        examples: training or test examples.
        answers: different answers of both.

    Raises:
        ConfigurationError: they are not.
    """
    if task.metric == "f1":
        return [replace(example, choices=()) for example in examples]
    lacking = sum(len(example.choices) < 2 for example in examples)
    if lacking and not 2 <= len(answers) <= _MOST_CHOICES:
        raise ConfigurationError(
            f"task {task.name}: {lacking} questions list no choices, and the task has {len(answers)} "
            "different answers; score it by F1"
        )
    closed = tuple(sorted(answers))
    return [example if len(example.choices) > 1 else replace(example, choices=closed) for example in examples]


def _examples(files: DrakeFiles, task: DrakeTask, part: Literal["train", "test"]) -> list[Example]:
    return [record.example() for record in read_dataset(files.data, task.dataset, task.subset, part)]


def _head(files: DrakeFiles, clients: Sequence[DrakeClient]) -> str:
    used = {client.model for client in clients}
    probe = next((model for model in _PROBES if model in used), _PROBES[0])
    return _HEAD.format(
        name=files.scenario,
        name_text=_text(files.scenario.replace("_", "-").lower()),
        pictures=_text(files.data.resolve()),
        probe=_text(files.model or probe),
        public=_text(files.public.resolve()),
        count=len(clients),
        max_length=files.max_length,
    )


def _client(files: DrakeFiles, client: DrakeClient, name: str) -> str:
    model = files.model or client.model
    lines = ["[[clients]]", f"id = {_text(name)}", f"family = {_text(Path(model).name)}"]
    lines.append(f"model.path = {_text(model)}")
    if files.projector is not None:
        lines.append(f"projector = {_text(files.projector.resolve())}")
    return "\n".join(lines) + "\n"


def _task(task: DrakeTask, client: str) -> str:
    lines = ["[[clients.tasks]]", f"name = {_text(task.name)}"]
    lines += [f"{part} = {_text(f'{client}/{task.name}.{part}.jsonl')}" for part in ("train", "test")]
    return "\n".join([*lines, f"metric = {_text(task.metric)}"]) + "\n"


def _text(value: str | Path) -> str:
    """A TOML string; JSON's escapes are among TOML's."""
    return json.dumps(str(value), ensure_ascii=False)
