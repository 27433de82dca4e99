"""The demo's last screen: a verdict in words, one table, the worst privacy statement, one next command."""

import math
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedmosaic.client.result.comparison import ALONE, Difference, paired_difference
from fedmosaic.experiments.comparison.record import RunRecord, alone, usable_statements
from fedmosaic.privacy.statement.models import ClientStatement
from fedmosaic.privacy.statement.render import client_grid

Scores = Mapping[str, float]


def ending(record: RunRecord) -> RenderableType:
    """What came out of the demo, in less than 60 lines of 80 columns."""
    parts: list[RenderableType] = [Text(), verdict(record), Text()]
    parts += [Text(line, style="bold red") for line in alone(record)]
    parts += [_table(record), Text(_found(record.server)), Text()]
    worst = worst_statement(record)
    if worst is not None:
        parts += [Text("Who can learn what about one training text, for the client with most at stake:")]
        parts += [client_grid(worst)]
    return Group(*parts)


def verdict(record: RunRecord) -> Text:
    """Whether sharing was worth it, in words, with what chance leaves open."""
    words = f"Together, the clients answer {_mean(_own(record, 'after'))} of their own test texts right"
    gain = _gain(record)
    if gain is None:
        words += f"; before training it was {_mean(_own(record, 'before'))}."
    else:
        low, high = (f"{100 * end:+.0f}" for end in (gain.low, gain.high))
        words += f", each trained alone {_mean(_own(record, ALONE))}: {100 * gain.mean:+.0f} points "
        words += f"(95 % interval {low} to {high}). "
        if not gain.decided:
            words += f"{gain.rows} test texts cannot tell sharing from training alone."
        else:
            words += "Sharing paid" if gain.mean > 0 else "Training alone was better"
            words += f", by more than chance gives on {gain.rows} test texts."
    for whose, same in (("the members with the same task", True), ("the members with another task", False)):
        before, after = (_mean(_others(record, when, same=same)) for when in ("before", "after"))
        words += f" On the texts of {whose} they went from {before} to {after}."
    return Text(words, style="bold")


def _gain(record: RunRecord) -> Difference | None:
    """Together less alone on the own test texts of all clients; None if they were not trained alone."""
    right: dict[str, list[bool]] = {ALONE: [], "after": []}
    for result in record.clients.values():
        rows = result.get("rows", {})
        if not all("self" in rows.get(when, {}) for when in right):
            return None
        for when, found in right.items():
            found += rows[when]["self"]["right"]
    return paired_difference(right["after"], right[ALONE]) if right[ALONE] else None


def _table(record: RunRecord) -> Table:
    table = Table(title="Accuracy on the own texts, and on the texts of all others")
    table.add_column("client")
    for column in ("majority", "before", "alone", "together", "others before", "after"):
        table.add_column(column, justify="right")
    columns = (
        {name: value for name, value in record.majority.items() if not math.isnan(value)},
        _own(record, "before"),
        _own(record, ALONE),
        _own(record, "after"),
        _others(record, "before"),
        _others(record, "after"),
    )
    for name in record.clients:
        table.add_row(name, *(f"{column[name]:.2f}" if name in column else "-" for column in columns))
    table.add_section()
    table.add_row("mean", *(f"{fmean(column.values()):.2f}" if column else "-" for column in columns))
    table.caption = "majority: always the most frequent answer; alone: as many steps, nothing received"
    return table


def _found(server: Mapping[str, Any]) -> str:
    """Whom the noisy profiles found to be most like each other."""
    results = server.get("results")
    if not results:
        return ""
    names, rows = results[-1]["clients"], results[-1]["similarity"]
    nearest = {}
    for i, name in enumerate(names):
        known = {names[j]: value for j, value in enumerate(rows[i]) if j != i and value is not None}
        if known:
            nearest[name] = max(known, key=known.__getitem__)
    pairs = [f"{one} and {other}" for one, other in nearest.items() if nearest.get(other) == one < other]
    return f"Found by their noisy task profiles to be most alike: {'; '.join(pairs)}." if pairs else ""


def worst_statement(record: RunRecord) -> ClientStatement | None:
    """The client's part of a statement with the largest ε, adversary by adversary; None if there is none."""
    clients = [client for s in usable_statements(record)[0].values() for client in s.clients]

    def epsilons(client: ClientStatement) -> list[float]:
        # From the largest on: the first may be ∞ for all clients, towards a server that members help.
        return sorted((g.epsilon for g in client.guarantees if g.epsilon is not None), reverse=True)

    return max(clients, key=epsilons, default=None)


def _own(record: RunRecord, when: str) -> dict[str, float]:
    return {n: float(r[when]["self"]) for n, r in record.clients.items() if "self" in r.get(when, {})}


def _others(record: RunRecord, when: str, *, same: bool | None = None) -> dict[str, float]:
    """Mean over the other clients' texts; only those with the same task, or another, where that is given."""
    tasks = record.tasks
    found = {
        name: [
            value
            for other, value in result.get(when, {}).items()
            if other != "self" and same in (None, tasks.get(other) == tasks.get(name))
        ]
        for name, result in record.clients.items()
    }
    return {name: fmean(values) for name, values in found.items() if values}


def _mean(scores: Scores) -> str:
    return f"{100 * fmean(scores.values()):.0f} %" if scores else "unknown"


def command_line(*words: str) -> str:
    """A command of this package as it can be typed here: by name if that is on the path, else by its file."""
    script = Path(sys.executable).parent / "fedmosaic"
    found = shutil.which("fedmosaic")
    if not script.exists() or (found is not None and Path(found).resolve() == script.resolve()):
        return shlex.join(["fedmosaic", *words])
    relative = os.path.relpath(script)
    return shlex.join([relative if not relative.startswith("..") else str(script), *words])
