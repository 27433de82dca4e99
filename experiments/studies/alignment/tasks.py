"""Tasks and public text for the alignment's measurements, from the data sets beside the repository.

    python -m fedmosaic.experiments.studies.alignment.tasks --data DATA --out runs/alignment/data
    python -m fedmosaic.experiments.studies.alignment.tasks … --stories MODELS/stories-15m

Three tasks with few, short choices, and public text that shares no data set with any of them.

The stories model cannot learn to end an answer as its tokenizer says: it was trained without `</s>`, whose
embedding is one and the same vector as those of some twenty thousand other unused tokens, so that no final
state makes it more likely than one in twenty thousand (10 nats), however it is adapted. It does end its
stories, with `<s>`. The copy that is written here names `<s>` as the end of a text. Its first five layers are
written as a model of their own, with an output head refitted on the public text.
"""

import json
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import tyro

from fedmosaic.alignment.public_text import read_public_text
from fedmosaic.client.data.records import row_of
from fedmosaic.client.model.examples import Example
from fedmosaic.client.model.load import load_base_model
from fedmosaic.experiments.demo.shallow import cut_model, fit_readouts
from fedmosaic.experiments.tasks.relevance_sets import CLINC_DOMAINS
from fedmosaic.protos.errors import ConfigurationError

_PUBLIC: Final = (
    ("TC/dbpedia/test", "Article", "What kind?"),
    ("QQP/QQP/train", "Questions", "Duplicate?"),
    ("NLI/RTE/train", "Text", "Entailment?"),
    ("WiC/WiC/train", "Words", "Same meaning?"),
)
_READOUT_TEXTS: Final = 1500
_DOMAINS: Final = ("banking", "travel", "work", "home")
Pairs = list[tuple[str, str]]
"""Prompts and answers."""


@dataclass(frozen=True)
class Arguments:
    """Write NAME.train.jsonl, .valid.jsonl and .test.jsonl for sst2, agnews and clinc, and public text.

    The public texts are in public.jsonl as prompts with answers, and in plain.jsonl as plain texts.
    """

    data: Path
    """Folder with the data sets."""
    out: Path
    """Folder to write to."""
    train_rows: int = 400
    """Training examples per task, balanced."""
    test_rows: int = 160
    """Test examples per task, balanced; as many for validation, from the training part of the data."""
    public_rows: int = 6000
    """Public texts."""
    stories: Path | None = None
    """Folder of the stories model; a copy that ends texts as it was trained to goes to OUT/stories-15m."""


def write_tasks(arguments: Arguments) -> None:
    """Write the files; see `Arguments`. `ConfigurationError` if a data set is missing or too small."""
    text = arguments.data / "cl_benchmark_text"
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        tasks = {
            "sst2": _sentences(text / "SC/SST-2", "Review", "Good or bad?"),
            "agnews": _sentences(
                text / "TC/agnews", "News", "World, sports, business or science or technology?"
            ),
            "clinc": _intents(arguments.data / "clinc150/data_full.json"),
        }
        public = [example for source in _PUBLIC for example in _public(text, *source)]
    except OSError as error:
        raise ConfigurationError(
            f"{error.filename} is missing; give the folder with the data sets"
        ) from error
    for name, (train, test) in tasks.items():
        both = _balanced(name, "train", train, arguments.train_rows + arguments.test_rows)
        _write(arguments.out / f"{name}.train.jsonl", both[: arguments.train_rows])
        _write(arguments.out / f"{name}.valid.jsonl", both[arguments.train_rows :])
        _write(arguments.out / f"{name}.test.jsonl", _balanced(name, "test", test, arguments.test_rows))
    random.Random("public").shuffle(public)  # noqa: S311 - public data, no secret
    public = public[: arguments.public_rows]
    plain = [{"text": f"{row['prompt']}\n{row['answer']}"} for row in public]
    for name, rows in (("public", public), ("plain", plain)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (arguments.out / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def write_story_model(folder: Path, out: Path) -> None:
    """Copy a model folder, with the token that begins a text as the one that ends it."""
    try:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        for file in folder.iterdir():
            shutil.copyfile(file, out / file.name)
        settings = _json(out / "tokenizer_config.json")
        settings["eos_token"] = settings["bos_token"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(
            f"{folder} is no model with a tokenizer that begins texts ({error})"
        ) from None
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_shallow_model(folder: Path, depth: int, public: Path, out: Path) -> None:
    """Cut a model to its first layers, with an output head refitted on public text."""
    model, tokenizer = load_base_model(folder)
    texts = [f"{text.prompt}\n{text.text}" for text in read_public_text(public, _READOUT_TEXTS)]
    sequences = [tokenizer(text, truncation=True, max_length=64)["input_ids"] for text in texts]
    shallow = cut_model(model, depth, fit_readouts(model, sequences, (depth,))[depth])
    shallow.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))


def _splits(pairs: Callable[[str], Pairs]) -> tuple[Pairs, Pairs]:
    return pairs("train"), pairs("test")


def _sentences(folder: Path, opening: str, question: str) -> tuple[Pairs, Pairs]:
    return _splits(
        lambda split: [
            (f"{opening}: {_short(row['sentence'])}\n{question}", row["label"].lower())
            for row in _json(folder / f"{split}.json")
        ]
    )


def _intents(path: Path) -> tuple[Pairs, Pairs]:
    domain_of = {intent: name for name in _DOMAINS for intent in CLINC_DOMAINS[name].split()}
    question = f"{', '.join(_DOMAINS[:-1]).capitalize()} or {_DOMAINS[-1]}?"
    return _splits(
        lambda split: [
            (f"Request: {text}\n{question}", domain_of[intent])
            for text, intent in _json(path)[split]
            if intent in domain_of
        ]
    )


def _public(text: Path, source: str, opening: str, question: str) -> list[dict[str, str]]:
    return [
        {"prompt": f"{opening}: {_short(row['sentence'], 200)}\n{question}", "answer": row["label"].lower()}
        for row in _json(text / f"{source}.json")
    ]


def _short(text: str, characters: int = 120) -> str:
    plain = " ".join(text.replace("Text:", " ").replace("Title:", " ").split())
    return plain[:characters].strip()


def _balanced(name: str, split: str, pairs: Sequence[tuple[str, str]], rows: int) -> list[Example]:
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


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, examples: Sequence[Example]) -> None:
    path.write_text("".join(json.dumps(row_of(example)) + "\n" for example in examples), encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """Run `python -m fedmosaic.experiments.studies.alignment.tasks`."""
    parsed = tyro.cli(Arguments, args=list(arguments))
    write_tasks(parsed)
    if parsed.stories is not None:
        write_story_model(parsed.stories, parsed.out / "stories-15m")
        write_shallow_model(
            parsed.out / "stories-15m", 5, parsed.out / "public.jsonl", parsed.out / "stories-first5"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
