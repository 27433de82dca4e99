"""Tasks, public text and models for the alignment's measurements, from the data sets beside the repository.

    python -m fedmosaic.experiments.studies.alignment.tasks --data DATA --out OUT --model smol=FOLDER

Eight tasks with two or four choices, each in two forms: NAME with words that say what they mean, and
NAME-letters with letters in their place, which a model can only know from training. Letters are one token in
every tokenizer. The public text shares no data set with any task.

The stories model (`--stories`) cannot learn to end an answer as its tokenizer says: it was trained without
`</s>`, whose embedding is that of twenty thousand other unused tokens, so no adapter makes it likelier than
one in twenty thousand. It ends its stories with `<s>`, and the copy that is written names that token.
"""

import json
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import tyro

from fedmosaic.alignment.public_text import read_public_text
from fedmosaic.client.model.examples import Example
from fedmosaic.client.model.load import load_base_model
from fedmosaic.experiments.demo.shallow import cut_model, fit_readouts
from fedmosaic.experiments.scenario.participants import write_examples
from fedmosaic.experiments.studies.alignment.turned import turn_model
from fedmosaic.experiments.tasks.relevance_sets import CLINC_DOMAINS
from fedmosaic.experiments.tasks.rows import read_csv, read_json
from fedmosaic.protos.errors import ConfigurationError

_READOUT_TEXTS: Final = 600
_DOMAINS: Final = ("banking", "travel", "work", "home")
_INTENTS: Final = ("weather", "timer", "recipe", "traffic")
_ACTIONS: Final = ("alarm", "insurance", "spelling", "translate")
_NEWS: Final = {
    "World": "world",
    "Sports": "sports",
    "Business": "business",
    "Science or Technology": "science",
}
_ARTICLES: Final = ("Athlete", "Film", "Animal", "Company")
_THINGS: Final = ("Album", "Building", "Plant", "Village")
_BANKING: Final = {
    "cash_withdrawal": "cash",
    "transfer_": "transfer",
    "exchange": "exchange",
    "top_up": "top",
}
_OPINIONS: Final = {"Good": "good", "Bad": "bad"}
_PUBLIC: Final = ("BoolQA/BoolQA", "QQP/QQP", "NLI/MNLI")
Pairs = list[tuple[str, str]]
"""Prompts and answers."""


@dataclass(frozen=True)
class Arguments:
    """Write NAME.train.jsonl and NAME.test.jsonl, the same as NAME-letters, and general.txt, public text."""

    data: Path
    """Folder with the data sets."""
    out: Path
    """Folder to write to."""
    train_rows: int = 400
    """Training examples per task, balanced."""
    test_rows: int = 96
    """Test examples per task, balanced."""
    public_rows: int = 4000
    """Public texts."""
    model: str | None = None
    """NAME=FOLDER of a model; its first layers go to OUT/NAME-DEPTH, heads refitted on the public text."""
    depths: tuple[int, ...] = (10, 20)
    """How many layers of the model to keep."""
    turned: bool = False
    """Also write each cut model in other coordinates, to OUT/NAME-DEPTH-turned."""
    stories: Path | None = None
    """Folder of the stories model; a copy that can end a text goes to OUT/stories-15m."""


