"""Sets of picture tasks: one with DRAKE's structure, ten clients with four tasks each in order, and siblings.

`fedmosaic tasks pictures --data DIR --out DIR` writes one: examples that name their pictures, the pictures,
and a table with a baseline that sees no picture. Splits are fixed by hashes of what belongs together (a
picture, a character, a statement with its pictures), so no test picture is trained on by anybody.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from PIL import Image

from fedmosaic.client.model.examples import Example
from fedmosaic.client.vision.words import images_in, without_images
from fedmosaic.experiments.tasks.labelled import normalise, stable_hash, write_examples
from fedmosaic.experiments.tasks.pictures import sources as source
from fedmosaic.experiments.tasks.pictures.sources import PictureRow, ReadPictures
from fedmosaic.experiments.tasks.texts.sets import check_enough, read_rows, split_rows, write_public
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


def _sibling(task: PictureTask, part: int) -> PictureTask:
    """One of three equal parts of a task, by hash."""

    def read(data: Path) -> Iterator[PictureRow]:
        rows = task.read(data)
        return (row for row in rows if stable_hash("sibling", normalise(row.row.prompt)) % 3 == part)

    return replace(task, read=read)


def _clothes(*kinds: str) -> PictureTask:
    return PictureTask(source.which_clothes(kinds), "VQA", "Fashion-MNIST", "MIT")


def _letters(*alphabets: str) -> PictureTask:
    # Tagalog has 340 drawings, the fewest.
    return PictureTask(source.which_alphabet(alphabets, "Letter?", 340), "VQA", "Omniglot", "MIT")


_SIBLINGS: Final = {
    "letters": (
        _letters("Balinese", "Greek", "Korean", "Latin"),
        _letters("Early_Aramaic", "Japanese_(katakana)", "Sanskrit", "Tagalog"),
    ),
    "clothes": (
        _clothes("top", "trousers", "bag", "boot"),
        _clothes("dress", "coat", "sandal", "sneaker"),
    ),
}

PICTURES_SIBLINGS: Final[dict[str, dict[str, PictureTask]]] = {
    f"{name}-{'abc'[part]}": {
        f"{name}-{number}": _sibling(task, part) for number, task in enumerate(tasks, start=1)
    }
    for name, tasks in _SIBLINGS.items()
    for part in range(3)
}
"""Three clients for each of two domains, two tasks of four answers each, in order; pictures tell the answers.

Siblings have other drawings of the same alphabets and other clothes of the same kinds. Nobody trains on a
character that anybody is tested on.
"""

PICTURE_SETS: Final = {"pictures-ten": PICTURES_TEN, "pictures-siblings": PICTURES_SIBLINGS}


@dataclass(frozen=True)
class WrittenTask:
    """The examples of a task, and what makes their pictures, by path."""

    client: str
    name: str
    task: PictureTask
    train: list[Example]
    test: list[Example]
    pictures: dict[str, Callable[[], Image.Image]]


def build(
    name: str, data: Path, train_rows: int, test_rows: int, *, tuning: bool = False
) -> Iterator[WrittenTask]:
    """Split every task of a set.

    Args:
        name: of the set.
        data: folder with the data sets.
        train_rows: most training examples per task.
        test_rows: most test examples per task.
        tuning: give validation examples in place of test examples.

    Yields:
        The tasks in order.

    Raises:
        ConfigurationError: there is no such set, a data set is missing, or a task has hardly any rows.
    """
    if name not in PICTURE_SETS:
        raise ConfigurationError(f"there is no picture set {name!r}; known: {', '.join(PICTURE_SETS)}")
    seen: set[str] = set()
    for client, tasks in PICTURE_SETS[name].items():
        for task_name, task in tasks.items():
            rows = read_rows(task_name, task.origin, task.read, data)
            train, test = split_rows(
                f"{client}/{task_name}",
                [row.row for row in rows],
                train_rows,
                test_rows,
                seen,
                tuning=tuning,
            )
            check_enough(task_name, train, test)
            used = {path for example in (*train, *test) for path in images_in(example.prompt)}
            made = {path: make for row in rows for path, make in row.pictures.items() if path in used}
            yield WrittenTask(client, task_name, task, train, test, made)


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
        answers.setdefault(without_images(example).prompt, Counter())[example.answer] += 1
    overall = sum(answers.values(), Counter[str]())
    guesses = [answers.get(without_images(example).prompt, overall).most_common(1)[0][0] for example in test]
    return sum(g == e.answer for g, e in zip(guesses, test, strict=True)) / len(test)


def write_pictures(
    name: str,
    data: Path,
    out: Path,
    train_rows: int,
    test_rows: int,
    public_rows: int,
    *,
    tuning: bool = False,
) -> dict[str, dict[str, object]]:
    """Write a set, its pictures, public examples without pictures, and its table.

    Args:
        name: of the set.
        data: folder with the data sets.
        out: made if absent; `<client>/<task>.train.jsonl`, `<client>/<task>.test.jsonl`, `pictures/`,
            `public.jsonl` and `table.json` are written into it.
        train_rows: most training examples per task.
        test_rows: most test examples per task.
        public_rows: most public examples.
        tuning: write validation examples in place of test examples, under the same names.

    Returns:
        What `table.json` says, per task.
    """
    table: dict[str, dict[str, object]] = {}
    for written in build(name, data, train_rows, test_rows, tuning=tuning):
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
    write_public(data, out, public_rows)
    (out / "table.json").write_text(json.dumps(table, indent=2) + "\n")
    return table
