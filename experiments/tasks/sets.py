"""Sets of tasks: nothing that anybody is tested on is trained on, and no prompt is at two clients."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedmosaic.client.model.examples import Example
from fedmosaic.client.vision.inputs import images_in, without_images
from fedmosaic.experiments.scenario.participants import write_examples
from fedmosaic.experiments.tasks.images import SIBLINGS
from fedmosaic.experiments.tasks.labelled import normalise, stable_hash
from fedmosaic.experiments.tasks.rows import Row, TaskSet, in_test
from fedmosaic.experiments.tasks.texts import TEXT_SETS, public_texts
from fedmosaic.protos.errors import ConfigurationError

SETS: Final[dict[str, TaskSet]] = {**TEXT_SETS, "images-siblings": SIBLINGS}
_FEWEST: Final = 8


@dataclass(frozen=True)
class Size:
    """How much of a set is written."""

    train_rows: int = 400
    """Most training examples per task."""
    test_rows: int = 100
    """Most test examples per task."""
    public_rows: int = 600
    """Most public examples, for the basis of the task profile and for servers that distil."""
    tuning: bool = False
    """Write validation examples, taken from the part for training, in place of the test examples."""


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
        if not tested and len(train) < size.train_rows:
            part = train
            trained_groups.add(group)
        elif len(test) < size.test_rows and wanted:
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
    """Write a set below `out`, and give what `table.json` says: sizes, origins and licences by task.

    `ConfigurationError` if data is missing, or there are hardly any rows.
    """
    table: dict[str, dict[str, object]] = {}
    seen: set[str] = set()
    for client, name, task in ((c, n, t) for c, of_client in tasks.items() for n, t in of_client.items()):
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
        (out / client).mkdir(parents=True, exist_ok=True)
        write_examples(out / client / f"{name}.train.jsonl", train)
        write_examples(out / client / f"{name}.test.jsonl", test)
        most = Counter(example.answer for example in test).most_common(1)[0][1]
        used = {path for example in (*train, *test) for path in images_in(example.prompt)}
        images = {path: make for row in rows for path, make in row.images.items() if path in used}
        for path, make in images.items():
            if not (out / path).exists():
                (out / path).parent.mkdir(parents=True, exist_ok=True)
                make().save(out / path)
        table[f"{client}/{name}"] = {
            "train": len(train),
            "test": len(test),
            "images": len(images),
            "most_frequent_answer": round(most / len(test), 3),
            "question_only": round(question_only(train, test), 3),
            "origin": task.origin,
            "licence": task.licence,
        }
    # Instructions and texts that no client has, for bases and for servers that distil.
    pairs = sorted(filter(all, set(public_texts(data))), key=lambda pair: stable_hash("public", pair[0]))
    public = [
        Example(f"public-{stable_hash('public id', '|'.join(pair)):016x}", *pair)
        for pair in pairs[: size.public_rows]
    ]
    write_examples(out / "public.jsonl", public)
    (out / "table.json").write_text(json.dumps(table, indent=2) + "\n")
    return table
