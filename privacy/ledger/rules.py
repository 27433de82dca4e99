"""The rules of the ledger as pure functions: parameters, what may be asked, what it comes to."""

import hmac
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, NamedTuple

from fedmosaic.privacy.accounting.epsilon import EpsilonBound, epsilon, epsilon_bound
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.ledger.rows import (
    CHANNELS,
    Channel,
    Charge,
    Kind,
    LedgerRow,
    Unit,
    canonical_json,
    compositions,
)
from fedmosaic.protos.errors import LedgerError

_LONGEST_MECHANISM = 64 * 1024
_ANCHOR_LABEL = b"fedmosaic/ledger-anchor/v1"


@dataclass(frozen=True, slots=True)
class LedgerParameters:
    """What was fixed when the ledger was opened first: δ, and the budget for the joint ε of channels.

    The same data may be released by a member of another federation under another name, and are charged to the
    same ledger; so the client's id may change.
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
            raise LedgerError(f"target ε is {self.target_epsilon}; give a positive number, or None")
        if not self.client_id or not set(self.budgeted_channels) <= set(CHANNELS):
            raise LedgerError(f"client_id must not be empty and channels must be among {', '.join(CHANNELS)}")
        object.__setattr__(self, "budgeted_channels", tuple(sorted(set(self.budgeted_channels))))

    def canonical(self, salt: str) -> str:
        """Canonical JSON for the opening row; the salt keeps the rows' hashes from being guessed."""
        return canonical_json(asdict(self) | {"salt": salt})


def parameters_of(rows: Sequence[LedgerRow]) -> LedgerParameters:
    """The parameters that a ledger was opened with; LedgerError if its opening row cannot be read."""
    try:
        if rows[0].kind != "OPENED":
            raise KeyError("kind")
        values = json.loads(rows[0].mechanism or "")
        del values["salt"]
        return LedgerParameters(**{**values, "budgeted_channels": tuple(values["budgeted_channels"])})
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise LedgerError(f"the ledger's opening row is missing or damaged ({error!r}); restore it") from None


def anchor_of(rows: Sequence[LedgerRow], keeper: str) -> bytes:
    """What a keeper may have of a ledger: HMAC-SHA-256 of its last row's hash under its salt, 32 bytes.

    Of the last row but those that end a ledger which is moved: where it goes on, the very last is not.
    It tells its keeper nothing but whether anything was recorded since, not the number of rows either.
    Keepers who compare theirs cannot tell that they are of one ledger, since each has its own.
    """
    last = next(row for row in reversed(rows) if row.kind not in ("CLOSED", "MOVED"))
    return _anchor(_salt(rows), last.hash, keeper)


def keeper(federation: str, client: str) -> str:
    """For whom a member's anchors are: its own side and the server of one federation."""
    return f"{federation}/{client}"


def check_anchor(rows: Sequence[LedgerRow], keeper: str, anchor: bytes, source: str) -> None:
    """Check that a ledger holds the row of an anchor that `source` kept; LedgerError if it is behind."""
    salt = _salt(rows)
    own = ((salt, row.hash) for row in reversed(rows))
    carried = (
        (bytes.fromhex(told["salt"]), digest)
        for told in (json.loads(row.mechanism or "{}") for row in rows if row.kind == "RESUMED")
        for digest in told.get("carried", ())
    )
    if any(hmac.compare_digest(_anchor(*each, keeper), anchor) for each in chain(own, carried)):
        return
    raise LedgerError(
        f"LEDGER_BEHIND: this privacy ledger does not hold the row that {source} has seen last: it is an "
        "older copy, or the ledger of other data, and what it does not know of is still spent. Go on with "
        "the newest ledger of these data: name its directory in data.ledger, or put the newest backup back "
        "with `fedmosaic ledger move BACKUP PLACE`. Other data in the same run are charged to its ledger"
    )


def _salt(rows: Sequence[LedgerRow]) -> bytes:
    return bytes.fromhex(json.loads(rows[0].mechanism or "{}")["salt"])


def _anchor(salt: bytes, digest: str, keeper: str) -> bytes:
    # A bare row hash would let its keeper test guesses of the row (its data epoch) against the row before.
    return hmac.digest(salt, b"\x00".join((_ANCHOR_LABEL, keeper.encode(), digest.encode())), "sha256")


