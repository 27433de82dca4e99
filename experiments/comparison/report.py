"""`fedmosaic report PATH`: what a run did, what it is good for, and who learnt what."""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import tyro
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from fedmosaic.client.statement import HANDED_OVER
from fedmosaic.experiments.attacks import report as attack_report
from fedmosaic.experiments.comparison.figures import privacy_figure
from fedmosaic.experiments.comparison.record import (
    RunRecord,
    alone,
    read_kept,
    read_run,
    usable_statements,
)
from fedmosaic.experiments.comparison.registry import record as registry_record
from fedmosaic.experiments.comparison.runs import REFERENCE, compared_run, group_runs
from fedmosaic.experiments.comparison.statement_page import roster_signed, statement_page
from fedmosaic.experiments.comparison.tables import markdown
from fedmosaic.privacy.federation.identity import expires_soon
from fedmosaic.privacy.files import write_atomically
from fedmosaic.privacy.statement.check import check_received
from fedmosaic.privacy.statement.costs import ChannelCost, costs_at_epsilon
from fedmosaic.privacy.statement.models import PrivacyStatement
from fedmosaic.privacy.statement.render import WIDTH, render, render_costs
from fedmosaic.protos.errors import AccountingError, ConfigurationError

_CHANNELS = ("adapter", "profile", "keys", "control")


