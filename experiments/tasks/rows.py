"""Rows of a set of tasks; splits are fixed by hashes of what belongs together, the same everywhere."""

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


def part_of(task: Task, number: int, parts: int, purpose: str, key: Callable[[Row], str]) -> Task:
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
