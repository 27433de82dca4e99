"""Rows of the text benchmark, from the folders that its data sets are published in.

Every task is closed: an answer is one of a few choices, and a question that needs them names them.
"""

import csv
import errno
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedmosaic.experiments.tasks.labelled import shorten, stable_hash

_CHARACTERS: Final = 240
_ANSWER: Final = 40


@dataclass(frozen=True)
class Row:
    """One question.

    Attributes:
        prompt: what the model reads.
        answer: one of the choices.
        choices: two or more, all different.
        group: what must not be divided between training and test, such as a passage.
    """

    prompt: str
    answer: str
    choices: tuple[str, ...]
    group: str


Read = Callable[[Path], Iterator[Row]]

BINARY: Final = ("Good", "Bad")
TRUTH: Final = ("True", "False")
ENTAILMENT: Final = ("entailment", "contradiction", "neutral")


def _parts(folder: Path) -> list[Path]:
    """The files of a data set that are there; some come without a training or without a test part."""
    found = [folder / name for name in ("train.json", "test.json") if (folder / name).exists()]
    if not found:
        raise FileNotFoundError(errno.ENOENT, "no train.json or test.json", str(folder))
    return found


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def benchmark(folder: str, question: str, labels: Mapping[str, str], *, passage: str = "") -> Read:
    """A task of the continual learning benchmark: `sentence` and `label`; other labels are left out."""

    def read(data: Path) -> Iterator[Row]:
        choices = tuple(dict.fromkeys(labels.values()))
        for path in _parts(data / "cl_benchmark_text" / folder):
            for row in _json(path):
                text, label = str(row["sentence"]).strip(), labels.get(str(row["label"]))
                if label is None:
                    continue
                group = text.split(passage)[1] if passage and passage in text else text
                yield Row(f"{_cut(text, passage)}\n{question}", label, choices, group)

    return read


def _cut(text: str, passage: str) -> str:
    """At most 240 characters; of a question with a passage, the question and the beginning of the passage."""
    if not passage or passage not in text:
        return shorten(" ".join(text.split()), _CHARACTERS)
    question, _, rest = text.partition(passage)
    return f"{question.strip()}\n{passage.strip()} {shorten(' '.join(rest.split()), _CHARACTERS)}"


def same(*labels: str) -> dict[str, str]:
    """Labels that are their own choices."""
    return {label: label for label in labels}


STARS: Final = {"very positive": "Good", "positive": "Good", "negative": "Bad", "very negative": "Bad"}

NEWS: Final = ("World", "Sports", "Business", "Science or Technology")


def news(part: int, labels: tuple[str, ...]) -> Read:
    """A third of AG News by hash, so that no article is in two tasks."""
    question = f"{', '.join(labels[:-1])} or {labels[-1]}?"
    whole = benchmark("TC/agnews", question, same(*labels))

    def read(data: Path) -> Iterator[Row]:
        return (row for row in whole(data) if stable_hash("news part", row.group) % 3 == part)

    return read


def kinds(data: Path) -> Iterator[Row]:
    """What an encyclopaedia entry of DBpedia is about."""
    rows = _json(data / "cl_benchmark_text/TC/dbpedia/test.json")
    chosen = ("Village", "Film", "Animal", "Company")
    for row in rows:
        if row["label"] in chosen:
            text = " ".join(str(row["sentence"]).split())
            yield Row(
                f"{shorten(text, _CHARACTERS)}\nVillage, Film, Animal or Company?", row["label"], chosen, text
            )


def qa(folder: str) -> Read:
    """A task of LLM-Adapters: the answers are "answer1" and so on, numbered in the question."""

    def read(data: Path) -> Iterator[Row]:
        for path in _parts(data / "llm_adapters_qa" / folder):
            for row in _json(path):
                text, _, form = str(row["instruction"]).partition("\n\nAnswer format: ")
                choices = tuple(form.strip().split("/"))
                if len(choices) > 1 and row["answer"] in choices:
                    yield Row(text.strip(), str(row["answer"]), choices, text)

    return read