def write_tasks(arguments: Arguments) -> None:
    """Write the files; see `Arguments`. `ConfigurationError` if a data set is missing or too small."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        tasks = _tasks(arguments.data)
        public = _public(arguments.data, arguments.public_rows)
    except OSError as error:
        raise ConfigurationError(
            f"{error.filename} is missing; give the folder with the data sets"
        ) from error
    for name, (train, test) in tasks.items():
        for split, pairs, rows in (
            ("train", train, arguments.train_rows),
            ("test", test, arguments.test_rows),
        ):
            examples = _balanced(name, split, pairs, rows)
            write_examples(arguments.out / f"{name}.{split}.jsonl", examples)
            write_examples(
                arguments.out / f"{name}-letters.{split}.jsonl", [_in_letters(e) for e in examples]
            )
    (arguments.out / "general.txt").write_text("\n".join(public) + "\n", encoding="utf-8")


def write_story_model(folder: Path, out: Path) -> None:
    """Copy a model folder, with the token that begins a text as the one that ends it."""
    try:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        for file in folder.iterdir():
            shutil.copyfile(file, out / file.name)
        settings = read_json(out / "tokenizer_config.json")
        settings["eos_token"] = settings["bos_token"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(
            f"{folder} is no model with a tokenizer that begins texts ({error})"
        ) from None
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_shallow_models(
    folder: Path, depths: Sequence[int], public: Path, out: Path, *, turned: bool = False
) -> None:
    """Cut a model to its first layers, with output heads refitted on public text, as folders OUT-DEPTH."""
    model, tokenizer = load_base_model(folder)
    texts = [text.text for text in read_public_text(public, _READOUT_TEXTS)]
    sequences = [tokenizer(text, truncation=True, max_length=64)["input_ids"] for text in texts]
    readouts = fit_readouts(model, sequences, depths)
    for depth in depths:
        shallow = cut_model(model, depth, readouts[depth])
        for name in (f"{out}-{depth}", f"{out}-{depth}-turned")[: 1 + turned]:
            if name.endswith("-turned"):
                turn_model(shallow, seed=0)
            shallow.save_pretrained(name)
            tokenizer.save_pretrained(name)


def _tasks(data: Path) -> dict[str, tuple[Pairs, Pairs]]:
    """Training and test pairs by task."""
    text, intents = data / "cl_benchmark_text", read_json(data / "clinc150/data_full.json")
    domain_of = {intent: name for name in _DOMAINS for intent in CLINC_DOMAINS[name].split()}
    articles, things = (
        _labelled(text / "TC/dbpedia/test.json", "Article", {name: name.lower() for name in names})
        for names in (_ARTICLES, _THINGS)
    )
    return {
        "clinc": _both(
            lambda s: [(f"Request: {t}\nTopic?", domain_of[i]) for t, i in intents[s] if i in domain_of]
        ),
        "intents": _both(lambda s: [(f"Request: {t}\nTopic?", i) for t, i in intents[s] if i in _INTENTS]),
        "actions": _both(lambda s: [(f"Request: {t}\nTopic?", i) for t, i in intents[s] if i in _ACTIONS]),
        "agnews": _both(lambda s: _labelled(text / f"TC/agnews/{s}.json", "News", _NEWS)),
        "sst2": _both(lambda s: _labelled(text / f"SC/SST-2/{s}.json", "Review", _OPINIONS)),
        "dbpedia": (articles[:1500], articles[1500:]),
        "things": (things[:1500], things[1500:]),
        "banking": _both(lambda s: _questions(data / f"banking77/{s}.csv")),
    }


def _both(pairs: Callable[[str], Pairs]) -> tuple[Pairs, Pairs]:
    return pairs("train"), pairs("test")


def _labelled(path: Path, opening: str, words: dict[str, str]) -> Pairs:
    question = "Opinion?" if opening == "Review" else "Topic?"
    rows = [row for row in read_json(path) if row["label"] in words]
    return [(f"{opening}: {_short(row['sentence'])}\n{question}", words[row["label"]]) for row in rows]


def _questions(path: Path) -> Pairs:
    """Questions to a bank by the one part of it that they are about."""
    named = [
        (row["text"], [word for part, word in _BANKING.items() if part in row["category"]])
        for row in read_csv(path)
    ]
    return [(f"Question: {_short(text)}\nTopic?", found[0]) for text, found in named if len(found) == 1]


def _public(data: Path, rows: int) -> list[str]:
    wiki = [
        line for part in ("valid", "test") for line in (data / f"wikitext2/{part}.txt").open(encoding="utf-8")
    ]
    texts = [line.replace("<unk>", "") for line in wiki if len(line) > 150]
    for source in _PUBLIC:
        texts += [row["sentence"] for row in read_json(data / f"cl_benchmark_text/{source}/train.json")][:800]
    random.Random("public").shuffle(texts)  # noqa: S311 - public data, no secret
    return [_short(text, 250) for text in texts][:rows]


def _short(text: str, characters: int = 120) -> str:
    plain = " ".join(text.replace("Text:", " ").replace("Title:", " ").split())
    return plain[:characters].strip()


def _balanced(name: str, split: str, pairs: Pairs, rows: int) -> list[Example]:
    choices = tuple(sorted({answer for _, answer in pairs}))
    distinct = sorted(dict(pairs).items())
    random.Random(f"{name} {split}").shuffle(distinct)  # noqa: S311 - public data, no secret
    of_class = [
        [pair for pair in distinct if pair[1] == choice][: rows // len(choices)] for choice in choices
    ]
    if min(map(len, of_class)) < rows // len(choices):
        raise ConfigurationError(
            f"{name} has too few {split} examples for {rows} balanced ones; ask for fewer"
        )
    # Classes in turn, so that every beginning of the file is balanced as well as it can be.
    return [
        Example(f"{name}-{split}-{index}-{place}", prompt, answer, choices)
        for index, turn in enumerate(zip(*of_class, strict=True))
        for place, (prompt, answer) in enumerate(turn)
    ]


def _in_letters(example: Example) -> Example:
    letters = tuple("ABCD"[: len(example.choices)])
    answer = letters[example.choices.index(example.answer)]
    return Example(f"{example.id}-letters", example.prompt, answer, letters)


def main(arguments: Sequence[str]) -> int:
    """Run `python -m fedmosaic.experiments.studies.alignment.tasks`."""
    parsed = tyro.cli(Arguments, args=list(arguments))
    write_tasks(parsed)
    if parsed.stories is not None:
        write_story_model(parsed.stories, parsed.out / "stories-15m")
    if parsed.model is not None:
        name, _, folder = parsed.model.partition("=")
        public, out = parsed.out / "general.txt", parsed.out / name
        write_shallow_models(Path(folder), parsed.depths, public, out, turned=parsed.turned)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
