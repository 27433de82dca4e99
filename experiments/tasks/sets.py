"""Sets of tasks: nothing that anybody is tested on is trained on, and no prompt is at two clients."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from fedmosaic.client.model.examples import Example
from fedmosaic.client.vision.inputs import images_in, without_images
from fedmosaic.experiments.scenario.participants import write_examples
from fedmosaic.experiments.tasks.images import SIBLINGS
from fedmosaic.experiments.tasks.labelled import normalise, stable_hash
from fedmosaic.experiments.tasks.rows import Row, Task, TaskSet, in_test
from fedmosaic.experiments.tasks.texts import TEXT_SETS, public_texts
from fedmosaic.protos.errors import ConfigurationError

SETS: Final[dict[str, TaskSet]] = {**TEXT_SETS, "images-siblings": SIBLINGS}
_FEWEST: Final = 8


@dataclass(frozen=True)
class Size:
    """Most training and test examples per task, and public ones; or validation examples in place of test."""

    train: int
    test: int
    public: int
    tuning: bool = False


@dataclass(frozen=True)
class SplitTask:
    """The examples of one client's task, and the rows that their images are made from."""

    client: str
    name: str
    task: Task
    train: list[Example]
    test: list[Example]
    rows: list[Row]


def split_set(tasks: TaskSet, data: Path, size: Size) -> Iterator[SplitTask]:
    """Split every task of a set; `ConfigurationError` if data is missing, or there are hardly any rows."""
    seen: set[str] = set()
    for client, of_client in tasks.items():
        for name, task in of_client.items():
            try:
                rows = list(task.read(data))
            except OSError as error:
                raise ConfigurationError(
                    f"{error.filename} is missing; task {name} needs {task.origin} in the data folder"
                ) from None
            train, test = split_rows(f"{client}/{name}", rows, size, seen)
            if min(len(train), len(test)) < _FEWEST:
                raise ConfigurationError(
                    f"task {name} has {len(train)} training and {len(test)} test rows; give {_FEWEST} of each"
                )
            yield SplitTask(client, name, task, train, test, rows)


def split_rows(
    name: str, rows: Sequence[Row], size: Size, seen: set[str]
) -> tuple[list[Example], list[Example]]:
    """Training and test (or validation) examples: distinct rows by hash of their group, the first by hash.

    Validation examples come from the part for training, of groups that no training example is of; the
    training examples stay the same. `seen` are normalised prompts that another task uses already; those of
    this one are added.
    """
    train: list[Example] = []
    test: list[Example] = []
    trained_groups: set[str] = set()
    for row in sorted(rows, key=lambda r: stable_hash("row order", r.prompt)):
        key, group = normalise(row.prompt), normalise(row.group)
        if not key or key in seen or row.answer not in row.choices:
            continue
        tested = in_test(row.group)
        wanted = not tested and group not in trained_groups if size.tuning else tested
        if not tested and len(train) < size.train:
            part = train
            trained_groups.add(group)
        elif len(test) < size.test and wanted:
            part = test
        else:
            continue
        seen.add(key)
        part.append(Example(f"{name}-{stable_hash('row id', key):016x}", row.prompt, row.answer, row.choices))
    return train, test


def question_only(train: Sequence[Example], test: Sequence[Example]) -> float:
    """Accuracy of the answer that the same words had most often in training, or else of the commonest."""
    answers: dict[str, Counter[str]] = {}
    for example in train:
        answers.setdefault(without_images(example).prompt, Counter())[example.answer] += 1
    overall = sum(answers.values(), Counter[str]())
    guesses = [answers.get(without_images(e).prompt, overall).most_common(1)[0][0] for e in test]
    return sum(guess == e.answer for guess, e in zip(guesses, test, strict=True)) / len(test)


def write_set(tasks: TaskSet, data: Path, out: Path, size: Size) -> dict[str, dict[str, object]]:
    """Write a set below `out`, and give what `table.json` says: sizes, origins and licences by task."""
    table: dict[str, dict[str, object]] = {}
    for found in split_set(tasks, data, size):
        folder = out / found.client
        folder.mkdir(parents=True, exist_ok=True)
        write_examples(folder / f"{found.name}.train.jsonl", found.train)
        write_examples(folder / f"{found.name}.test.jsonl", found.test)
        most = Counter(example.answer for example in found.test).most_common(1)[0][1]
        table[f"{found.client}/{found.name}"] = {
            "train": len(found.train),
            "test": len(found.test),
            "images": _write_images(found, out),
            "most_frequent_answer": round(most / len(found.test), 3),
            "question_only": round(question_only(found.train, found.test), 3),
            "origin": found.task.origin,
            "licence": found.task.licence,
        }
    _write_public(data, out, size.public)
    (out / "table.json").write_text(json.dumps(table, indent=2) + "\n")
    return table


def _write_images(found: SplitTask, out: Path) -> int:
    used = {path for example in (*found.train, *found.test) for path in images_in(example.prompt)}
    images = {path: make for row in found.rows for path, make in row.images.items() if path in used}
    for path, make in images.items():
        if not (out / path).exists():
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            make().save(out / path)
    return len(images)


def _write_public(data: Path, out: Path, rows: int) -> None:
    """Instructions and texts that no client has, for bases and for servers that distil."""
    pairs = sorted(set(public_texts(data)), key=lambda pair: stable_hash("public", pair[0]))
    public = [
        Example(f"public-{stable_hash('public id', '|'.join(pair)):016x}", *pair)
        for pair in islice((pair for pair in pairs if all(pair)), rows)
    ]
    write_examples(out / "public.jsonl", public)
