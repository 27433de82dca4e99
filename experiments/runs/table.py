"""`fedmosaic experiments table`: every cell of a table of methods, one after the other, in one process.

Every cell is a run in a directory of its own name below the output directory: a table that was stopped goes
on where it stood, and `fedmosaic report OUT/*` reads it like any other runs.
"""

import datetime as dt
import os
import platform
import re
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from pydantic import Field
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from fedmosaic import __version__
from fedmosaic.experiments.comparison.runs import compared_run, group_runs
from fedmosaic.experiments.comparison.tables import markdown
from fedmosaic.experiments.runs.command import run_at, with_changes
from fedmosaic.experiments.scenario.quiet_log import quiet_log
from fedmosaic.experiments.scenario.terms import Scenario
from fedmosaic.privacy.configuration import Frozen, read_configuration
from fedmosaic.protos.errors import ConfigurationError


class TableMethod(Frozen):
    """One row of a table."""

    method: str
    variant: str = ""
    """Words that tell this row from others of the same method."""
    set: tuple[str, ...] = ()
    """Changes to the scenario, as of `fedmosaic run --set`."""
    scenarios: tuple[str, ...] = ()
    """Names of the scenarios that this row is run in; all of them if empty."""


class TableFile(Frozen):
    """A whole table; paths are relative to the file."""

    scenarios: tuple[Path, ...] = Field(min_length=1)
    streams: tuple[Literal["all", "static", "dynamic"], ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    set: tuple[str, ...] = ()
    """Changes to every cell."""
    methods: tuple[TableMethod, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Arguments:
    """Run every cell of a table that is not there yet, then print the table."""

    table: tyro.conf.Positional[Path]
    """The table file (TOML)."""
    out: Path
    """Directory of the runs; made if absent."""
    seeds: tuple[int, ...] = ()
    """Run only these seeds of the file."""
    page: Path | None = None
    """Also write the table into this page of Markdown, between the lines <!-- NAME --> and
    <!-- end of NAME -->; NAME is the table file's, such as text-siblings.toml."""
    list: bool = False
    """Print a command for each cell in place of running it."""


@dataclass(frozen=True)
class Cell:
    """One run of a table: its directory's name, its scenario, and the command that runs the same alone."""

    name: str
    scenario: Scenario
    command: str


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic experiments table` with its arguments."""
    parsed = tyro.cli(Arguments, args=[*arguments], prog="fedmosaic experiments table")
    disable_progress_bar()
    every = cells(parsed)
    if parsed.list:
        for cell in every:
            print(cell.command)
        return 0
    if parsed.page is not None:
        _places(parsed.page, parsed.table.name)
    console, started, ran = Console(), time.monotonic(), 0
    for number, cell in enumerate(every, start=1):
        begun = time.monotonic()
        with quiet_log():
            run_at(cell.scenario, (parsed.out / cell.name).resolve(), Console(quiet=True))
        seconds = time.monotonic() - begun
        ran += seconds > 1.0
        left = (time.monotonic() - started) / max(1, ran) * (len(every) - number) / 60
        console.print(f"{number} of {len(every)}: {cell.name}, {seconds:.0f} s; about {left:.0f} min left")
    groups = group_runs([compared_run(parsed.out / cell.name) for cell in every])
    print(markdown(groups))
    if parsed.page is not None:
        command = shlex.join(["fedmosaic", "experiments", "table", *arguments])
        origin = (
            f"Written by `{command}` of fedmosaic {__version__}: {len(every)} runs, {os.cpu_count()} cores, "
            f"{platform.machine()}, {dt.datetime.now(dt.UTC):%Y-%m-%d}."
        )
        text, start, end = _places(parsed.page, parsed.table.name)
        content = f"{markdown(groups)}\n{origin}".strip()
        parsed.page.write_text(f"{text[:start]}\n\n{content}\n\n{text[end:]}", encoding="utf-8")
    return 0


def _places(page: Path, name: str) -> tuple[str, int, int]:
    """A page's text, and where what stands between its marks of this name begins and ends.

    `ConfigurationError` if the marks are not there once.
    """
    first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{page} cannot be read ({error}); give a page of Markdown") from None
    start, end = text.find(first), text.find(last)
    if not 0 <= start < end or text.count(first) != 1 or text.count(last) != 1:
        raise ConfigurationError(f"{page}: write the lines {first} and {last} where the table is to stand")
    return text, start + len(first), end


def cells(arguments: Arguments) -> list[Cell]:
    """All cells of a table: by scenario, stream, seed, method; `ConfigurationError` if two have one name.

    Seeds go before methods, so that a table that is cut off has whole comparisons of fewer seeds.
    """
    table = read_configuration(arguments.table, TableFile)
    base = arguments.table.parent
    result = []
    for path in table.scenarios:
        scenario = read_configuration(base / path, Scenario).resolved((base / path).parent.resolve())
        result += [
            _cell(base / path, scenario, (f'stream="{stream}"', *table.set), seed, row)
            for stream in table.streams
            for seed in table.seeds
            for row in table.methods
            if seed in (arguments.seeds or table.seeds)
            and scenario.name in (row.scenarios or (scenario.name,))
        ]
    twice = [name for name, count in Counter(cell.name for cell in result).items() if count > 1]
    if twice:
        raise ConfigurationError(f"{arguments.table}: two cells are named {twice[0]}; give one a variant")
    return result


def _cell(path: Path, scenario: Scenario, changes: tuple[str, ...], seed: int, row: TableMethod) -> Cell:
    every = (*changes, *row.set)
    own = with_changes(scenario, (*every, f'method="{row.method}"', f"seed={seed}"), row.variant)
    words = ["fedmosaic", "run", str(path), "--method", row.method, "--seed", str(seed), "--set", *every]
    variant = re.sub(r"[^A-Za-z0-9.]+", "-", row.variant).strip("-")
    parts = (scenario.name, own.stream, row.method, variant, f"seed-{seed}")
    return Cell("-".join(part for part in parts if part), own, shlex.join(words))
