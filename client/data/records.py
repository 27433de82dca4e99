"""Rows as examples: which columns they are made of, what may stand in them, how they are named."""

import difflib
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from fedmosaic.client.data.sources import label_of, rows_of
from fedmosaic.client.settings import ColumnSettings, DataSettings, DataSource
from fedmosaic.privacy.configuration import canonical_json, parse_json
from fedmosaic.privacy.ledger.rows import Unit
from fedmosaic.protos.errors import ConfigurationError

_PARTS: Final = ("id", "prompt", "answer", "choices", "messages", "person")
_CUSTOMARY: Final = frozenset(
    "completion context conversations input instruction label options output question response source target "
    "text title".split()
)
"""Fields that other programs' data sets have."""
_ROLES: Final = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turn:
    """One message of a conversation: the text of the `system`, the `user` or the `assistant`."""

    role: str
    content: str = field(repr=False)


@dataclass(frozen=True)
class Example:
    """One supervised example, as text.

    Attributes:
        id: Name of the example, unique within its data set.
        prompt: What the model reads; not empty. Of a conversation, the texts before its last turn.
        answer: What the model should reply; not empty. Of a conversation, its last turn.
        choices: The closed set of answers to choose from, `answer` among them; empty for open answers.
        turns: The conversation, which ends with the assistant's turn; empty for a prompt and its answer.
        person: Whose record it is; empty if that is not told.
    """

    id: str
    prompt: str = field(repr=False)
    answer: str = field(repr=False)
    choices: tuple[str, ...] = field(default=(), repr=False)
    turns: tuple[Turn, ...] = field(default=(), repr=False)
    person: str = field(default="", repr=False)


def row_of(example: Example) -> dict[str, object]:
    """The row, columns by their usual names, that an example is read from."""
    row: dict[str, object] = {"id": example.id}
    if example.turns:
        row["messages"] = [{"role": turn.role, "content": turn.content} for turn in example.turns]
    else:
        row |= {"prompt": example.prompt, "answer": example.answer}
    row["choices"] = example.choices
    return row | ({"person": example.person} if example.person else {})


class Record(Protocol):
    """An example, as text or as tokens."""

    @property
    def id(self) -> str:
        """Name, unique within its data set."""

    @property
    def person(self) -> str:
        """Whose record it is; empty if that is not told."""


R = TypeVar("R", bound=Record)


def by_unit(examples: Sequence[R], unit: Unit) -> list[tuple[R, ...]]:
    """The units that a guarantee is for, in the order of their first examples: each alone, or by person.

    ConfigurationError if the unit is a person and an example says none.
    """
    if unit == "example":
        return [(example,) for example in examples]
    grouped: dict[str, list[R]] = {}
    for number, example in enumerate(examples, start=1):
        if not example.person:
            raise ConfigurationError(
                f"training example {number} names no person, and the terms protect persons "
                '(group_sums.unit = "person"); fill the column `person` in every row, or name it in '
                "[data.columns]"
            )
        grouped.setdefault(example.person, []).append(example)
    return [tuple(examples) for examples in grouped.values()]


def unit_ids(examples: Sequence[Record], unit: Unit) -> tuple[str, ...]:
    """Names of the units of `by_unit`; no person is named like an example."""
    units = by_unit(examples, unit)
    return tuple(own[0].id if unit == "example" else f"person {own[0].person}" for own in units)


@dataclass(frozen=True)
class ExampleSet:
    """The examples of one source, at least one, and how they were read.

    `label` and `columns` are for people; `named` tells whether a column names the examples, else their names
    are made from what they say.
    """

    label: str
    examples: tuple[Example, ...] = field(repr=False)
    columns: str
    named: bool

    def words(self) -> str:
        """Rows, columns, repetitions and persons in one line, for the client's own people."""
        contents = Counter((e.prompt, e.answer) for e in self.examples)
        repeated = len(self.examples) - len(contents)
        parts = [f"{len(self.examples):,} rows", f"columns {self.columns}"]
        parts.append(f"{repeated:,} repeated" if repeated else "none repeated")
        if not self.named:
            parts.append("names made from content")
        persons = Counter(e.person for e in self.examples if e.person)
        if persons:
            parts.append(f"{len(persons):,} persons with at most {max(persons.values()):,} rows")
        return f"{self.label}: {', '.join(parts)}"

    @property
    def most_of_one_person(self) -> int:
        """The largest number of examples of one person; 0 where persons are not told."""
        return max(Counter(e.person for e in self.examples if e.person).values(), default=0)


def read_examples(path: Path) -> tuple[Example, ...]:
    """Read the examples of a file whose columns have their usual names; see `read_set`."""
    return read_set(path).examples


