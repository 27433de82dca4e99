"""Sets of text tasks, from the folders that their data sets are published in. Every question is closed."""

import errno
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Final

from fedmosaic.experiments.tasks import rows
from fedmosaic.experiments.tasks.labelled import shorten, stable_hash
from fedmosaic.experiments.tasks.relevance_sets import CLINC_DOMAINS

_CHARACTERS: Final = 240
_ANSWER: Final = 40
_NEWS: Final = ("World", "Sports", "Business", "Science or Technology")
_PEOPLE: Final = ("Tom", "Lily", "Ben", "Sue", "Max")


def _benchmark(folder: str, asked: str, labels: Sequence[str]) -> rows.Task:
    """A task of O-LoRA's CL_Benchmark; texts with other labels are left out."""

    def read(data: Path) -> Iterator[rows.Row]:
        place = data / "cl_benchmark_text" / folder
        files = [path for name in ("train.json", "test.json") if (path := place / name).exists()]
        if not files:
            raise FileNotFoundError(errno.ENOENT, "no train.json or test.json", str(place))
        for row in (row for path in files for row in rows.read_json(path)):
            if row["label"] in labels:
                text = str(row["sentence"]).strip()
                short = shorten(" ".join(text.split()), _CHARACTERS)
                yield rows.Row(f"{short}\n{asked}", row["label"], tuple(labels), text)

    return rows.Task(
        read, f"O-LoRA CL_Benchmark: {folder}", "MIT (collection; each data set by its own terms)"
    )


_AG_NEWS: Final = _benchmark("TC/agnews", rows.question(_NEWS), _NEWS)


def _third_of_news(data: Path) -> Iterator[rows.Row]:
    return (row for row in _AG_NEWS.read(data) if stable_hash("news part", row.group) % 3 == 2)


def _clinc(answers: Mapping[str, str], choices: tuple[str, ...], form: str) -> rows.Task:
    """Requests of CLINC150 in a form with `{}`, with the answers by intent; other intents are left out."""

    def read(data: Path) -> Iterator[rows.Row]:
        for text, intent in rows.read_requests(data):
            if intent in answers:
                yield rows.Row(form.format(text), answers[intent], choices, text)

    return rows.Task(read, "CLINC150", "CC BY 3.0")


def _domains(*domains: str) -> rows.Task:
    """Which of several domains does a request belong to?"""
    choices = tuple(name.replace("_", " ") for name in domains)
    named = zip(domains, choices, strict=True)
    answers = {intent: choice for name, choice in named for intent in CLINC_DOMAINS[name].split()}
    return _clinc(answers, choices, f"Request: {{}}\n{rows.question(choices)}")


def _intents(*names: str) -> rows.Task:
    """Which of a few intents does a request express? The prompt does not list them."""
    answers = {name: name.replace("_", " ") for name in names}
    return _clinc(answers, tuple(answers.values()), "Request: {}\nIntent?")


def _desks(names: tuple[str, ...], shift: int, form: str) -> rows.Task:
    """Who of five people handles a request? The intent at place i belongs to person i + shift."""
    people = {name: _PEOPLE[(place + shift) % len(_PEOPLE)] for place, name in enumerate(names)}
    return _clinc(people, _PEOPLE, form)


def _banking(*categories: str) -> rows.Task:
    """A few categories of Banking77."""
    choices = tuple(category.replace("_", " ") for category in categories)

    def read(data: Path) -> Iterator[rows.Row]:
        for row in (
            row for part in ("train", "test") for row in rows.read_csv(data / f"banking77/{part}.csv")
        ):
            if row["category"] in categories:
                answer = row["category"].replace("_", " ")
                yield rows.Row(f"Customer: {row['text']}\nReason?", answer, choices, row["text"])

    return rows.Task(read, "Banking77", "CC BY 4.0")


FOUR: Final[rows.TaskSet] = {
    "reviews": {"film-quotes": _benchmark("SC/SST-2", "Good or Bad?", ("Good", "Bad"))},
    "news": {"topic": rows.Task(_third_of_news, _AG_NEWS.origin, "non-commercial research")},
    "inference": {
        "rte": _benchmark("NLI/RTE", "entailment or contradiction?", ("entailment", "contradiction"))
    },
    "requests": {"day": _domains("utility", "work")},
}
"""Four unlike tasks: what the attacks are measured on."""

UNLIKE: Final[rows.TaskSet] = {
    **FOUR,
    "house": {"house": _domains("kitchen_and_dining", "home")},
    "bank": {"cards": _banking("card_arrival", "card_linking", "card_about_to_expire", "card_not_working")},
}
"""Six unlike tasks: what the default rates are held by."""

PAIRS: Final[rows.TaskSet] = {
    f"{name}-{'ab'[number]}": {f"{name}-{'ab'[number]}": rows.part_of(task, number, 2, "half")}
    for name, task in (
        ("home", _domains("kitchen_and_dining", "home", "travel", "banking")),
        ("work", _domains("auto_and_commute", "utility", "work", "credit_cards")),
        ("bank", _banking("cancel_transfer", "pending_top_up", "lost_or_stolen_card", "exchange_rate")),
    )
    for number in (0, 1)
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


def siblings(count: int) -> rows.TaskSet:
    """So many clients of each of two domains, two tasks of five intents each, in equal parts."""
    return {
        f"{name}-{letter}": {
            f"{name}-{task}": rows.part_of(_intents(*names), number, count, "half")
            for task, names in enumerate(tasks, start=1)
        }
        for name, tasks in _SIBLINGS.items()
        for number, letter in enumerate(ascii_lowercase[:count])
    }


_FORMS: Final = ("Request: {}\nWho?", "A letter says: {}\nIt goes to the desk of")


def desks(forms: tuple[str, str] = _FORMS) -> rows.TaskSet:
    """Two groups of three clients with the same kinds of requests, whose right answers contradict each other.

    With one form of request for both, hardly anything in a profile tells the groups apart.
    """
    return {
        f"{group}-{'abc'[number]}": {
            f"{group}-{task}": rows.part_of(_desks(names, shift, form), first + number, 6, "half")
            for task, names in enumerate(_SIBLINGS["bank"], start=1)
        }
        for group, form, shift, first in (("east", forms[0], 0, 0), ("west", forms[1], 2, 3))
        for number in range(3)
    }


TEXT_SETS: Final[dict[str, rows.TaskSet]] = {
    "text-four": FOUR,
    "text-unlike": UNLIKE,
    "text-pairs": PAIRS,
    "text-siblings": siblings(3),
    "text-siblings-many": siblings(12),
    "text-desks": desks(),
    "text-desks-one-form": desks((_FORMS[0], _FORMS[0])),
}


def public_texts(data: Path) -> Iterator[tuple[str, str]]:
    """Public prompts and answers that no task uses: instructions and running text."""
    for _, asked, answer in rows.read_instructions(data):
        # A short answer leaves room for its prompt whatever the tokenizer.
        yield shorten(asked.strip(), _CHARACTERS), shorten(" ".join(answer.split()), _ANSWER)
    for words in rows.read_running_text(data, 48):
        yield " ".join(words[:24]), shorten(" ".join(words[24:40]), _ANSWER)
