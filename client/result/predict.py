"""`fedmosaic predict STATE --data FILE --out FILE`: the member's model answers rows of a file."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from fedmosaic.client.data.records import read_questions
from fedmosaic.client.model.scoring import Examiner
from fedmosaic.client.result.saved import Opening
from fedmosaic.client.settings import ColumnSettings
from fedmosaic.privacy.files import write_atomically
from fedmosaic.protos.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Arguments(Opening):
    """Answer every row of a file with a client's model: its most likely choice, or free text."""

    data: Path
    """Rows with prompt, choices and id, in any format of `data.train`; without choices the model writes."""
    out: Path
    """JSON lines of {"id": …, "answer": …}, in the same order; written when all are answered."""
    columns: ColumnSettings = field(default_factory=ColumnSettings)
    """As `[data.columns]` of the client."""
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
    rows = read_questions(parsed.data, parsed.columns)
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
