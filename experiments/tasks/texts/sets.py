"""Sets of text tasks: one with DRAKE's structure, ten clients with four tasks each, and smaller ones.

`fedmosaic tasks text --set text-ten --data DIR --out DIR` writes one. Splits are fixed by hashes of what
belongs together (a passage, a text), so they are the same everywhere, and no text is in training and test, or
at two clients.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from string import ascii_lowercase
from typing import Final, TypeVar

from fedmosaic.client.model.examples import Example
from fedmosaic.experiments.tasks.labelled import normalise, stable_hash, write_examples
from fedmosaic.experiments.tasks.relevance_sets import CLINC_DOMAINS
from fedmosaic.experiments.tasks.texts import sources as source
from fedmosaic.experiments.tasks.texts.sources import Read, Row
from fedmosaic.protos.errors import ConfigurationError

TEST_SHARE: Final = 0.25


Kind = TypeVar("Kind")


@dataclass(frozen=True)
class TextTask:
    """A task and where its rows come from.

    Attributes:
        read: yields its rows, given the folder with the data sets.
        licence: of the data set.
        origin: the data set.
    """

    read: Read
    origin: str
    licence: str


_CL: Final = "O-LoRA CL_Benchmark (GLUE, SuperGLUE and others by their own terms)"
_BB: Final = "BIG-bench"
_APACHE: Final = "Apache-2.0"


def _cl(folder: str, question: str, labels: Mapping[str, str], passage: str = "") -> TextTask:
    read = source.benchmark(folder, question, labels, passage=passage)
    return TextTask(read, f"{_CL}: {folder}", "MIT (collection)")


def _bb(name: str, question: str, choices: tuple[str, ...] = ()) -> TextTask:
    return TextTask(source.bigbench(name, question, choices), f"{_BB}: {name}", _APACHE)


def _qa(folder: str) -> TextTask:
    return TextTask(source.qa(folder), f"LLM-Adapters: {folder}", "Apache-2.0 (collection)")


def _clinc(*domains: str) -> TextTask:
    return TextTask(source.requests(domains, CLINC_DOMAINS), "CLINC150", "CC BY 3.0")


def _bank(*categories: str) -> TextTask:
    return TextTask(source.banking(categories), "Banking77", "CC BY 4.0")


def _news(part: int, *labels: str) -> TextTask:
    return TextTask(source.news(part, labels), f"{_CL}: AG News", "non-commercial research")


def _intents(*names: str) -> TextTask:
    return TextTask(source.intents(names), "CLINC150", "CC BY 3.0")


def _part(task: TextTask, part: int, parts: int = 2) -> TextTask:
    """One of several equal parts of a task's rows, by hash."""

    def read(data: Path) -> Iterator[Row]:
        return (row for row in task.read(data) if stable_hash("half", normalise(row.group)) % parts == part)

    return replace(task, read=read)