@dataclass(frozen=True)
class Arguments:
    """Read a run: accuracy per client, relevance, privacy statement, bytes sent.

    PATH is the directory of a run made by `fedmosaic run` or `fedmosaic demo`, a client's state directory,
    or the server's. With several runs, their methods are compared, with intervals over seeds.
    """

    path: tyro.conf.Positional[tuple[Path, ...]]
    """Where to read from."""
    html: Path | None = None
    """Write the privacy statement of a client's or server's state as one page, to be signed."""
    json: Path | None = None
    """Write a state's statement as a record of OpenDP's deployment registry."""
    organisation: str = ""
    """Who signs, for page and record."""
    purpose: str = ""
    """What the processing is for, likewise."""
    against: str = REFERENCE
    """The method that the others are compared with, seed by seed."""
    privacy_figure: Path | None = None
    """Write accuracy and relevance over ε, by protection, as an SVG figure; for runs of one scenario."""
    at_epsilon: float | None = None
    """Also say what noise every channel would have needed for this total ε."""


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic report` with its arguments."""
    parsed = tyro.cli(Arguments, args=list(arguments), prog="fedmosaic report")
    if not parsed.path:
        raise ConfigurationError("give the directory of a run, or of several")
    if len(parsed.path) > 1 or parsed.privacy_figure is not None:
        compare(parsed)
        return 0
    record = read_run(parsed.path[0])
    if parsed.html is not None or parsed.json is not None:
        write_statement(parsed, record)
        return 0
    # Without a terminal there is no width to respect, and the tables need WIDTH columns.
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    show(record, console)
    merged = merged_statement(record)
    if parsed.at_epsilon is not None and merged is not None:
        console.print(render_costs(_costs(merged, parsed.at_epsilon, console), parsed.at_epsilon))
    return 0


def write_statement(arguments: Arguments, record: RunRecord) -> None:
    """Write a statement as a page, a registry's record, or both; `ConfigurationError` if there is none."""
    merged = merged_statement(record)
    if merged is None:
        raise ConfigurationError(
            f"{record.directory} holds no usable privacy statement; a client writes it after the last round"
        )
    signer = {"organisation": arguments.organisation, "purpose": arguments.purpose}
    if arguments.html is not None:
        attacked = attack_report.read(record.directory / "attacks")
        text = statement_page(merged, record.directory, record.clients, attacked, **signer)
        write_atomically(arguments.html, text.encode())
        print(f"the page is {arguments.html}")
    if arguments.json is not None:
        handed = record.directory / HANDED_OVER
        told = check_received(read_kept(handed), next(iter(record.clients))) if handed.exists() else merged
        if not told.shareable:
            raise ConfigurationError(
                f"{record.directory} holds no statement that may be handed over ({HANDED_OVER}); a "
                "registry is public, and a client's own statement tells its number of examples"
            )
        entry = json.dumps(registry_record(told, **signer), indent=2, ensure_ascii=False)
        write_atomically(arguments.json, f"{entry}\n".encode())
        print(f"the record is {arguments.json}")


def _costs(statement: PrivacyStatement, target: float, console: Console) -> list[ChannelCost]:
    """Costs for every client whose figures allow them; the others are named."""
    costs: list[ChannelCost] = []
    for client in statement.clients:
        try:
            costs += costs_at_epsilon(client, target)
        except AccountingError as error:
            console.print(Text(f"No costs for {client.client_id}: {error}", style="bold yellow"))
            failed = error
    if not costs:
        raise failed
    return costs


def compare(arguments: Arguments) -> None:
    """Print the comparison of several runs, and draw their privacy figure where one is asked for."""
    if arguments.at_epsilon is not None or arguments.html is not None:
        raise ConfigurationError("--at-epsilon and --html are for one run or state; give one")
    groups = group_runs([compared_run(path) for path in arguments.path])
    methods = sorted({group.method for group in groups})
    if arguments.against not in (REFERENCE, *methods):
        raise ConfigurationError(f"there is no run of {arguments.against!r}; there are {', '.join(methods)}")
    print(markdown(groups, arguments.against))
    if arguments.privacy_figure is not None:
        arguments.privacy_figure.write_text(privacy_figure(groups), encoding="utf-8")
        print(f"the figure is {arguments.privacy_figure}")


def show(record: RunRecord, console: Console) -> None:
    """Print the tables of a run."""

    def put(table: RenderableType, words: str) -> None:
        console.print(table)
        console.print(f"{words}\n", style="dim")

    def warn(lines: Iterable[str], style: str = "") -> None:
        for line in lines:
            console.print(Text(f"{line}\n", style=style))

    results = record.clients.values()
    if any("after" in result for result in results):
        put(
            accuracy_table(record),
            "Self: accuracy on the client's own test sets; majority: always the most frequent answer there; "
            "alone: a model trained without the others. Others: mean over the others' test sets.",
        )
    found = {name: result["comparison"] for name, result in record.clients.items() if "comparison" in result}
    warn(f"{name}: {comparison['verdict']}" for name, comparison in found.items())
    warn(alone(record), "bold red")
    warn(expiring(record), "bold yellow")
    if record.server.get("results"):
        words = "Similarity of the noisy task profiles, corrected for the known noise; +1 is the same task."
        put(relevance_table(record.server), words)
        put(weights_table(record.server), "How much of each column's adapter the row's client received.")
    merged = merged_statement(record)
    if merged is not None:
        console.print(render(merged))
        signed, words = roster_signed(merged, record.directory)
        warn([f"The roster's signature: {words}."], "" if signed else "bold yellow")
    left_out = usable_statements(record)[1].items()
    warn((f"The privacy statement of {n} is left out: {why}." for n, why in left_out), "bold yellow")
    attacked = attack_report.read(record.directory / "attacks")
    if attacked is not None:
        console.print(attack_report.render(attacked))
    if any("traffic" in result for result in results):
        put(traffic_table(record), "Bytes of messages, without what HTTP/2 and TLS add.")
    if any("training_flops" in result for result in results):
        words = "Operations of the clients' own training steps, measured; scoring, profiles and what a server"
        put(cost_table(record), f"{words} distils are not among them.")


def expiring(record: RunRecord) -> list[str]:
    """Whose certificate is in its last days, one line each; once a run is over, an expired one is no news."""
    lines = []
    for name, found in {**record.clients, "the server": record.server}.items():
        over = "after" in found or found.get("phase") == "finished"
        with suppress(TypeError, ValueError):
            expiry = datetime.fromisoformat(found.get("certificate_expires"))  # type: ignore[arg-type]  # or None
            if (words := expires_soon(expiry)) and not (over and expiry < datetime.now(UTC)):
                lines.append(f"{name}: {words}.")
    return lines


def merged_statement(record: RunRecord) -> PrivacyStatement | None:
    """One statement over all clients whose own is here and usable; None if there is none."""
    statements = list(usable_statements(record)[0].values())
    if not statements:
        return None
    # Of what coalitions can solve for, the worst that any of them saw.
    worst = min(statements, key=lambda s: s.coalition_rows[0].contributors if s.coalition_rows else 0)
    return worst.model_copy(
        update={
            "clients": tuple(client for s in statements for client in s.clients),
            "no_guarantee": any(s.no_guarantee for s in statements),
        }
    )


def _table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> Table:
    """A table whose columns after the first `words` hold numbers."""
    table = Table(title=title)
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number < words else "right", no_wrap=number >= words)
    for row in rows:
        table.add_row(*row)
    return table


def accuracy_table(record: RunRecord) -> Table:
    """Accuracy before and after, on the own task and on the others'."""
    shown, complete = [], []
    for name, result in record.clients.items():
        if "before" not in result or "after" not in result:
            continue
        own = tuple(result[when].get("self") for when in ("before", "after"))
        others = tuple(_others(result[when]) for when in ("before", "after"))
        compared = result.get("comparison", {})
        most = record.majority.get(name, compared.get("commonest") or math.nan)
        single = compared.get("scores", {}).get("alone", math.nan)
        scores = _score(most), _score(single), *_change(*own), *_change(*others)
        shown.append((name, record.tasks.get(name, "-"), *scores))
        if None not in (*own, *others):
            complete.append((*own, *others))
    heads = ("client", "task", "majority", "alone", "Self", "gain", "Others", "gain")
    table = _table("Accuracy before → after", heads, shown, 2)
    measures = {m for result in record.clients.values() for m in result.get("measures", {}).values()}
    if measures:
        table.caption = f"what counts as right: {'; '.join(sorted(measures))}"
    if complete:
        means = [fmean(column) for column in zip(*complete, strict=True)]
        table.add_section()
        most = fmean(record.majority.values()) if record.majority else math.nan
        table.add_row("mean", "", _score(most), "", *_change(*means[:2]), *_change(*means[2:]))
    return table


def _score(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _others(scores: Mapping[str, float]) -> float | None:
    values = [score for name, score in scores.items() if name != "self"]
    return fmean(values) if values else None


def _change(before: float | None, after: float | None) -> tuple[str, str]:
    if before is None or after is None:
        return "-", "-"
    return f"{before:.2f} → {after:.2f}", f"{after - before:+.2f}"


def relevance_table(server: Mapping[str, Any]) -> Table:
    """Similarity of the task profiles in the last closed round."""
    last = server["results"][-1]
    rows = (
        (name, *("-" if value is None else f"{value:+.2f}" for value in row))
        for name, row in zip(last["clients"], last["similarity"], strict=True)
    )
    return _table(f"Relevance matrix, round {last['round']}", ("", *last["clients"]), rows)


def weights_table(server: Mapping[str, Any]) -> Table:
    """Share of every contributor in every recipient's aggregate of the last closed round."""
    last = server["results"][-1]
    clients, weights = last["clients"], last["weights"].get("shared", {})

    def shares(recipient: str) -> Sequence[str]:
        if recipient not in weights:
            return [last["refusals"].get("shared", {}).get(recipient, "none")]
        row = weights[recipient]
        return [f"{row[c]:.2f}" if c in row else "-" for c in clients]

    rows = ((recipient, *shares(recipient)) for recipient in clients)
    return _table(f"Shares of the aggregates, round {last['round']}", ("recipient", *clients), rows)


def traffic_table(record: RunRecord) -> Table:
    """Bytes each client sent, by what they were for, and received."""
    heads = ("client", "adapter", "profile", "group key", "control", "all sent", "received")
    rows = []
    for name, result in record.clients.items():
        if channels := result.get("traffic"):
            sent = [channels[c]["sent"] for c in _CHANNELS]
            received = sum(channels[c]["received"] for c in _CHANNELS)
            rows.append((name, *(f"{count:,}" for count in (*sent, sum(sent), received))))
    return _table("Bytes each client sent and received", heads, rows)


def cost_table(record: RunRecord) -> Table:
    """Steps, floating point operations and seconds of every client."""
    rows = (
        (name, f"{r['training_steps']:,}", f"{r['training_flops'] / 1e12:,.4g}", f"{r['seconds']:.0f}")
        for name, r in record.clients.items()
        if "training_flops" in r
    )
    return _table("What training cost", ("client", "steps", "TFLOP", "seconds from start to end"), rows)