def bigbench(name: str, question: str, choices: tuple[str, ...] = ()) -> Read:
    """A BIG-bench task with scores per choice; without fixed choices, each question names its own."""

    def read(data: Path) -> Iterator[Row]:
        for row in _json(data / "bigbench_subset" / f"{name}.json")["examples"]:
            scores = row["target_scores"]
            best = [choice for choice, score in scores.items() if score == max(scores.values())]
            if len(best) != 1 or len(scores) < 2:
                continue
            text = str(row["input"]).strip()
            listed = choices or tuple(sorted(scores))
            ask = question if choices else f"{question} {'; '.join(listed)}"
            yield Row(f"{text}\n{ask}", best[0], listed, text)

    return read


def requests(domains: tuple[str, ...], intents: Mapping[str, str]) -> Read:
    """CLINC150: which of several domains does a request belong to?"""
    domain_of = {intent: name for name in domains for intent in intents[name].split()}
    question = f"{', '.join(domains[:-1])} or {domains[-1]}?".replace("_", " ")

    def read(data: Path) -> Iterator[Row]:
        content = _json(data / "clinc150" / "data_full.json")
        for text, intent in (row for part in ("train", "val", "test") for row in content[part]):
            if intent in domain_of:
                label = domain_of[intent].replace("_", " ")
                yield Row(
                    f"Request: {text}\n{question}", label, tuple(d.replace("_", " ") for d in domains), text
                )

    return read


def intents(names: tuple[str, ...]) -> Read:
    """CLINC150: which of a few intents does a request express? The prompt does not list them."""
    choices = tuple(name.replace("_", " ") for name in names)

    def read(data: Path) -> Iterator[Row]:
        content = _json(data / "clinc150" / "data_full.json")
        for text, intent in (row for part in ("train", "val", "test") for row in content[part]):
            if intent in names:
                yield Row(f"Request: {text}\nIntent?", intent.replace("_", " "), choices, text)

    return read


def desks(names: tuple[str, ...], people: tuple[str, ...], shift: int, form: str) -> Read:
    """CLINC150: who of a few people handles a request? Every intent has one of them.

    Args:
        names: of the intents.
        people: as many as intents.
        shift: the intent at place i belongs to the person at place i + shift, counted in a circle, so that
            houses with other shifts answer the same request differently.
        form: how a prompt is written, with `{}` for the request.
    """
    handles = {name: people[(place + shift) % len(people)] for place, name in enumerate(names)}

    def read(data: Path) -> Iterator[Row]:
        content = _json(data / "clinc150" / "data_full.json")
        for text, intent in (row for part in ("train", "val", "test") for row in content[part]):
            if intent in handles:
                yield Row(form.format(text), handles[intent], people, text)

    return read


def banking(categories: tuple[str, ...]) -> Read:
    """Banking77, a few categories of it."""
    choices = tuple(category.replace("_", " ") for category in categories)

    def read(data: Path) -> Iterator[Row]:
        for name in ("train.csv", "test.csv"):
            with (data / "banking77" / name).open(encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    if row["category"] in categories:
                        answer = row["category"].replace("_", " ")
                        yield Row(f"Customer: {row['text']}\nReason?", answer, choices, row["text"])

    return read


def public_texts(data: Path) -> Iterator[tuple[str, str]]:
    """Public prompts and answers that no task of the benchmark uses: instructions and running text."""
    for path in sorted((data / "self_instruct").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            for instance in row["instances"]:
                question = shorten(f"{row['instruction']}\n{instance['input']}".strip(), _CHARACTERS)
                # A short answer leaves room for its prompt whatever the tokenizer.
                yield question, shorten(" ".join(str(instance["output"]).split()), _ANSWER)
    for path in sorted((data / "wikitext2").glob("*.txt")):
        for words in map(str.split, path.read_text(encoding="utf-8").splitlines()):
            if len(words) >= 48:
                yield " ".join(words[:24]), shorten(" ".join(words[24:40]), _ANSWER)