def read_public_examples(path: Path) -> tuple[Example, ...]:
    """Read public examples: as `read_examples`, but one without an `id` is named by its place."""
    return read_set(path, public=True).examples


def read_set(
    source: DataSource | Iterable[Any], columns: ColumnSettings | None = None, *, public: bool = False
) -> ExampleSet:
    """Read a source of any kind.

    Args:
        source: File, folder, split on a hub, or rows that a caller in Python holds.
        columns: Names of the columns to read, other columns being left out; by default the parts' own names,
            and other columns are refused.
        public: Name examples that have no name by their place in the file. Otherwise either all have one or
            names are made from what the examples say: the same whatever their order, `-2` and so on added to
            repetitions.

    Raises:
        ConfigurationError: The source cannot be read or holds nothing, a row is no example, or a name occurs
            twice. The message names the row, never its contents.
    """
    names = columns or ColumnSettings()
    part_of = {getattr(names, part): part for part in _PARTS}
    examples: list[Example] = []
    places: list[str] = []
    used: dict[str, None] = {}
    for where, row in rows_of(source, part_of if columns else None):
        record = _record(row, part_of, where, others=columns is not None)
        if public:
            record.setdefault("id", "-".join(where.rsplit(", ", 1)[-1].split()))
        used.update(dict.fromkeys(part for part in _PARTS if part in record))
        examples.append(_example(record, names, where))
        places.append(where)
    if not examples:
        place = source if isinstance(source, Path) else label_of(source)
        raise ConfigurationError(f"{place} holds no example; give at least one")
    named = bool(examples[0].id)
    _check_names(examples, places, named=named)
    shown = (part if getattr(names, part) == part else f"{getattr(names, part)} as {part}" for part in used)
    listed = ", ".join(shown)
    return ExampleSet(label_of(source), tuple(examples) if named else _named(examples), listed, named)


def read_questions(path: Path, columns: ColumnSettings = ColumnSettings()) -> list[Example]:  # noqa: B008  # frozen
    """Read rows to be answered; what they have besides prompt, choices and id is left alone.

    The answer of one with choices stands for none. ConfigurationError if a row has no prompt, or choices that
    are none, or there is no row. The row is named, not its content.
    """
    found: list[Example] = []
    for where, row in rows_of(path):
        record = _record(row, {getattr(columns, part): part for part in _PARTS}, where, others=True)
        _check_text(record.get("prompt"), columns.prompt, where)
        choices: Any = listed(record.get("choices"))
        texts = isinstance(choices, list) and all(isinstance(choice, str) and choice for choice in choices)
        if not texts or len(set(choices)) != len(choices) or len(choices) == 1:
            raise ConfigurationError(f"{where}: 'choices' must be a list of two or more different texts")
        name = str(record.get("id", f"row-{len(found) + 1}"))
        found.append(Example(name, record["prompt"], next(iter(choices), ""), tuple(choices)))
    if not found:
        raise ConfigurationError(f"{path} holds no row; give at least one with a prompt")
    return found


def _record(row: object, part_of: Mapping[str, str], where: str, *, others: bool) -> dict[str, Any]:
    """The parts that a row has, by part."""
    if not isinstance(row, Mapping):
        raise ConfigurationError(f"{where} is a {type(row).__name__}; write an object, columns by name")
    if not others:
        _check_columns(row, where)
    return {part_of[name]: value for name, value in row.items() if name in part_of and value is not None}


def _check_columns(row: Mapping[str, object], where: str) -> None:
    for position, key in enumerate(row, 1):
        if key in _PARTS:
            continue
        name = str(key).lower()
        near = difflib.get_close_matches(name, _PARTS, n=1)
        # A key may be a piece of somebody's text: only a customary name is shown, any other by its place.
        shown = f"key {key!r}" if near or name in _CUSTOMARY else f"key number {position}"
        hint = f"did you mean {near[0]!r}? Use" if near else "use"
        raise ConfigurationError(
            f"{where} has the unknown {shown}; {hint} {', '.join(_PARTS)} only, or name in [data.columns] "
            "the columns to be read"
        )


