"""The statement that a client hands over: what it would say of a ledger whose private numbers are rounded.

δ = n^-1.1 where no bound of the terms is smaller, the sampling rate q = B/n and the noise σ that is planned
for them follow from the number n of a client's examples, and every figure of a statement follows from these
three. Rounding the figures one by one leaves many rounded figures of one unknown, which together tell it. So
the three are rounded first, along the same cells of n, and everything else is computed from the rounded ones:

    n in [L, H), L = 1.5^k, H = 1.5 L       δ → L^-1.1 (up)     q → B/L (up)     σ → planned for H (down)

Every direction is towards more loss, so the statement stays true, and it is the same for every n of a cell.
"""

import json
import math

from fedmosaic.privacy.configuration import FIRST_PREVIOUS_HASH
from fedmosaic.privacy.ledger.rows import LedgerRow, canonical_json, charges
from fedmosaic.privacy.ledger.rules import bound_of, parameters_of
from fedmosaic.privacy.statement import models
from fedmosaic.privacy.statement.build import statement
from fedmosaic.privacy.statement.models import ClientStatement, PrivacyStatement
from fedmosaic.privacy.statement.parts import noise_left, parameters_in
from fedmosaic.privacy.statement.rounding import round_down, round_up

CELL = 1.5
"""A handed-over statement tells n to within this factor, and no closer."""
_NOISE_STEP = 1.25
_DIGITS = 3
_NOTE = "from δ, q and σ as rounded for handing over"


def shareable(inputs: models.StatementInputs) -> PrivacyStatement:
    """The statement to hand over, made from the same facts as the client's own.

    Besides rounding, shares of clipped examples are left out, and an ε that the budget bounds is told as at
    most the budget: the rounded numbers alone would allow more.
    """
    clients = tuple(_rounded(client) for client in inputs.clients)
    rough = statement(inputs.model_copy(update={"clients": clients}))
    capped = tuple(map(_within_budget, rough.clients, inputs.clients))
    return rough.model_copy(update={"clients": capped, "shareable": True})


def cell(examples: float) -> tuple[float, float]:
    """The cell [L, H) of numbers of examples that one of them lies in, H = 1.5 L."""
    index = math.floor(math.log(examples) / math.log(CELL) + 1e-9)
    return CELL**index, CELL ** (index + 1)


def rounded_delta(delta: float, largest: float | None = None) -> float:
    """δ of the cell's lower end, at least `delta` = min(n^-1.1, largest); a bound of the terms stays."""
    if largest is not None and delta >= largest:
        return delta
    low, _ = cell(delta ** (-1 / 1.1))
    rounded = round_up(low**-1.1, _DIGITS) if low > 1.0 else delta
    return rounded if largest is None else min(rounded, largest)


def rounded_rate(rate: float, batch: int) -> float:
    """Sampling rate B/n of the cell's lower end, with the public batch size B; at least `rate`."""
    if rate == 1.0:
        return 1.0
    low, _ = cell(batch / rate)
    return min(1.0, round_up(batch / low, _DIGITS))


def rounded_noise(sigma: float, least: float | None) -> float:
    """The least σ that the terms give to a client of this cell, or a step of a coarse grid; at most σ."""
    if sigma == 0.0:
        return 0.0
    if least is not None and sigma >= least:
        return least
    return round_down(_NOISE_STEP ** math.floor(math.log(sigma) / math.log(_NOISE_STEP) + 1e-9), _DIGITS)


def _rounded(client: models.ClientInputs) -> models.ClientInputs:
    opened = json.loads(client.ledger[0].mechanism or "{}")
    opened["delta"] = rounded_delta(parameters_of(client.ledger).delta, client.largest_delta)
    batch = client.expected_batch_size or 1
    rows: list[LedgerRow] = []
    previous = FIRST_PREVIOUS_HASH
    for row in client.ledger:
        changes: dict[str, object] = {"previous_hash": previous}
        if row.kind == "OPENED":
            changes["mechanism"] = canonical_json(opened)
        elif row.channel != "profile" and row.sampling_rate is not None and row.noise_multiplier:
            # The profile's σ and q are terms of the roster, the same for clients of every size.
            changes["sampling_rate"] = rounded_rate(row.sampling_rate, _batch(row, batch))
            changes["noise_multiplier"] = rounded_noise(row.noise_multiplier, client.least_noise)
        changed = row.model_copy(update=changes)
        previous = changed.computed_hash()
        rows.append(changed.model_copy(update={"hash": previous}))
    planned = {
        name: channel.model_copy(update={"sampling_rate": rounded_rate(channel.sampling_rate, batch)})
        for name, channel in client.planned.items()
    }
    return client.model_copy(update={"ledger": tuple(rows), "clipped_share": {}, "planned": planned})


def _batch(row: LedgerRow, default: int) -> int:
    """The public batch size of a release, as its run's terms had it."""
    found = json.loads(row.mechanism or "{}").get("expected_batch_size", default)
    return found if isinstance(found, int) and found >= 1 else default


def _within_budget(found: ClientStatement, client: models.ClientInputs) -> ClientStatement:
    """What the ledger's filter has held is at most the budget, at its own δ and so at the larger one."""
    parameters = parameters_in(client)
    target = parameters.target_epsilon
    charged = charges(client.ledger, parameters.budgeted_channels)
    spent = bound_of(charged, parameters.delta, parameters.accountant).epsilon
    limit = target if target is not None and spent <= target else math.inf
    bounded: set[str] = set(parameters.budgeted_channels)
    if {row.channel for row in client.ledger if row.kind == "RESERVED" and row.noise_multiplier} <= bounded:
        bounded |= {"joint"}
    spent = min(found.spent_epsilon, limit)

    # The budget bounds what the ledger charged for: not what more members than the terms allow for learn.
    claimed = {
        each for each in models.ADVERSARIES if all(noise_left(row, each) >= 1.0 for row in client.ledger)
    }

    def limited(value: float, channel: str) -> float:
        # Test noise, or a release without any, is no matter of the budget.
        return min(value, limit) if channel in bounded and math.isfinite(value) else value

    channels = []
    for channel in found.channels:
        told = channel.accountants
        changes: dict[str, object] = {
            name: limited(getattr(channel, name), channel.channel) for name in ("epsilon", "nominal_epsilon")
        }
        changes["accountants"] = told and told.model_copy(update={"note": told.note or _NOTE})
        channels.append(channel.model_copy(update=changes))
    guarantees = [
        each.model_copy(update={"epsilon": limited(each.epsilon, each.channel)})
        if each.epsilon is not None and (each.adversary in claimed or each.channel == "profile")
        else each
        for each in found.guarantees
    ]
    remaining = None if target is None else max(0.0, target - spent)
    about = {"spent_epsilon": spent, "remaining_epsilon": remaining}
    return found.model_copy(update=about | {"channels": tuple(channels), "guarantees": tuple(guarantees)})
