"""From labelled texts to the training and test examples of one classification task.

Where a text goes is decided by a hash of its group or of itself, and so depends on nothing else: adding a
text moves no other text across a border.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from fedmosaic.client.model.examples import Example
from fedmosaic.protos.errors import ConfigurationError

_TEST_SHARE = 0.25


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


def share(items: Iterable[LabelledText], clients: int) -> list[list[LabelledText]]:
    """Deals texts to clients, whole groups at a time; one list per client."""
    shares: list[list[LabelledText]] = [[] for _ in range(clients)]
    for item in items:
        shares[stable_hash("client", item.group) % clients].append(item)
    return shares


def split(task: ClassificationTask, items: Sequence[LabelledText], train_rows: int, test_rows: int) -> Split:
    """Balanced training and test sets of so many rows, whole groups at a time, in an order fixed by hashes.

    `ConfigurationError` if there are too few texts of a class, a label that is no choice, or a number of rows
    that is no multiple of the number of choices.
    """
    border = int(_TEST_SHARE * 2**64)
    ordered = sorted(items, key=lambda item: stable_hash("order", item.text))
    train = [item for item in ordered if stable_hash("test", item.group) >= border]
    test = [item for item in ordered if stable_hash("test", item.group) < border]
    return Split(
        train=_balanced(task, train, train_rows, "training"), test=_balanced(task, test, test_rows, "test")
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
