"""The privacy statement for people: tables of rich.

A table per client has adversaries as rows and channels as columns, so that no ε ever stands alone.
Everything fits 100 columns.
"""

import math
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fedmosaic.privacy.statement.costs import round_up
from fedmosaic.privacy.statement.models import (
    ADVERSARIES,
    ChannelCost,
    ChannelStatement,
    ClientStatement,
    Guarantee,
    PrivacyStatement,
    Protection,
    StatementChannel,
)
from fedmosaic.privacy.statement.words import ADVERSARY_NAMES

WIDTH = 100
_ALARM = "bold white on red"
_SHORT_CHANNELS: dict[StatementChannel, str] = {
    "profile": "task profile",
    "adapter": "shared adapter",
    "family": "family's LoRA",
    "joint": "together",
}
_CLIPPED = (
    "A clipped example had a gradient longer than C and counts by its direction alone. A share near 100 % is "
    "intended at the default C, and ε does not depend on it."
)
_NAMES = {**ADVERSARY_NAMES, "colluding_recipients_with_server": "colluding recipients + server"}


def render(statement: PrivacyStatement) -> RenderableType:
    """The whole statement as one rich renderable."""
    parts: list[RenderableType] = [_headline(statement)]
    for client in statement.clients:
        parts.extend(_client(client))
    parts.append(_legend(statement.shareable))
    if statement.coalition_rows:
        parts.append(_coalitions(statement))
    parts.append(_bullets("This holds if", statement.assumptions))
    parts.append(_bullets("This is disclosed anyway", statement.leaks))
    return Group(*parts)


def render_costs(costs: Sequence[ChannelCost]) -> RenderableType:
    """What another ε would have cost, as a rich renderable."""
    table = Table(
        title="Noise for another ε, on the same schedule", box=box.SIMPLE_HEAD, title_justify="left"
    )
    for heading in ("client", "channel", "ε now", "ε asked for", "what it would have taken"):
        table.add_column(heading, overflow="fold")
    for cost in costs:
        table.add_row(
            cost.client_id,
            _SHORT_CHANNELS[cost.channel],
            _epsilon(cost.current_epsilon),
            f"{cost.target_epsilon:g} (δ {_delta(cost.delta)})",
            cost.words.split(": ", 1)[1],
        )
    return table


def _headline(statement: PrivacyStatement) -> RenderableType:
    lines = [Text(f"Privacy statement of run {statement.run_id}", style="bold")]
    if statement.created:
        lines[0].append(f", made {statement.created}", style="dim")
    alarms = []
    if statement.no_guarantee:
        alarms.append("NO GUARANTEE HOLDS: this is a test run, its noise came from a seeded generator.")
    bare = {c.channel for client in statement.clients for c in client.channels if c.protection == "none"}
    alarms += [
        f"IN THE CLEAR: the {name} is not protected from the server or the recipients: ε = ∞."
        for name in sorted(_SHORT_CHANNELS[channel] for channel in bare)
    ]
    lines += [Text(line, style=_ALARM) for line in alarms]
    if statement.encryption:
        lines.append(Text(f"Encryption: {statement.encryption}"))
    return Group(*lines)


