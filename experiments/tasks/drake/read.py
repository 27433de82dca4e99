"""Read data sets in the layout of DRAKE and HFLB, and its scenarios.

    DIR/<dataset>/train/dataset-<id>.json     {"id", "image"?, "conversations": [{"from", "value"}, …]}
    DIR/<dataset>/test/dataset-<id>.json      `image` is a path or a list of paths, one per `<image>` marker

Records are read, checked and kept as `PictureExample`; `fedmosaic.experiments.tasks.drake.files` turns them
into the files of a scenario.
"""

import json
import re
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, Literal

from fedmosaic.client.model.examples import Example
from fedmosaic.client.vision.words import marker
from fedmosaic.protos.errors import ConfigurationError

MARKER: Final = "<image>"
Metric = Literal["accuracy", "f1"]

_CHOICES: Final = re.compile(r"choice lists?\s*:\s*\[(?P<list>[^\]]*)\]", re.IGNORECASE)
_LETTERED: Final = re.compile(r"(?:^|\n)\s*([A-Z])\s*[.)]\s+(\S[^\n]*)")


@dataclass(frozen=True)
class PictureExample:
    """One question about pictures.

    Attributes:
        id: unique within its data set.
        prompt: with one `<image>` marker per picture, in place.
        answer: what is right.
        images: paths, relative to the root of the data sets.
        choices: as the prompt lists them; empty for open answers.
    """

    id: str
    prompt: str
    answer: str
    images: tuple[Path, ...]
    choices: tuple[str, ...] = ()

    def example(self) -> Example:
        """The question with its pictures named in place."""
        parts = self.prompt.split(MARKER)
        names = [marker(path.as_posix()) for path in self.images]
        prompt = parts[0] + "".join(f"{name}{part}" for name, part in zip(names, parts[1:], strict=True))
        return Example(self.id, prompt, self.answer, self.choices)


@dataclass(frozen=True)
class DrakeTask:
    """One task of a scenario file."""

    dataset: str
    subset: int
    metric: Metric

    @property
    def name(self) -> str:
        """`<dataset>-<id>`."""
        return f"{self.dataset}-{self.subset}"


@dataclass(frozen=True)
class DrakeClient:
    """One client of a scenario file, its tasks in order of arrival."""

    number: int
    model: str
    tasks: tuple[DrakeTask, ...]


def read_dataset(
    root: Path, dataset: str, subset: int, part: Literal["train", "test"]
) -> tuple[PictureExample, ...]:
    """Read one part of one data set.

    Args:
        root: folder of the data sets.
        dataset: its name.
        subset: its number.
        part: which part.

    Returns:
        The first question and answer of every record, in file order.

    Raises:
        ConfigurationError: the file is missing or malformed; the message names the record's place, never its
            contents.
    """
    path = root / dataset / part / f"dataset-{subset}.json"
    content = _json(path)
    if not isinstance(content, list) or not content:
        raise ConfigurationError(f"{path} holds no list of records")
    examples = tuple(_example(record, f"{path}, record {number}") for number, record in enumerate(content, 1))
    if len({example.id for example in examples}) != len(examples):
        raise ConfigurationError(f"{path} holds an id twice; every record needs its own")
    return examples


def _example(record: Any, where: str) -> PictureExample:
    try:
        question, answer = record["conversations"][0]["value"], record["conversations"][1]["value"]
        speakers = [turn["from"] for turn in record["conversations"][:2]]
        identity, images = str(record["id"]), record.get("image", [])
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ConfigurationError(f"{where}: expected id, image and conversations with two turns") from None
    if speakers != ["human", "gpt"] or not isinstance(question, str) or not isinstance(answer, str):
        raise ConfigurationError(f"{where}: the first turn must be a human's text and the second gpt's")
    paths = [images] if isinstance(images, str) else images
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ConfigurationError(f"{where}: image must be a path or a list of paths")
    located = tuple(Path(path) for path in paths)
    if any(path.is_absolute() or ".." in path.parts for path in located):
        raise ConfigurationError(f"{where}: an image path leaves the folder of the data sets")
    if question.count(MARKER) != len(located):
        raise ConfigurationError(
            f"{where}: {question.count(MARKER)} <image> markers and {len(located)} images; they must match"
        )
    if not answer.strip() or not question.strip():
        raise ConfigurationError(f"{where}: the question or the answer is empty")
    return PictureExample(
        identity, question, answer.strip(), located, listed_choices(question, answer.strip())
    )


def listed_choices(prompt: str, answer: str) -> tuple[str, ...]:
    """The options that a prompt lists, where the answer is one of them; empty otherwise.

    Known forms: `Choice list:[a, b]` (also with `|` between options), and lines `A. …`, whose options are the
    letters if the answer is a letter and the texts if it is one of those.
    """
    match = _CHOICES.search(prompt)
    if match is not None:
        separator = "|" if "|" in match["list"] else ","
        options = [option.strip().strip("'\"").strip() for option in match["list"].split(separator)]
        return _with(options, answer)
    lettered = _LETTERED.findall(prompt)
    letters, texts = [letter for letter, _ in lettered], [text.strip() for _, text in lettered]
    return _with(letters, answer) or _with(texts, answer)


def _with(options: list[str], answer: str) -> tuple[str, ...]:
    distinct = tuple(dict.fromkeys(option for option in options if option))
    return distinct if len(distinct) > 1 and answer in distinct else ()


def drake_scenario(name: str) -> tuple[DrakeClient, ...]:
    """One of DRAKE's scenarios, by its name in the authors' repository.

    Raises:
        ConfigurationError: there is no such scenario.
    """
    table = _assignments()
    if name not in table["scenarios"]:
        raise ConfigurationError(f"there is no scenario {name!r}; known: {', '.join(table['scenarios'])}")
    models = table["scenarios"][name]
    clients = []
    for number, (model, tasks) in enumerate(zip(models, table["clients"], strict=True)):
        parsed = tuple(
            DrakeTask(*_split(task.removesuffix("*")), "f1" if task.endswith("*") else "accuracy")
            for task in tasks
        )
        clients.append(DrakeClient(number, table["models"][model], parsed))
    return tuple(clients)


def _split(task: str) -> tuple[str, int]:
    dataset, _, subset = task.rpartition("-")
    return dataset, int(subset)


def _assignments() -> Any:
    return tomllib.loads(
        (files("fedmosaic.experiments") / "scenarios" / "drake.toml").read_text(encoding="utf-8")
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error.strerror}); download DRAKE there") from None
    except ValueError:
        raise ConfigurationError(f"{path} is not JSON") from None
