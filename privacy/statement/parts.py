"""What left a client, by channel, protection and run: the ledger beside the terms of this run.

A ledger outlives runs, and each has terms of its own.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedmosaic.privacy.accounting.leverage import effective_noise_multiplier
from fedmosaic.privacy.ledger.rows import Channel, Charge, LedgerRow, charges
from fedmosaic.privacy.ledger.rules import LedgerParameters, parameters_of
from fedmosaic.privacy.statement import models
from fedmosaic.privacy.statement.models import Adversary
from fedmosaic.privacy.statement.words import CHANNEL_NAMES

Run = Literal["this", "others", "any"]
"""Whose a release is, as of `models.Protected`."""
_BEYOND_THE_CLAIM: frozenset[Adversary] = frozenset(
    {"colluding_recipients", "colluding_recipients_with_server"}
)
"""Adversaries of any number of members: against them only a member's own noise is left in a sum."""


@dataclass(frozen=True, slots=True)
class Part:
    """The reservations of one channel under one protection, of this run or of others."""

    channel: Channel
    protection: models.Protection
    run: Run
    rows: tuple[LedgerRow, ...]

    @property
    def test_noise(self) -> bool:
        """Whether some of its noise came from a seeded generator."""
        return any(row.secure_noise is False for row in self.rows)

    @property
    def whose(self) -> str:
        """How many releases of other runs these are, in words."""
        count = len(self.rows)
        return f"{count} release{'s' if count > 1 else ''} of other runs on the same data"


@dataclass(frozen=True, slots=True)
class ChannelParts:
    """One channel of one client, as the ledger and the configuration tell it."""

    name: Channel
    rows: tuple[LedgerRow, ...]
    parts: tuple[Part, ...]


def channels_of(inputs: models.ClientInputs, run_id: str) -> tuple[tuple[ChannelParts, ...], list[str]]:
    """The channels of a client, and what about them is other than the terms of this run have it."""
    configured: dict[Channel, models.Protection | None] = {
        "profile": "dp",
        "adapter": inputs.adapter_protection,
        "family": inputs.family_protection,
    }
    found: list[ChannelParts] = []
    warnings: list[str] = []
    for name, mode in configured.items():
        rows = tuple(row for row in inputs.ledger if row.channel == name)
        parts = _parts(name, mode, [row for row in rows if row.kind == "RESERVED"], run_id)
        if parts:
            found.append(ChannelParts(name, rows, parts))
            warnings += _contradictions(name, mode, parts)
    return tuple(found), warnings


def _parts(
    channel: Channel, configured: models.Protection | None, reserved: Sequence[LedgerRow], run_id: str
) -> tuple[Part, ...]:
    """The reservations by whose they are and what protected them; this run's terms count unused, too."""
    groups: dict[tuple[Run, models.Protection], list[LedgerRow]] = {}
    if configured is not None:
        groups["any" if channel == "profile" else "this", configured] = []
    for row in reserved:
        own: Run = "this" if row.context == run_id else "others"
        groups.setdefault(("any" if channel == "profile" else own, _protection(row)), []).append(row)
    ordered = sorted(groups.items(), key=lambda group: group[0][0] == "others")
    return tuple(Part(channel, mode, run, tuple(rows)) for (run, mode), rows in ordered)


def _protection(row: LedgerRow) -> models.Protection:
    """What protected one release, by its reservation; not encrypted where that does not stand there."""
    if row.covered_by != "dp":
        return "encrypted" if row.covered_by == "cryptography" else "none"
    told = json.loads(row.mechanism or "{}")
    if row.channel == "adapter" and "minimum_contributors" in told:
        return "distributed-dp"
    return "dp+encrypted" if told.get("protection") == "dp+encrypted" else "dp"


def _contradictions(
    channel: Channel, configured: models.Protection | None, parts: Sequence[Part]
) -> Iterator[str]:
    name = CHANNEL_NAMES[channel]
    for part in parts:
        if part.run == "others" and part.protection != configured:
            yield (
                f"{name}: {part.whose} had the protection {part.protection!r}. What is said here is of "
                "the least protected release, and every ε of all together"
            )
        elif part.protection != configured:
            yield (
                f"{name}: configured as {configured or 'not sent'!r}, but the ledger shows releases of this "
                f"run that were protected by {part.protection!r}; the weaker is reported"
            )


def noise_left(row: LedgerRow, adversary: Adversary) -> float:
    """Noise of one release against an adversary, over that of the row; other than 1 in sums of groups alone.

    The row holds σ = s·√(m − t), against the server with t members (`privacy.accounting.leverage`). Every
    release has the m and t of its own run's terms: a ledger outlives runs.
    """
    group = json.loads(row.mechanism or "{}") if row.channel == "adapter" else {}
    if adversary not in _BEYOND_THE_CLAIM or "minimum_contributors" not in group:
        # Against fewer than the claim is made for, a little more is left; the claim's ε bounds that too.
        return 1.0
    least, colluders = int(group["minimum_contributors"]), int(group["colluders"])
    return 1.0 / effective_noise_multiplier(1.0, least, colluders)


def charged_to(rows: Iterable[LedgerRow], adversary: Adversary = "server_malicious") -> list[Charge]:
    """What was charged, with the noise that is left against an adversary."""
    found = []
    for row in rows:
        for charge in charges([row]):
            sigma = charge.event.noise_multiplier * noise_left(row, adversary)
            found.append(replace(charge, event=replace(charge.event, noise_multiplier=sigma)))
    return found


def parameters_in(inputs: models.ClientInputs) -> LedgerParameters:
    """Name and budget of this run, else those that the ledger was opened with, whose δ it keeps."""
    opened = parameters_of(inputs.ledger)
    return replace(
        opened,
        client_id=inputs.client_id or opened.client_id,
        target_epsilon=inputs.target_epsilon or opened.target_epsilon,
        budgeted_channels=inputs.budgeted_channels or opened.budgeted_channels,
    )
