"""The rules of the ledger as pure functions: parameters, what may be asked, what it comes to."""

import hashlib
import hmac
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fedmosaic.privacy.accounting import EpsilonBound, epsilon, epsilon_bound
from fedmosaic.privacy.events import GaussianEvent
from fedmosaic.privacy.ledger_rows import (
    CHANNELS,
    Channel,
    Charge,
    Kind,
    LedgerRow,
    Unit,
    canonical_json,
    check_seen,
    compositions,
)
from fedmosaic.protos.errors import LedgerError

_LONGEST_MECHANISM = 64 * 1024


@dataclass(frozen=True, slots=True)
class LedgerParameters:
    """What was fixed when the ledger was opened for the first time.

    Attributes:
        client_id: whose releases these are.
        delta: δ of every ε in the ledger.
        target_epsilon: the budget; None records without refusing.
        accountant: "prv", "rdp" or "pld".
        budgeted_channels: the channels whose joint ε the budget bounds.
        unit: unit of privacy.
    """

    client_id: str
    delta: float
    target_epsilon: float | None
    accountant: str = "prv"
    budgeted_channels: tuple[Channel, ...] = CHANNELS
    unit: Unit = "example"

    def __post_init__(self) -> None:
        epsilon((), self.delta, self.accountant)
        if self.target_epsilon is not None and not 0.0 < self.target_epsilon < math.inf:
            raise LedgerError(
                f"target ε is {self.target_epsilon}; give a positive number, or None for no budget"
            )
        if not self.client_id or not set(self.budgeted_channels) <= set(CHANNELS):
            raise LedgerError(f"client_id must not be empty and channels must be among {', '.join(CHANNELS)}")
        object.__setattr__(self, "budgeted_channels", tuple(sorted(set(self.budgeted_channels))))

    def canonical(self, salt: str) -> str:
        """Canonical JSON for the opening row; the salt keeps the rows' hashes from being guessed."""
        return canonical_json(
            {
                "client_id": self.client_id,
                "delta": self.delta,
                "target_epsilon": self.target_epsilon,
                "accountant": self.accountant,
                "budgeted_channels": self.budgeted_channels,
                "unit": self.unit,
                "salt": salt,
            }
        )


def parameters_of(rows: Sequence[LedgerRow]) -> LedgerParameters:
    """The parameters that a ledger was opened with.

    Args:
        rows: the whole ledger.

    Raises:
        LedgerError: the opening row is missing or holds something else.
    """
    try:
        if rows[0].kind != "OPENED":
            raise KeyError("kind")
        values = json.loads(rows[0].mechanism or "")
        del values["salt"]
        return LedgerParameters(**{**values, "budgeted_channels": tuple(values["budgeted_channels"])})
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise LedgerError(
            f"the ledger's opening row is missing or unreadable ({error!r}); restore it"
        ) from None


@dataclass(frozen=True, slots=True)
class Anchor:
    """A ledger's last row, as somebody else may keep it: its sequence, and its hash under a secret key."""

    sequence: int
    hash: str


def anchor_at(rows: Sequence[LedgerRow], sequence: int) -> Anchor:
    """Anchor of one row: HMAC-SHA-256 of its hash under the ledger's salt.

    A bare row hash would let its keeper test guesses of the row (its data epoch, its digest) against the
    hash of the row before.

    Args:
        rows: the whole ledger.
        sequence: which row.
    """
    salt = bytes.fromhex(json.loads(rows[0].mechanism or "{}")["salt"])
    return Anchor(sequence, hmac.new(salt, rows[sequence].hash.encode(), hashlib.sha256).hexdigest())


def check_anchor(rows: Sequence[LedgerRow], anchor: Anchor) -> None:
    """Check that a ledger still holds the row that somebody else has seen.

    Raises:
        LedgerError: the row is missing or is another one.
    """
    held = 0 <= anchor.sequence < len(rows) and anchor_at(rows, anchor.sequence) == anchor
    check_seen(rows, anchor.sequence, rows[anchor.sequence].hash if held else "", "the keeper of the anchor")