TEXT_TEN: Final[dict[str, dict[str, TextTask]]] = {
    "reviews": {
        "film-quotes": _cl("SC/SST-2", "Good or Bad?", source.same(*source.BINARY)),
        "films": _cl("SC/IMDB", "Good or Bad?", source.same(*source.BINARY)),
        "products": _cl("SC/amazon", "Good or Bad?", source.STARS),
        "places": _cl("SC/yelp", "Good or Bad?", source.STARS),
    },
    "news": {
        "world-or-sports": _news(0, "World", "Sports"),
        "business-or-technology": _news(1, "Business", "Science or Technology"),
        "topic": _news(2, *source.NEWS),
        "kind": TextTask(source.kinds, f"{_CL}: DBpedia", "CC BY-SA 3.0"),
    },
    "inference": {
        "rte": _cl("NLI/RTE", "entailment or contradiction?", source.same("entailment", "contradiction")),
        "cb": _cl("NLI/CB", "entailment, contradiction or neutral?", source.same(*source.ENTAILMENT)),
        "mnli": _cl("NLI/MNLI", "entailment, contradiction or neutral?", source.same(*source.ENTAILMENT)),
        "presuppositions": _bb(
            "presuppositions_as_nli", "entailment, contradiction or neutral?", source.ENTAILMENT
        ),
    },
    "meaning": {
        "same-question": _cl("QQP/QQP", "Do both ask the same? True or False?", source.same(*source.TRUTH)),
        "same-sense": _cl("WiC/WiC", "The same sense? True or False?", source.same(*source.TRUTH)),
        "metaphor": _bb("metaphor_boolean", "The right paraphrase? True or False?", source.TRUTH),
        "implicature": _bb("implicatures", "Does the answer mean yes or no?", ("yes", "no")),
    },
    "science": {
        "arc-easy": _qa("ARC-Easy"),
        "openbookqa": _qa("openbookqa"),
        "arc-challenge": _qa("ARC-Challenge"),
        "piqa": _qa("piqa"),
    },
    "commonsense": {
        "copa": _cl("COPA/COPA", "A or B?", source.same("A", "B")),
        "social": _bb("social_iqa", "Which?"),
        "pronouns": _bb("winowhy", "correct or incorrect?", ("correct", "incorrect")),
        "sports": _bb("sports_understanding", "plausible or implausible?", ("plausible", "implausible")),
    },
    "reading": {
        "boolq": _cl("BoolQA/BoolQA", "True or False?", source.same(*source.TRUTH), "\npassage:"),
        "strategy": _bb("strategyqa", "Yes or No?", ("Yes", "No")),
        "beliefs": _bb(
            "epistemic_reasoning", "entailment or non-entailment?", ("entailment", "non-entailment")
        ),
        "colours": _bb("reasoning_about_colored_objects", "Which?"),
    },
    "money": {
        "accounts": _clinc("banking", "credit_cards"),
        "cards": _bank("card_arrival", "card_linking", "card_about_to_expire", "card_not_working"),
        "transfers": _bank("cancel_transfer", "pending_transfer", "failed_transfer", "transfer_timing"),
        "top-ups": _bank("pending_top_up", "top_up_failed", "top_up_reverted", "verify_top_up"),
    },
    "requests": {
        "house": _clinc("kitchen_and_dining", "home"),
        "road": _clinc("auto_and_commute", "travel"),
        "day": _clinc("utility", "work"),
        "talk": _clinc("small_talk", "meta"),
    },
    "logic": {
        "navigate": _bb("navigate", "Back at the start? True or False?", source.TRUTH),
        "fallacies": _bb("logical_fallacy_detection", "Valid or Invalid?", ("Valid", "Invalid")),
        "times": _bb("temporal_sequences", "When?"),
        "recommendation": _bb("movie_recommendation", "Which is similar?"),
    },
}
"""Domain, then task in order; all of it closed questions in English."""

_HOME: Final = _clinc("kitchen_and_dining", "home", "travel", "banking")
_WORK: Final = _clinc("auto_and_commute", "utility", "work", "credit_cards")
_BANK: Final = _bank("cancel_transfer", "pending_top_up", "lost_or_stolen_card", "exchange_rate")

TEXT_PAIRS: Final[dict[str, dict[str, TextTask]]] = {
    f"{name}-{'ab'[part]}": {f"{name}-{'ab'[part]}": _part(task, part)}
    for name, task in (("home", _HOME), ("work", _WORK), ("bank", _BANK))
    for part in (0, 1)
}
"""Three pairs of clients that hold halves of one data set each: what relevance should find, if anything."""

_SIBLINGS: Final = {
    "bank": (
        ("freeze_account", "routing", "pay_bill", "balance", "interest_rate"),
        ("account_blocked", "min_payment", "transfer", "order_checks", "spending_history"),
    ),
    "travel": (
        ("plug_type", "translate", "flight_status", "timezone", "lost_luggage"),
        ("international_visa", "exchange_rate", "vaccines", "book_hotel", "car_rental"),
    ),
}


def _siblings(count: int) -> dict[str, dict[str, TextTask]]:
    """So many clients of each of two domains, with equal parts of the domain's rows."""
    return {
        f"{name}-{letter}": {
            f"{name}-{number}": _part(_intents(*names), part, count)
            for number, names in enumerate(tasks, start=1)
        }
        for name, tasks in _SIBLINGS.items()
        for part, letter in enumerate(ascii_lowercase[:count])
    }