def check_parameters(wanted: LedgerParameters, rows: Sequence[LedgerRow]) -> None:
    """Refuse looser or other parameters than the ledger was opened with; stricter ones are allowed."""
    opened = parameters_of(rows)
    before, now = asdict(opened), asdict(wanted)
    differing = [
        f"{name} was {before[name]!r} and is now {now[name]!r}"
        for name in before
        if name != "client_id" and before[name] != now[name] and not _stricter(name, opened, wanted)
    ]
    if differing:
        raise LedgerError(
            f"the ledger was opened with other parameters: {'; '.join(differing)}. A budget bounds "
            "something only while it is fixed: go on with the first parameters (for target_epsilon, set the "
            "first one in client.toml; a federation that releases a budgeted channel without differential "
            "privacy passes any budget, and can only have other data). A fresh ledger would forget what this "
            "one has spent, whichever client or federation it is for; only data that share no example with "
            "these may have their own"
        )


def _stricter(name: str, opened: LedgerParameters, wanted: LedgerParameters) -> bool:
    if name == "budgeted_channels":
        return set(wanted.budgeted_channels) > set(opened.budgeted_channels)
    if name == "target_epsilon" and wanted.target_epsilon is not None:
        return opened.target_epsilon is None or wanted.target_epsilon < opened.target_epsilon
    return False


def check_open(rows: Sequence[LedgerRow]) -> None:
    """Refuse a ledger that was closed; the LedgerError says where it went, or that it is a backup."""
    last = rows[-1]
    if last.kind not in ("CLOSED", "MOVED"):
        return
    place = json.loads(last.mechanism or "{}").get("moved_to", "")
    if last.kind == "MOVED":
        why = f"was closed and moved to {place}; name that directory in data.ledger"
    elif place:
        why = (
            f"was closed to be moved to {place}, and the move was not finished; finish it with `fedmosaic "
            f"ledger move OLD {place}`, where OLD is the directory of this one"
        )
    else:
        why = "is a backup; if the ledger is lost, put it back with `fedmosaic ledger move BACKUP PLACE`"
    raise LedgerError(f"this privacy ledger {why}")


def check_request(fields: dict[str, Any], event: GaussianEvent) -> None:
    """Refuse a reservation whose arguments, the fields of the row to be, contradict each other."""
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


class Release(NamedTuple):
    """What is released: a profile once per data epoch and mechanism, anything else per run and round."""

    channel: str | None
    round: int | None
    data_epoch: str | None
    context: str | None

    @classmethod
    def of(cls, row: LedgerRow) -> "Release":
        """What a row is about."""
        return cls(row.channel, None if row.channel == "profile" else row.round, row.data_epoch, row.context)

    def among(self, rows: Iterable[LedgerRow], kind: Kind) -> list[LedgerRow]:
        """Rows of one kind that are about this release."""
        mine = self if self.channel != "profile" else self._replace(round=None)
        return [row for row in rows if row.kind == kind and Release.of(row) == mine]

    def made(self, rows: Iterable[LedgerRow]) -> LedgerRow | None:
        """The RELEASED row, if it was made."""
        return next(iter(self.among(rows, "RELEASED")), None)


def bound_of(charged: Iterable[Charge], delta: float, accountant: str) -> EpsilonBound:
    """ε of what was charged: the largest over what one example can have gone through."""
    bounds = [epsilon_bound(events, delta, accountant) for events in compositions(charged)]
    return max(bounds, key=lambda bound: bound.epsilon)


def advice(event: GaussianEvent) -> str:
    """What to do when the budget refuses a release."""
    if event.is_private:
        return "Go on in receive-only mode"
    return (
        "A channel without differential privacy fits no budget: leave it out of budgeted_channels by name, "
        "or protect it with dp"
    )


def reservation_at(rows: Sequence[LedgerRow], sequence: int) -> LedgerRow:
    """The RESERVED row of this sequence; LedgerError if there is none."""
    if 0 <= sequence < len(rows) and rows[sequence].kind == "RESERVED":
        return rows[sequence]
    raise LedgerError(f"row {sequence} is no reservation; give what reserve() returned")