def _example(record: dict[str, Any], names: ColumnSettings, where: str) -> Example:
    turns: tuple[Turn, ...] = ()
    if "messages" in record:
        if "prompt" in record or "answer" in record:
            raise ConfigurationError(
                f"{where} has {names.messages!r} beside {names.prompt!r} or {names.answer!r}; give a "
                "conversation, or a prompt and its answer"
            )
        turns = _turns(record["messages"], names.messages, where)
        record["prompt"] = "\n".join(turn.content for turn in turns[:-1])
        record["answer"] = turns[-1].content
    for part in ("id", "prompt", "answer", "person"):
        if part in record or part in ("prompt", "answer"):
            _check_text(record.get(part), getattr(names, part), where)
    choices = listed(record.get("choices"))
    if not isinstance(choices, list | tuple) or not all(
        isinstance(choice, str) and choice for choice in choices
    ):
        raise ConfigurationError(f"{where}: {names.choices!r} must be a list of texts that are not empty")
    for choice in choices:
        _check_text(choice, names.choices, where)
    if choices and (record["answer"] not in choices or len(set(choices)) != len(choices)):
        raise ConfigurationError(
            f"{where}: {names.choices!r} must differ from each other and contain the answer"
        )
    name, person = record.get("id", ""), record.get("person", "")
    return Example(name, record["prompt"], record["answer"], tuple(choices), turns, person)


def _check_text(value: object, name: str, where: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ConfigurationError(f"{where}: {name!r} must be a text that is not empty")
    if "\x00" in value:
        raise ConfigurationError(f"{where}: {name!r} holds a NUL character; take it out")
    try:
        value.encode()
    except UnicodeEncodeError:
        words = f"{where}: {name!r} holds half a character (a lone surrogate); take it out"
        raise ConfigurationError(words) from None


def listed(value: object) -> object:
    """A list, also one that a format without lists has as text in JSON."""
    if value is None:
        return []
    if isinstance(value, str) and value.startswith("["):
        try:
            return parse_json(value)
        except ValueError:
            return value
    return value


def _turns(value: object, name: str, where: str) -> tuple[Turn, ...]:
    found = listed(value)
    if not isinstance(found, list | tuple) or not found:
        raise ConfigurationError(
            f"{where}: {name!r} must be a list of messages, objects with role and content"
        )
    turns = []
    for number, message in enumerate(found, 1):
        place = f"{where}, message {number}"
        fields = {k: v for k, v in message.items() if v is not None} if isinstance(message, Mapping) else {}
        if set(fields) != {"role", "content"}:
            raise ConfigurationError(f"{place} must be an object with role and content, and nothing else")
        if fields["role"] not in _ROLES or (fields["role"] == "system" and number > 1):
            raise ConfigurationError(
                f"{place}: role must be 'user' or 'assistant', or 'system' in the first message"
            )
        _check_text(fields["content"], "content", place)
        turns.append(Turn(fields["role"], fields["content"]))
    if turns[-1].role != "assistant" or not any(turn.role == "user" for turn in turns[:-1]):
        raise ConfigurationError(
            f"{where}: {name!r} must have a user's turn and end with the assistant's, which is learned"
        )
    return tuple(turns)


def _check_names(examples: list[Example], places: list[str], *, named: bool) -> None:
    first: dict[str, str] = {}
    for example, where in zip(examples, places, strict=True):
        if bool(example.id) != named:
            words = "lacks an id that rows before it have" if named else "has an id that rows before it lack"
            raise ConfigurationError(f"{where} {words}; name every example or none")
        earlier = first.setdefault(example.id, where) if named else where
        if earlier != where:
            other = earlier.rsplit(", ", 1)[-1]
            raise ConfigurationError(f"{where} has the id of {other}; every example needs its own id")


def _named(examples: list[Example]) -> tuple[Example, ...]:
    """The examples, named by a hash of what they say.

    Who corrects a text makes another example of it. The ledger therefore never takes these names as proof
    that two states of the data share nobody's record.
    """
    seen: Counter[str] = Counter()
    found = []
    for example in examples:
        turns = [[turn.role, turn.content] for turn in example.turns]
        content = canonical_json([example.prompt, example.answer, list(example.choices), turns])
        name = hashlib.sha256(f"fedmosaic/example/v1\n{content}".encode()).hexdigest()[:32]
        seen[name] += 1
        found.append(replace(example, id=name if seen[name] == 1 else f"{name}-{seen[name]}"))
    return tuple(found)


@dataclass(frozen=True)
class ClientData:
    """A client's examples as read: to be trained on, and to be scored, the client's own set as "self"."""

    train: ExampleSet
    tests: dict[str, ExampleSet]


def read_sets(
    settings: DataSettings, train: Iterable[Any] | None = None, test: Iterable[Any] | None = None
) -> ClientData:
    """Read every set, or take the rows that are handed over instead; ConfigurationError as of `read_set`."""
    if "self" in settings.others:
        raise ConfigurationError('data.others names a set "self", the name of data.test; rename it')
    source = settings.train if train is None else train
    if source is None:
        raise ConfigurationError("data.train: missing; name the training examples")
    own = settings.test if test is None else test
    sets = ({} if own is None else {"self": own}) | settings.others
    tests = {name: read_set(place, settings.columns) for name, place in sets.items()}
    return ClientData(read_set(source, settings.columns), tests)
