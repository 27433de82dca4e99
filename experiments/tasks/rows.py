"""Rows of a set of tasks; splits are fixed by hashes of what belongs together, the same everywhere."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from PIL import Image

from fedmosaic.experiments.tasks.labelled import normalise, stable_hash

_TEST_SHARE: Final = 0.25


@dataclass(frozen=True)
class Row:
    """One question, with its choices, all different, and what makes each image that the prompt names.

    `group` is what must not be divided between training and test, such as a passage.
    """

    prompt: str
    answer: str
    choices: tuple[str, ...]
    group: str
    images: Mapping[str, Callable[[], Image.Image]] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A task: what yields its rows from the folder with the data sets, and where they come from."""

    read: Callable[[Path], Iterator[Row]]
    origin: str
    licence: str


TaskSet = dict[str, dict[str, Task]]
"""Tasks in order, by client."""


def in_test(group: str) -> bool:
    """On which side of the border between training and test a group lies."""
    return stable_hash("row test", normalise(group)) < int(_TEST_SHARE * 2**64)


def part_of(
    task: Task, number: int, parts: int, purpose: str, key: Callable[[Row], str] = lambda row: row.group
) -> Task:
    """One of several equal parts of a task's rows, by the hash of a key of each."""

    def read(data: Path) -> Iterator[Row]:
        return (row for row in task.read(data) if stable_hash(purpose, normalise(key(row))) % parts == number)

    return replace(task, read=read)


def question(choices: tuple[str, ...]) -> str:
    """`a, b or c?`."""
    return f"{', '.join(choices[:-1])} or {choices[-1]}?"


def read_json(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[Any]:
    """What a file of JSON lines holds."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table with a line of heads."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_requests(data: Path) -> list[tuple[str, str]]:
    """All requests of CLINC150 with their intents; those out of scope are in other parts of the file."""
    content = read_json(data / "clinc150" / "data_full.json")
    return [(text, intent) for part in ("train", "val", "test") for text, intent in content[part]]


def read_instructions(data: Path) -> Iterator[tuple[str, str, str]]:
    """Name of the file, instruction with its input, and answer of every instance of self-instruct."""
    for path in sorted((data / "self_instruct").glob("*.jsonl")):
        for row in read_lines(path):
            for instance in row["instances"]:
                yield path.stem, f"{row['instruction']}\n{instance['input']}", str(instance["output"])


def read_running_text(data: Path, least: int) -> Iterator[list[str]]:
    """The words of every line of WikiText-2 that has so many."""
    for path in sorted((data / "wikitext2").glob("*.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if len(words) >= least:
                yield words