def check_parameters(wanted: LedgerParameters, rows: Sequence[LedgerRow]) -> None:
    """Refuse to go on under looser or other parameters than the ledger was opened with.

    A smaller budget, or one for more channels, is stricter and allowed.

    Raises:
        LedgerError: names every parameter that differs.
    """
    opened = parameters_of(rows)
    differing = [
        f"{name} was {getattr(opened, name)!r} and is now {getattr(wanted, name)!r}"
        for name in LedgerParameters.__dataclass_fields__
        if getattr(opened, name) != getattr(wanted, name) and not _stricter(name, opened, wanted)
    ]
    if differing:
        raise LedgerError(
            f"the ledger was opened with other parameters: {'; '.join(differing)}. A budget bounds "
            "something only while it is fixed: go on with the first parameters. A fresh ledger would forget "
            "what this one has spent; it is right for another client, or for data that share no example"
        )


def _stricter(name: str, opened: LedgerParameters, wanted: LedgerParameters) -> bool:
    if name == "budgeted_channels":
        return set(wanted.budgeted_channels) > set(opened.budgeted_channels)
    if name == "target_epsilon" and wanted.target_epsilon is not None:
        return opened.target_epsilon is None or wanted.target_epsilon < opened.target_epsilon
    return False


def check_request(fields: dict[str, Any], event: GaussianEvent) -> None:
    """Refuse a reservation whose arguments contradict each other.

    Args:
        fields: of the row to be.
        event: its event.

    Raises:
        LedgerError: says which rule is broken.
    """
    channel, covered_by = fields["channel"], fields["covered_by"]
    if channel not in CHANNELS:
        raise LedgerError(f"channel is {channel!r}; it must be one of {', '.join(CHANNELS)}")
    if event.steps < 1:
        raise LedgerError("an event without steps releases nothing; reserve only what is to be released")
    if covered_by == "dp" and event.noise_multiplier == 0:
        raise LedgerError(
            f"this {channel} release has no noise (σ = 0), so differential privacy does not cover it; "
            "say covered_by='cryptography' or 'nothing', and its ε is ∞"
        )
    if covered_by != "dp" and event.noise_multiplier > 0:
        raise LedgerError(
            f"this {channel} release has noise (σ = {event.noise_multiplier}) but covered_by is "
            f"{covered_by!r}; say 'dp', or reserve UNPROTECTED"
        )
    if covered_by == "dp" and (fields["clipping_norm"] is None or fields["dimensions"] is None):
        raise LedgerError("a differentially private release needs its clipping_norm and dimensions recorded")
    if channel == "profile" and covered_by != "dp" and fields["secure_noise"]:
        raise LedgerError(
            "a task profile leaves the client with differential privacy only; give its mechanism σ > 0 "
            "(a run marked as a test may go without)"
        )
    if len(fields["mechanism"]) > _LONGEST_MECHANISM:
        raise LedgerError(
            f"the mechanism's description has {len(fields['mechanism'])} characters; describe it in at most "
            f"{_LONGEST_MECHANISM}, and name large public data by their hash"
        )


def matching(
    rows: Iterable[LedgerRow],
    kind: Kind,
    channel: str | None,
    round: int | None,
    data_epoch: str | None,
    context: str | None,
) -> list[LedgerRow]:
    """Rows of one kind that are about one release.

    A profile is released once per data epoch and mechanism, whatever the round and the run; any other release
    once per run, round and epoch.
    """
    return [
        row
        for row in rows
        if row.kind == kind
        and row.channel == channel
        and row.data_epoch == data_epoch
        and row.context == context
        and (channel == "profile" or row.round == round)
    ]


def bound_of(charged: Iterable[Charge], delta: float, accountant: str) -> EpsilonBound:
    """ε of what was charged: the largest over what one example can have gone through.

    Args:
        charged: of one ledger, or some of its channels.
        delta: δ.
        accountant: the one wanted; RDP, named as such, where it fails.
    """
    bounds = [epsilon_bound(events, delta, accountant) for events in compositions(charged)]
    return max(bounds, key=lambda bound: bound.epsilon)


def exceeds(value: float, target: float | None) -> bool:
    """Whether an ε passes a budget; nothing passes no budget."""
    return target is not None and not value <= target


def advice(event: GaussianEvent) -> str:
    """What to do when the budget refuses a release."""
    if event.is_private:
        return "Go on in receive-only mode"
    return (
        "A channel without differential privacy fits no budget: leave it out of budgeted_channels by name, "
        "or protect it with dp"
    )


def reservation_at(rows: Sequence[LedgerRow], sequence: int) -> LedgerRow:
    """The RESERVED row of this sequence.

    Raises:
        LedgerError: there is none.
    """
    if 0 <= sequence < len(rows) and rows[sequence].kind == "RESERVED":
        return rows[sequence]
    raise LedgerError(f"row {sequence} is no reservation; give what reserve() returned")