TEXT_SIBLINGS: Final = _siblings(3)
"""Three clients for each of two domains, two tasks of five intents each, in order.

A client has two siblings, so that no policy makes it take much from strangers.
"""

TEXT_SIBLINGS_MANY: Final = _siblings(12)
"""The same with twelve clients for each domain: what many members make of the noise of each."""

_PEOPLE: Final = ("Tom", "Lily", "Ben", "Sue", "Max")

_FORMS: Final = ("Request: {}\nWho?", "A letter says: {}\nIt goes to the desk of")


def _houses(forms: tuple[str, str]) -> dict[str, dict[str, TextTask]]:
    """Two houses of three clients: the same kinds of requests, and other people who handle them."""
    return {
        f"{house}-{'abc'[part]}": {
            f"{house}-{number}": _part(
                TextTask(source.desks(names, _PEOPLE, shift, form), "CLINC150", "CC BY 3.0"), first + part, 6
            )
            for number, names in enumerate(_SIBLINGS["bank"], start=1)
        }
        for house, form, shift, first in (("east", forms[0], 0, 0), ("west", forms[1], 2, 3))
        for part in range(3)
    }


TEXT_DESKS: Final = _houses(_FORMS)
"""What one house teaches is wrong in the other: the case in which it matters from whom a client receives."""

TEXT_DESKS_ONE_FORM: Final = _houses((_FORMS[0], _FORMS[0]))
"""The same, but both houses write alike.

A client's profile is a sum over examples; with the same requests and as many answers of every kind, hardly
anything in it tells the houses apart.
"""

GLUE: Final[dict[str, dict[str, TextTask]]] = {
    "sst-2": {"sst-2": TEXT_TEN["reviews"]["film-quotes"]},
    "qqp": {"qqp": TEXT_TEN["meaning"]["same-question"]},
    "mnli": {"mnli": TEXT_TEN["inference"]["mnli"]},
    "rte": {"rte": TEXT_TEN["inference"]["rte"]},
}
"""One GLUE task per client, as far as its data are at hand."""

TEXT_SETS: Final = {
    "text-ten": TEXT_TEN,
    "text-pairs": TEXT_PAIRS,
    "text-siblings": TEXT_SIBLINGS,
    "text-siblings-many": TEXT_SIBLINGS_MANY,
    "text-desks": TEXT_DESKS,
    "text-desks-one-form": TEXT_DESKS_ONE_FORM,
    "glue": GLUE,
}


def build(
    name: str, data: Path, train_rows: int, test_rows: int, *, tuning: bool = False
) -> Iterator[tuple[str, str, list[Example], list[Example]]]:
    """Split every task of a set.

    Args:
        name: of the set.
        data: folder with the data sets.
        train_rows: most training examples per task.
        test_rows: most test examples per task.
        tuning: give validation examples in place of test examples.

    Yields:
        Client, task, training examples, test examples.

    Raises:
        ConfigurationError: there is no such set, a data set is missing, or a task has hardly any rows.
    """
    if name not in TEXT_SETS:
        raise ConfigurationError(f"there is no text set {name!r}; known: {', '.join(TEXT_SETS)}")
    seen: set[str] = set()
    for client, tasks in TEXT_SETS[name].items():
        for task, content in tasks.items():
            rows = read_rows(task, content.origin, content.read, data)
            train, test = split_rows(f"{client}/{task}", rows, train_rows, test_rows, seen, tuning=tuning)
            check_enough(task, train, test)
            yield client, task, train, test


def check_enough(name: str, train: Sequence[Example], test: Sequence[Example]) -> None:
    """Refuse a task that has fewer than eight training or test examples.

    Raises:
        ConfigurationError: it has.
    """
    if len(train) < 8 or len(test) < 8:
        raise ConfigurationError(
            f"task {name} has {len(train)} training and {len(test)} test rows; give eight of each"
        )


