"""From labelled texts to the training and test examples of one classification task.

Where a text goes is decided by hashes of groups and texts, so that it does not depend on their order.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from fedmosaic.client.data.records import Example
from fedmosaic.protos.errors import ConfigurationError


@dataclass(frozen=True)
class LabelledText:
    """One line of text with its class; its group must not be divided between training and test or clients."""

    text: str
    label: str
    group: str


@dataclass(frozen=True)
class ClassificationTask:
    """How a labelled text is put to a model: `opening: text`, the question below it, two or more choices."""

    name: str
    opening: str
    question: str
    choices: tuple[str, ...]

    def example(self, item: LabelledText) -> Example:
        """The example that asks for the class of a text; its id is a hash of the text."""
        return Example(
            id=f"{self.name}-{stable_hash('id', normalise(item.text)):016x}",
            prompt=f"{self.opening}: {item.text}\n{self.question}",
            answer=item.label,
            choices=self.choices,
        )


@dataclass(frozen=True)
class Split:
    """Training and test examples of one client."""

    train: tuple[Example, ...]
    test: tuple[Example, ...]


def normalise(text: str) -> str:
    """The text without case, punctuation and runs of space: two texts equal in this are one text."""
    return re.sub(r"[\W_]+", " ", text.casefold()).strip()


def shorten(text: str, characters: int) -> str:
    """Cuts a text at a word border to at most ``characters`` characters (at least 1)."""
    if len(text) <= characters:
        return text
    return text[: characters + 1].rsplit(" ", 1)[0][:characters].rstrip(" ,;:-–")


def sentences(text: str) -> list[str]:
    """Splits a paragraph after full stops, question and exclamation marks that a space follows."""
    return [sentence for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if sentence]


def distinct(items: Iterable[LabelledText], seen: set[str]) -> Iterator[LabelledText]:
    """Yields the items whose normalised text was not seen before, and notes them in ``seen``."""
    for item in items:
        key = normalise(item.text)
        if key and key not in seen:
            seen.add(key)
            yield item


def share(items: Iterable[LabelledText], parts: int, purpose: str = "client") -> list[list[LabelledText]]:
    """Deals texts to so many parts, whole groups at a time, the groups of each class in turn.

    Every part has as many groups of a class as any other, up to one. Their order is fixed by hashes, which
    `purpose` changes.
    """
    shares: list[list[LabelledText]] = [[] for _ in range(parts)]
    part_of: dict[str, int] = {}
    dealt: Counter[str] = Counter()
    for item in sorted(items, key=lambda item: (stable_hash(purpose, item.group), item.text)):
        if item.group not in part_of:
            part_of[item.group] = dealt[item.label] % parts
            dealt[item.label] += 1
        shares[part_of[item.group]].append(item)
    return shares


def split(task: ClassificationTask, items: Sequence[LabelledText], train_rows: int, test_rows: int) -> Split:
    """Balanced training and test sets of so many rows, whole groups at a time, in an order fixed by hashes.

    A quarter of the groups of each class is for the test set. `ConfigurationError` if there are too few texts
    of a class, a label that is no choice, or a number of rows that is no multiple of the number of choices.
    """
    ordered = sorted(items, key=lambda item: stable_hash("order", item.text))
    tested = {item.group for item in share(items, 4, "test")[0]}
    return Split(
        train=_balanced(task, [i for i in ordered if i.group not in tested], train_rows, "training"),
        test=_balanced(task, [i for i in ordered if i.group in tested], test_rows, "test"),
    )


def _balanced(
    task: ClassificationTask, items: Sequence[LabelledText], rows: int, purpose: str
) -> tuple[Example, ...]:
    """Takes the first texts of each class in turn, so that any prefix is balanced as well as it can be."""
    if rows % len(task.choices):
        raise ConfigurationError(
            f"{rows} {purpose} rows cannot be balanced over the {len(task.choices)} choices of {task.name}; "
            "give a multiple"
        )
    of_class: dict[str, list[LabelledText]] = {choice: [] for choice in task.choices}
    for item in items:
        if item.label not in of_class:
            raise ConfigurationError(f"task {task.name} has a text whose label is not among its choices")
        of_class[item.label].append(item)
    each = rows // len(task.choices)
    fewest = min(len(texts) for texts in of_class.values())
    if fewest < each:
        raise ConfigurationError(
            f"task {task.name} has {fewest} {purpose} texts in its smallest class, {each} are needed; "
            "ask for fewer rows"
        )
    rounds = zip(*(of_class[choice][:each] for choice in task.choices), strict=True)
    return tuple(task.example(item) for items_of_round in rounds for item in items_of_round)


def stable_hash(purpose: str, text: str) -> int:
    """64 bits that depend on the purpose and the text alone."""
    digest = hashlib.sha256(f"{purpose}\x1f{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
