"""The picture benchmark with DRAKE's structure: ten clients, each with four tasks of its own domain in order.

`fedmosaic tasks pictures --data DIR --out DIR` writes it: examples that name their pictures, the pictures,
and a table with a baseline that sees no picture. Splits are fixed by hashes of what belongs together (a
picture, a character, a statement with its pictures), so no test picture is trained on by anybody.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from PIL import Image

from fedmosaic.client.examples import Example
from fedmosaic.experiments.tasks import picture_sources as source
from fedmosaic.experiments.tasks.labelled import stable_hash, write_examples
from fedmosaic.experiments.tasks.picture_sources import ReadPictures
from fedmosaic.experiments.tasks.text_sets import split_rows
from fedmosaic.experiments.tasks.text_sources import public_texts
from fedmosaic.experiments.vision.words import pictures_in, without_pictures
from fedmosaic.protos.errors import ConfigurationError


@dataclass(frozen=True)
class PictureTask:
    """A task, where its rows come from, and what kind of question it asks."""

    read: ReadPictures
    domain: str
    origin: str
    licence: str


def _same(alphabet: str) -> PictureTask:
    return PictureTask(source.same_character(alphabet), "visual relation", "Omniglot", "MIT")


def _alike(*alphabets: str) -> PictureTask:
    first, second = alphabets
    return PictureTask(source.same_alphabet((first, second)), "visual relation", "Omniglot", "MIT")


def _which(*alphabets: str) -> PictureTask:
    return PictureTask(source.which_alphabet(alphabets), "VQA", "Omniglot", "MIT")


def _nlvr(pattern: str, *, towers: bool, without: str = "") -> PictureTask:
    read = source.nlvr(pattern, towers=towers, without=without)
    return PictureTask(read, "visual reasoning", "NLVR", "CC BY 4.0")


def _shapes(pattern: str) -> PictureTask:
    return PictureTask(source.shapes(pattern), "visual reasoning", "SHAPES", "BSD-2-Clause")


def _radiographs(organ: str) -> dict[str, PictureTask]:
    kinds = {
        "present": ("PRES",),
        "size": ("SIZE", "COUNT", "POS"),
        "look": ("ABN", "ATTRIB", "COLOR"),
        "how": ("MODALITY", "PLANE", "ORGAN", "OTHER"),
    }
    return {
        name: PictureTask(source.radiographs(organ, of_name), "VQA", "VQA-RAD", "CC0 1.0")
        for name, of_name in kinds.items()
    }


_PLACE: Final = r"\b(top|base|bottom)\b"
_COUNT: Final = r"\b(two|three|four|five|six|2|3|4|5|6) \w*\s*(block|tower)"
_EDGE: Final = r"touch|edge|wall|corner"
_LEAST: Final = r"at ?least"
_EXACT: Final = r"exactly|only"

PICTURES_TEN: Final[dict[str, dict[str, PictureTask]]] = {
    "characters-a": {
        "balinese": _same("Balinese"),
        "aramaic": _same("Early_Aramaic"),
        "greek": _same("Greek"),
        "latin": _same("Latin"),
    },
    "characters-b": {
        "korean": _same("Korean"),
        "katakana": _same("Japanese_(katakana)"),
        "sanskrit": _same("Sanskrit"),
        "tagalog": _same("Tagalog"),
    },
    "scripts": {
        "greek-korean": _alike("Greek", "Korean"),
        "latin-katakana": _alike("Latin", "Japanese_(katakana)"),
        "sanskrit-aramaic": _alike("Sanskrit", "Early_Aramaic"),
        "balinese-tagalog": _alike("Balinese", "Tagalog"),
    },
    "towers": {
        "place": _nlvr(_PLACE, towers=True),
        "count": _nlvr(_COUNT, towers=True, without=_PLACE),
        "one": _nlvr(r"\b(one|1)\b", towers=True, without=f"{_PLACE}|{_COUNT}"),
        "rest": _nlvr("", towers=True, without=rf"{_PLACE}|{_COUNT}|\b(one|1)\b"),
    },
    "boxes": {
        "edge": _nlvr(_EDGE, towers=False),
        "least": _nlvr(_LEAST, towers=False, without=_EDGE),
        "exactly": _nlvr(_EXACT, towers=False, without=f"{_EDGE}|{_LEAST}"),
        "rest": _nlvr("", towers=False, without=f"{_EDGE}|{_LEAST}|{_EXACT}"),
    },
    "shapes": {
        "what": _shapes(r"^is a \w+ (shape )?(a \w+|red|green|blue)$"),
        "beside": _shapes(r"^is a \w+ (shape )?(left|right) of a "),
        "above": _shapes(r"^is a \w+ (shape )?(above|below) a "),
        "two-steps": _shapes(r"(above|below|of) (above|below|left|right)"),
    },
    "chest": _radiographs("CHEST"),
    "abdomen": _radiographs("ABD"),
    "head": _radiographs("HEAD"),
    "writing": {
        "greek-or-korean": _which("Greek", "Korean"),
        "latin-or-katakana": _which("Latin", "Japanese_(katakana)"),
        "sanskrit-or-aramaic": _which("Sanskrit", "Early_Aramaic"),
        "four": _which("Balinese", "Tagalog", "Korean", "Latin"),
    },
}
"""Domain, then task in order."""


@dataclass(frozen=True)
class WrittenTask:
    """The examples of a task, and what makes their pictures, by path."""

    client: str
    name: str
    task: PictureTask
    train: list[Example]
    test: list[Example]
    pictures: dict[str, Callable[[], Image.Image]]


def build(data: Path, train_rows: int, test_rows: int) -> Iterator[WrittenTask]:
    """Split every task.

    Args:
        data: folder with the data sets.
        train_rows: most training examples per task.
        test_rows: most test examples per task.

    Yields:
        The tasks in order.

    Raises:
        ConfigurationError: a data set is missing, or a task has hardly any rows.
    """
    seen: set[str] = set()
    for client, tasks in PICTURES_TEN.items():
        for name, task in tasks.items():
            try:
                rows = list(task.read(data))
            except OSError as error:
                raise ConfigurationError(
                    f"{error.filename} is missing; task {name} needs {task.origin} in the data folder"
                ) from None
            train, test = split_rows(
                f"{client}/{name}", [row.row for row in rows], train_rows, test_rows, seen
            )
            if len(train) < 8 or len(test) < 8:
                raise ConfigurationError(
                    f"task {name} has {len(train)} training and {len(test)} test rows; give eight of each"
                )
            used = {path for example in (*train, *test) for path in pictures_in(example.prompt)}
            made = {path: make for row in rows for path, make in row.pictures.items() if path in used}
            yield WrittenTask(client, name, task, train, test, made)


def question_only(train: Sequence[Example], test: Sequence[Example]) -> float:
    """Accuracy without a picture: the answer that the same words had most often in training.

    Args:
        train: examples to learn from; words not among them get the most frequent answer of all.
        test: examples to score.

    Returns:
        Accuracy in [0, 1].
    """
    answers: dict[str, Counter[str]] = {}
    for example in train:
        answers.setdefault(without_pictures(example).prompt, Counter())[example.answer] += 1
    overall = sum(answers.values(), Counter[str]())
    guesses = [
        answers.get(without_pictures(example).prompt, overall).most_common(1)[0][0] for example in test
    ]
    return sum(g == e.answer for g, e in zip(guesses, test, strict=True)) / len(test)


def write_pictures(
    data: Path, out: Path, train_rows: int, test_rows: int, public_rows: int
) -> dict[str, dict[str, object]]:
    """Write the set, its pictures, public examples without pictures, and its table.

    Args:
        data: folder with the data sets.
        out: made if absent; `<client>/<task>.train.jsonl`, `<client>/<task>.test.jsonl`, `pictures/`,
            `public.jsonl` and `table.json` are written into it.
        train_rows: most training examples per task.
        test_rows: most test examples per task.
        public_rows: most public examples.

    Returns:
        What `table.json` says, per task.
    """
    table: dict[str, dict[str, object]] = {}
    for written in build(data, train_rows, test_rows):
        folder = out / written.client
        folder.mkdir(parents=True, exist_ok=True)
        write_examples(folder / f"{written.name}.train.jsonl", written.train)
        write_examples(folder / f"{written.name}.test.jsonl", written.test)
        for path, make in written.pictures.items():
            if not (out / path).exists():
                (out / path).parent.mkdir(parents=True, exist_ok=True)
                make().save(out / path)
        most = Counter(example.answer for example in written.test).most_common(1)[0][1]
        table[f"{written.client}/{written.name}"] = {
            "domain": written.task.domain,
            "train": len(written.train),
            "test": len(written.test),
            "pictures": len(written.pictures),
            "most_frequent_answer": round(most / len(written.test), 3),
            "question_only": round(question_only(written.train, written.test), 3),
            "origin": written.task.origin,
            "licence": written.task.licence,
        }
    pairs = sorted(set(public_texts(data)), key=lambda pair: stable_hash("public", pair[0]))
    usable = (pair for pair in pairs if all(pair))
    public = [
        Example(f"public-{stable_hash('public id', '|'.join(pair)):016x}", *pair)
        for pair in islice(usable, public_rows)
    ]
    write_examples(out / "public.jsonl", public)
    (out / "table.json").write_text(json.dumps(table, indent=2) + "\n")
    return table
