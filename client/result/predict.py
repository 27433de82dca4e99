"""`fedmosaic predict STATE --data FILE --out FILE`: the member's model answers rows of a file."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from fedmosaic.client.data.records import Example, listed
from fedmosaic.client.data.sources import rows_of
from fedmosaic.client.model.scoring import Examiner
from fedmosaic.client.result.saved import Opening
from fedmosaic.privacy.files import write_atomically
from fedmosaic.protos.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Arguments(Opening):
    """Answer every row of a file with a client's model: its most likely choice, or free text."""

    data: Path
    """Rows with prompt, choices and id, in any format of `data.train`; without choices the model writes."""
    out: Path
    """JSON lines of {"id": …, "answer": …}, in the same order; written when all are answered."""
    batch_size: int = 16
    """Rows at once."""
    max_new_tokens: int = 64
    """Most tokens of a free text."""


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic predict` with its arguments."""
    parsed = tyro.cli(Arguments, args=list(arguments), prog="fedmosaic predict")
    for name, value in (("batch-size", parsed.batch_size), ("max-new-tokens", parsed.max_new_tokens)):
        if value < 1:
            raise ConfigurationError(f"--{name} is {value}; give at least 1")
    if parsed.out.resolve() == parsed.data.resolve():
        raise ConfigurationError(f"--out is --data, {parsed.out}; give another file")
    rows = read_questions(parsed.data)
    opened = parsed.open(needs=rows)
    examiner = Examiner(opened.model, opened.tokenizer, parsed.batch_size, opened.saved.max_length)
    lines = []
    for start in range(0, len(rows), parsed.batch_size):
        batch = rows[start : start + parsed.batch_size]
        given = zip(batch, examiner.answers(batch, parsed.max_new_tokens), strict=True)
        told = ({"id": row.id, "answer": answer} for row, answer in given)
        lines += [json.dumps(line, ensure_ascii=False) + "\n" for line in told]
        if sys.stderr.isatty():  # a log has no use for it
            done = start + len(batch)
            end = "\n" if done == len(rows) else ""
            print(f"\r{done:,} of {len(rows):,} rows", end=end, file=sys.stderr, flush=True)
    write_atomically(parsed.out, "".join(lines).encode())
    print(f"{len(rows):,} answers in {parsed.out}")
    return 0


def read_questions(path: Path) -> list[Example]:
    """Read rows to be answered; what they have besides prompt, choices and id is left alone.

    ConfigurationError if a row has no prompt, or choices that are none. The row is named, not its content.
    """
    rows = []
    for number, (where, row) in enumerate(rows_of(path), 1):
        if not isinstance(row, Mapping):
            raise ConfigurationError(f"{where} is a {type(row).__name__}; write an object, columns by name")
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise ConfigurationError(f"{where}: 'prompt' must be a text that is not empty")
        name = str(row.get("id", f"row-{number}"))
        rows.append(Example(name, prompt, *_choices(row.get("choices"), where)))
    if not rows:
        raise ConfigurationError(f"{path} holds no row; give at least one with a prompt")
    return rows


def _choices(given: Any, where: str) -> tuple[str, tuple[str, ...]]:
    """An answer that stands for none, and the choices."""
    choices: Any = listed(given)
    if choices == []:
        return "", ()
    texts = isinstance(choices, list) and all(isinstance(choice, str) and choice for choice in choices)
    if not texts or len(set(choices)) != len(choices) or len(choices) < 2:
        raise ConfigurationError(f"{where}: 'choices' must be a list of two or more different texts")
    return choices[0], tuple(choices)