def _grid(title: str, first: str) -> Table:
    # A Text, as brackets in a string are markup to rich: what a statement says is only ever shown.
    table = Table(title=Text(title, style="bold"), box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column(first, no_wrap=True)
    return table


def _client(client: ClientStatement) -> Iterable[RenderableType]:
    yield Text()
    yield client_grid(client)
    yield from _persons(client)
    yield _figures(client)
    for line in _notes(client):
        yield Padding(Text(line), (0, 0, 0, 2))
    for warning in client.warnings:
        yield Padding(Text(f"Warning: {warning}", style="bold yellow"), (0, 0, 0, 2))


def client_grid(client: ClientStatement) -> Table:
    """The ε of one client: adversaries as rows, channels as columns."""
    subject = f"one {client.unit}, {client.neighbouring_relation}"
    grid = _grid(f"Client {client.client_id}: ε at δ = {_delta(client.delta)}, for {subject}", "against")
    for channel in client.channels:
        grid.add_column(_SHORT_CHANNELS[channel.channel], overflow="fold")
    found = {(g.adversary, g.channel): g for g in client.guarantees}
    for adversary in ADVERSARIES:
        cells = (_cell(found[adversary, c.channel], c.protection) for c in client.channels)
        grid.add_row(_NAMES[adversary], *cells)
    return grid


def _persons(client: ClientStatement) -> Iterable[RenderableType]:
    found = [g for g in client.guarantees if g.channel == "joint" and g.persons]
    if not found:
        return
    table = _grid("ε of a person, by how many examples are that person's, all channels together", "against")
    for count in (1, *(figure.examples for figure in found[0].persons)):
        table.add_column("1 example" if count == 1 else f"{count} examples", justify="right")
    for guarantee in found:
        values = (guarantee.epsilon, *(figure.epsilon for figure in guarantee.persons))
        table.add_row(_NAMES[guarantee.adversary], *(_epsilon(value) for value in values))
    yield table


def _cell(guarantee: Guarantee, protection: Protection | None) -> Text:
    value = f"ε = {_epsilon(guarantee.epsilon)}"
    if guarantee.cover == "nothing":
        if guarantee.test_noise:
            return Text("no guarantee (test noise)", style=_ALARM)
        return Text(f"{value} IN THE CLEAR" if protection == "none" else f"{value}, no DP", style=_ALARM)
    if guarantee.cover == "nothing_sent":
        return Text("nothing sent", style="dim")
    if guarantee.cover == "cryptography_only":
        return Text("cryptography only" + (" (test noise)" if guarantee.test_noise else ""))
    if guarantee.cover == "dp_and_cryptography":
        return Text(f"{value}, encrypted too", style="green")
    if guarantee.cover == "mixed":
        return Text(f"{value}, rest encrypted")
    return Text(value, style="green")


def _figures(client: ClientStatement) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    headings = "read in clear|σ|q|steps|C|ε PRV|ε RDP|ε PLD|μ|adv.|TPR1%|TPR.1%".split("|")
    for heading in headings:
        # Folded rather than cut, so that no digit is lost on a narrow terminal.
        table.add_column(heading, justify="left" if heading == headings[0] else "right", overflow="fold")
    for channel in client.channels:
        table.add_row(_SHORT_CHANNELS[channel.channel], *_mechanism_cells(channel), *_figure_cells(channel))
    return table


def _mechanism_cells(channel: ChannelStatement) -> tuple[str, ...]:
    if channel.channel == "joint" or not channel.mechanisms:
        return ("", "", "", "")
    lines = channel.mechanisms
    return (
        "\n".join(f"{m.noise_multiplier:.3g}" for m in lines),
        "\n".join(f"{m.sampling_rate:.3g}" for m in lines),
        "\n".join(str(m.steps) for m in lines),
        "\n".join("" if m.clipping_norm is None else f"{m.clipping_norm:.3g}" for m in lines),
    )


def _figure_cells(channel: ChannelStatement) -> tuple[str | Text, ...]:
    figures, attack = channel.accountants, channel.attack
    values: tuple[str | Text, ...] = (Text("∞", style=_ALARM), "∞", "∞")
    if figures is not None:
        values = tuple(
            "-" if value is None else _epsilon(value) for value in (figures.prv, figures.rdp, figures.pld)
        )
        if channel.epsilon == math.inf:
            # Test noise: what it would have been.
            values = tuple(f"({value})" for value in values)
    rates = (
        attack.advantage,
        attack.true_positive_rate_at_1_percent,
        attack.true_positive_rate_at_0_1_percent,
    )
    return (*values, _epsilon(attack.gaussian_mu), *(f"{value:.3f}" for value in rates))


def _notes(client: ClientStatement) -> Iterable[str]:
    if client.target_epsilon is not None:
        over = " + ".join(client.budgeted_channels)
        nominal = " (nominal: test noise)" if client.test_noise else ""
        yield (
            f"Budget over {over}: ε = {_epsilon(client.spent_epsilon)} of {client.target_epsilon:g} "
            f"spent{nominal}; {client.refusals} release(s) refused."
        )
    if client.refusals:
        yield "After a refusal the client goes on in receive-only mode."
    for channel in client.channels[:-1]:
        name = _SHORT_CHANNELS[channel.channel]
        releases = sum(mechanism.releases for mechanism in channel.mechanisms)
        details = [f"{releases} release(s) charged", f"{channel.resends} sent again free of charge"]
        if channel.reservations_never_released:
            details.append(f"{channel.reservations_never_released} charged but never sent (a crash)")
        if channel.parallel_composition:
            details.append("disjoint data epochs composed in parallel")
        if channel.clipped_share is not None:
            details.append(f"{100 * channel.clipped_share:.0f} % of examples clipped (local figure)")
        yield f"{name}: {'; '.join(details)}."
    if any(channel.clipped_share is not None for channel in client.channels):
        yield _CLIPPED


def _legend(shareable: bool) -> RenderableType:
    rounded = (
        "Handed over: δ, q and σ are rounded towards more loss and every figure is computed from them; an ε "
        "within the budget is told as at most the budget. "
    )
    return Text(
        (rounded if shareable else "")
        + "σ noise over clipping norm C; q sampling rate; μ equivalent Gaussian; adv. and TPR: at most this "
        "TPR - FPR, and this true positive rate at 1 % and 0.1 % false positives, for any membership "
        "attacker who reads the channel in the clear. In brackets: what it would be without test noise.",
        style="dim",
    )


def _coalitions(statement: PrivacyStatement) -> RenderableType:
    lines = []
    for rows in statement.coalition_rows:
        line = (
            f"{rows.colluding_recipients} recipient(s) hold at most {rows.independent_rows} independent "
            f"combinations of {rows.contributors} adapters"
        )
        if rows.independent_rows >= rows.contributors:
            at_once = rows.colluding_recipients >= rows.contributors
            when = "with the rows of one round" if at_once else "if adapters hardly move between rounds"
            line += f": enough to solve for every one of them, {when}"
        lines.append(line)
    return _bullets("What coalitions of recipients can solve for", lines)


def _bullets(title: str, lines: Iterable[str]) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for line in lines:
        table.add_row("•", Text(line))
    return Panel(table, title=title, title_align="left", box=box.ROUNDED)


def _epsilon(value: float | None) -> str:
    if value is None:
        return "n/a"
    return "∞" if value == math.inf else f"{math.ceil(round(value * 1000, 6)) / 1000:.3f}"


def _delta(value: float) -> str:
    # Rounded up, which stays true, so that a printed statement does not tell the number of examples.
    return f"{round_up(value, 1):.0e}"
