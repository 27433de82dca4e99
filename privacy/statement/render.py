"""The privacy statement on a terminal, in 100 columns: the verdict in words, then tables of rich.

A table per client has adversaries as rows and channels as columns, so that no ε ever stands alone.
"""

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fedmosaic.privacy.statement import models, plain
from fedmosaic.privacy.statement.costs import ChannelCost
from fedmosaic.privacy.statement.models import ClientStatement, Guarantee, PrivacyStatement
from fedmosaic.privacy.statement.plain import delta_text, epsilon_text, joint
from fedmosaic.privacy.statement.words import ADVERSARY_NAMES

WIDTH = 100
_ALARM = "bold white on red"
_SHORT_CHANNELS: dict[models.StatementChannel, str] = {
    "profile": "task profile",
    "adapter": "shared adapter",
    "family": "family's LoRA",
    "joint": "together",
}
_NAMES = {**ADVERSARY_NAMES, "colluding_recipients_with_server": "colluding recipients + server"}


def render(statement: PrivacyStatement) -> RenderableType:
    """The whole statement as one rich renderable."""
    parts: list[RenderableType] = [_headline(statement)]
    for client in statement.clients:
        parts.extend(_client(client))
    parts.append(_legend(statement))
    if statement.coalition_rows:
        parts.append(
            _bullets("What recipients can do together", plain.coalition_words(statement.coalition_rows))
        )
    parts.append(_bullets("This holds if", statement.assumptions))
    parts.append(_bullets("This is disclosed anyway", statement.leaks))
    return Group(*parts)


def render_costs(costs: Sequence[ChannelCost], target: float) -> RenderableType:
    """What another ε would have cost, as a rich renderable."""
    table = Table(
        title="Noise for another ε, on the same schedule", box=box.SIMPLE_HEAD, title_justify="left"
    )
    for heading in ("client", "channel", "ε now", "ε asked for", "what it would have taken"):
        table.add_column(heading, overflow="fold")
    for cost in costs:
        table.add_row(
            cost.client.client_id,
            _SHORT_CHANNELS[cost.channel.channel],
            epsilon_text(cost.channel.epsilon),
            f"{target:g} (δ {delta_text(cost.client.delta)})",
            cost.words,
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
    table.add_column(first, min_width=14)
    return table


def _client(client: ClientStatement) -> Iterable[RenderableType]:
    yield Text()
    alarmed = client.test_noise or any(each.cover == "nothing" for each in joint(client).values())
    yield Text(f"{client.client_id}: {plain.trust(client)}", style=_ALARM if alarmed else "bold")
    for line in plain.verdict(client):
        yield Padding(Text(line), (0, 0, 0, 2))
    yield Text()
    yield client_grid(client)
    yield from _persons(client)
    for line in _notes(client):
        yield Padding(Text(line), (0, 0, 0, 2))
    for warning in client.warnings:
        yield Padding(Text(f"Warning: {warning}", style="bold yellow"), (0, 0, 0, 2))


def client_grid(client: ClientStatement) -> Table:
    """The ε of one client: adversaries as rows, channels as columns."""
    title = f"Client {client.client_id}: ε at δ = {delta_text(client.delta)}, for {plain.unit_words(client)}"
    grid = _grid(title, "against")
    for channel in client.channels:
        grid.add_column(_SHORT_CHANNELS[channel.channel], overflow="fold", max_width=18, min_width=12)
    found = {(g.adversary, g.channel): g for g in client.guarantees}
    for adversary in models.ADVERSARIES:
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
        table.add_row(_NAMES[guarantee.adversary], *(epsilon_text(value) for value in values))
    yield table


def _cell(guarantee: Guarantee, protection: models.Protection | None) -> Text:
    value = f"ε = {epsilon_text(guarantee.epsilon)}"
    match guarantee.cover:
        case "nothing" if guarantee.test_noise:
            return Text("no guarantee (test noise)", style=_ALARM)
        case "nothing":
            return Text(f"{value} IN THE CLEAR" if protection == "none" else f"{value}, no DP", style=_ALARM)
        case "nothing_sent":
            return Text("nothing sent", style="dim")
        case "cryptography_only":
            return Text("cryptography only" + (" (test noise)" if guarantee.test_noise else ""))
        case "mixed":
            return Text(f"{value}, rest encrypted")
    encrypted = ", encrypted too" if guarantee.cover == "dp_and_cryptography" else ""
    return Text(value + encrypted, style="green")


def _notes(client: ClientStatement) -> Iterable[str]:
    if client.target_epsilon is not None:
        over = " + ".join(client.budgeted_channels)
        nominal = " (nominal: test noise)" if client.test_noise else ""
        yield (
            f"Budget over {over}: ε = {epsilon_text(client.spent_epsilon)} of {client.target_epsilon:g} "
            f"spent{nominal}; {client.refusals} release(s) refused."
        )
    if client.refusals:
        yield "What was refused did not leave; the client goes on receiving."
    for channel in client.channels[:-1]:
        name = _SHORT_CHANNELS[channel.channel]
        releases = sum(mechanism.releases for mechanism in channel.mechanisms)
        details = [f"{releases} release(s) charged", f"{channel.resends} sent again free of charge"]
        if channel.reservations_never_released:
            details.append(f"{channel.reservations_never_released} charged but never sent (a crash)")
        if channel.parallel_composition:
            details.append("disjoint data epochs composed in parallel")
        if channel.protected:
            details.append(plain.protected_words(channel))
        yield f"{name}: {'; '.join(details)}."


def _legend(statement: PrivacyStatement) -> RenderableType:
    capped = " An ε within the budget is told as at most the budget." if statement.shareable else ""
    delta = max(client.delta for client in statement.clients)
    return Text(
        f"{plain.ROUNDING}{capped}\n{plain.delta_words(delta)}\n"
        "What ε means: docs/privacy.md, “Epsilon in practice”. Accountants, mechanisms, keys and a page to "
        "sign: fedmosaic report STATE --html statement.html",
        style="dim",
    )


def _bullets(title: str, lines: Iterable[str]) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for line in lines:
        table.add_row("•", Text(line))
    return Panel(table, title=title, title_align="left", box=box.ROUNDED)