def read_rows(name: str, origin: str, read: Callable[[Path], Iterable[Kind]], data: Path) -> list[Kind]:
    """All rows of a task.

    Raises:
        ConfigurationError: its data set is missing.
    """
    try:
        return list(read(data))
    except OSError as error:
        raise ConfigurationError(
            f"{error.filename} is missing; task {name} needs {origin} in the data folder"
        ) from None


def split_rows(
    name: str,
    rows: Sequence[Row],
    train_rows: int,
    test_rows: int,
    seen: set[str],
    *,
    tuning: bool = False,
) -> tuple[list[Example], list[Example]]:
    """Divide the distinct rows of a task by the hash of their group, and take the first by hash of each part.

    Validation examples come from the part for training, of groups that no training example is of. The
    training examples stay the same, and what is tuned on them has seen no test example.

    Args:
        name: of the task, which the ids of examples begin with.
        rows: of the task.
        train_rows: most training examples.
        test_rows: most test examples.
        seen: normalised prompts that another task uses already; those of this one are added.
        tuning: give validation examples in place of test examples.

    Returns:
        Training examples, and test or validation examples.
    """
    border = int(TEST_SHARE * 2**64)
    train: list[Example] = []
    test: list[Example] = []
    trained_groups: set[str] = set()
    for row in sorted(rows, key=lambda r: stable_hash("row order", r.prompt)):
        key, group = normalise(row.prompt), normalise(row.group)
        if not key or key in seen or row.answer not in row.choices:
            continue
        tested = stable_hash("row test", group) < border
        if not tested and len(train) < train_rows:
            part = train
            trained_groups.add(group)
        elif len(test) < test_rows and (not tested and group not in trained_groups if tuning else tested):
            part = test
        else:
            continue
        seen.add(key)
        part.append(Example(f"{name}-{stable_hash('row id', key):016x}", row.prompt, row.answer, row.choices))
    return train, test


def write_set(
    name: str,
    data: Path,
    out: Path,
    train_rows: int,
    test_rows: int,
    public_rows: int,
    *,
    tuning: bool = False,
) -> dict[str, dict[str, object]]:
    """Write a set, its public examples and its table.

    Args:
        name: of the set.
        data: folder with the data sets.
        out: made if absent; `<client>/<task>.train.jsonl`, `<client>/<task>.test.jsonl`, `public.jsonl` and
            `table.json` are written into it.
        train_rows: most training examples per task.
        test_rows: most test examples per task.
        public_rows: most public examples.
        tuning: write validation examples in place of test examples, under the same names.

    Returns:
        What `table.json` says: per task its sizes, origin and licence.
    """
    table: dict[str, dict[str, object]] = {}
    for client, task, train, test in build(name, data, train_rows, test_rows, tuning=tuning):
        folder = out / client
        folder.mkdir(parents=True, exist_ok=True)
        write_examples(folder / f"{task}.train.jsonl", train)
        write_examples(folder / f"{task}.test.jsonl", test)
        content = TEXT_SETS[name][client][task]
        most = max(sum(e.answer == a for e in test) for a in {e.answer for e in test}) / len(test)
        table[f"{client}/{task}"] = {
            "train": len(train),
            "test": len(test),
            "most_frequent_answer": round(most, 3),
            "origin": content.origin,
            "licence": content.licence,
        }
    write_public(data, out, public_rows)
    (out / "table.json").write_text(json.dumps(table, indent=2) + "\n")
    return table


def write_public(data: Path, out: Path, rows: int) -> None:
    """Write `public.jsonl`: instructions and texts that no client has, for bases and for servers that distil.

    Args:
        data: folder with the data sets.
        out: folder to write into.
        rows: most examples.
    """
    pairs = sorted(set(source.public_texts(data)), key=lambda pair: stable_hash("public", pair[0]))
    usable = (pair for pair in pairs if all(pair))
    public = [
        Example(f"public-{stable_hash('public id', '|'.join(pair)):016x}", *pair)
        for pair in islice(usable, rows)
    ]
    write_examples(out / "public.jsonl", public)
