"""Rows of the privacy ledger as plain data: their hashes, what they charge, how they compose.

Pure functions over rows, for reports and audits.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedmosaic.privacy import configuration
from fedmosaic.privacy.accounting.events import Epsilon, GaussianEvent
from fedmosaic.privacy.configuration import FIRST_PREVIOUS_HASH, Hex32, chained_hash, misfit
from fedmosaic.protos.errors import LedgerError

Channel = Literal["profile", "adapter", "family"]
Kind = Literal["OPENED", "RESERVED", "RELEASED", "RESENT", "REFUSED", "CLOSED", "RESUMED", "MOVED"]
Coverage = Literal["dp", "cryptography", "nothing"]
Unit = Literal["example", "person"]

CHANNELS: tuple[Channel, ...] = ("profile", "adapter", "family")
NEIGHBOURING_RELATION = "add or remove one"
RESTORE = "move it away and put the newest backup in its place with `fedmosaic ledger move BACKUP PLACE`"
"""What to do about a ledger that cannot be used any more; `fedmosaic ledger backup` makes backups."""


class LedgerRow(BaseModel):
    """One entry of the ledger. Fields that do not apply to its kind are None.

    Attributes:
        sequence: 0 for the opening row, then without gaps.
        time: UTC, ISO 8601.
        kind: OPENED fixes the parameters; RESERVED charges, whatever happens afterwards; RELEASED and RESENT
            charge nothing; REFUSED records a release that the budget did not allow. CLOSED ends a ledger that
            is moved away or is a backup, MOVED says that its move is finished, RESUMED that it goes on here.
        context: what tells releases of one channel, round and data epoch apart: the run, or for a profile its
            mechanism.
        attempt: 1 for the first reservation (or sending) of this release, then 2, …
        reference: sequence of the RESERVED row that a RELEASED or RESENT row is about.
        mechanism: canonical JSON; of an OPENED row the ledger's parameters, of a CLOSED or MOVED row where it
            went, of a RESUMED row where it came from.
        noise_multiplier: σ of the event; 0 when nothing but cryptography, or nothing, protects it.
        sampling_rate: q of the event.
        steps: number of releases in the event.
        clipping_norm: C, in the unit of what is clipped.
        secure_noise: False when noise came from a seeded generator of a test: then no guarantee holds.
        data_epoch: hash of the set of example ids. It could be guessed, so it stays with the client.
        disjoint: whether the ledger proved that no example of this epoch is in another disjoint epoch.
        payload_digest: SHA-256 of the bytes that left.
        epsilon: ε of the budgeted channels after this row (for REFUSED: what it would have become).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sequence: int = Field(ge=0)
    time: str = Field(min_length=20, max_length=40)
    kind: Kind
    channel: Channel | None = None
    round: int | None = Field(default=None, ge=0)
    context: str | None = Field(default=None, max_length=128)
    attempt: int | None = Field(default=None, ge=1)
    reference: int | None = Field(default=None, ge=1)
    mechanism: str | None = None
    noise_multiplier: float | None = Field(default=None, ge=0.0, allow_inf_nan=False)
    sampling_rate: float | None = Field(default=None, gt=0.0, le=1.0, allow_inf_nan=False)
    steps: int | None = Field(default=None, ge=1)
    clipping_norm: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    dimensions: int | None = Field(default=None, ge=1)
    unit: Unit
    neighbouring_relation: Literal["add or remove one"] = "add or remove one"
    covered_by: Coverage | None = None
    secure_noise: bool | None = None
    data_epoch: Hex32 | None = None
    disjoint: bool = False
    payload_digest: Hex32 | None = None
    epsilon: Epsilon = 0.0
    accountant: Literal["prv", "rdp", "pld"]
    previous_hash: Hex32 = FIRST_PREVIOUS_HASH
    hash: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")

    def event(self) -> GaussianEvent:
        """The event of a RESERVED or REFUSED row; LedgerError where a part of it is missing."""
        if self.noise_multiplier is None or self.sampling_rate is None or self.steps is None:
            raise LedgerError(f"row {self.sequence} ({self.kind}) of the ledger holds no complete event")
        return GaussianEvent(self.noise_multiplier, self.sampling_rate, self.steps)

    def computed_hash(self) -> str:
        """SHA-256 (hexadecimal) over the previous hash and the canonical JSON of everything but `hash`."""
        content = canonical_json(self.model_dump(mode="json", exclude={"hash"}))
        return chained_hash(self.previous_hash, content)

    @classmethod
    def sealed(cls, **fields: Any) -> "LedgerRow":
        """A new row with its hash filled in; LedgerError if a field is missing or impossible."""
        try:
            row = cls(**fields)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise LedgerError(f"the ledger cannot record this: {problems}") from None
        return row.model_copy(update={"hash": row.computed_hash()})


def canonical_json(value: object) -> str:
    """Canonical JSON of what a row holds, in its own signs, not in ASCII; LedgerError if it is no JSON."""
    try:
        return configuration.canonical_json(value, ascii_only=False)
    except (TypeError, ValueError) as error:
        raise LedgerError(f"a mechanism must be JSON without NaN or infinity: {error}") from None


def example_hashes(example_ids: Iterable[str]) -> list[str]:
    """Sorted SHA-256 hashes of example ids; LedgerError if there is none, or one twice."""
    hashes = [hashlib.sha256(b"fedmosaic/example/v1\x00" + name.encode()).hexdigest() for name in example_ids]
    if not hashes or len(set(hashes)) != len(hashes):
        raise LedgerError("a data epoch needs at least one example id, and every id only once")
    return sorted(hashes)


def data_epoch(example_ids: Iterable[str]) -> str:
    """Hash (hexadecimal) of the set of example ids; order does not matter.

    It names one state of a client's data. It stays on the client: who guesses the ids can test the guess.
    """
    return epoch_of_hashes(example_hashes(example_ids))


def epoch_of_hashes(hashes: Iterable[str]) -> str:
    """`data_epoch` from what `example_hashes` returned."""
    return hashlib.sha256(b"fedmosaic/data-epoch/v1\x00" + "\n".join(sorted(hashes)).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Charge:
    """What one reservation costs; its epoch, if proved to share no example with other such epochs."""

    event: GaussianEvent
    disjoint_epoch: str | None = None


def charges(rows: Iterable[LedgerRow], channels: Iterable[str] | None = None) -> list[Charge]:
    """What a ledger has charged, on these channels or on all: every reservation, released or not."""
    wanted = None if channels is None else frozenset(channels)
    return [
        Charge(row.event(), row.data_epoch if row.disjoint else None)
        for row in rows
        if row.kind == "RESERVED" and (wanted is None or row.channel in wanted)
    ]


def compositions(charged: Iterable[Charge]) -> list[tuple[GaussianEvent, ...]]:
    """What one example can at most have gone through, one tuple of events per possibility; at least one.

    An example is in at most one of the epochs that were proved disjoint, so these compose in parallel:
    ε is the largest over the tuples. Every other release may have used every example and is in all tuples.

    Reference:
        McSherry 2009, "Privacy integrated queries", theorem 4 (parallel composition).
    """
    everywhere: list[GaussianEvent] = []
    by_epoch: dict[str, list[GaussianEvent]] = {}
    for charge in charged:
        if charge.disjoint_epoch is None:
            everywhere.append(charge.event)
        else:
            by_epoch.setdefault(charge.disjoint_epoch, []).append(charge.event)
    return [(*everywhere, *part) for part in by_epoch.values()] or [tuple(everywhere)]


def check_chain(rows: Sequence[LedgerRow]) -> None:
    """Check that a whole ledger is complete, unaltered, in order and tells one story; else LedgerError."""
    previous = FIRST_PREVIOUS_HASH
    reserved: dict[int, LedgerRow] = {}
    released: dict[int, str | None] = {}
    before: Kind | None = None
    for index, row in enumerate(rows):
        if reason := misfit(row, index, previous):
            raise _broken(index, reason)
        if (row.kind == "OPENED") != (index == 0):
            raise _broken(index, "a ledger is opened once, in its first row")
        if before == "MOVED" or (before == "CLOSED" and row.kind not in ("RESUMED", "MOVED")):
            raise _broken(index, "it follows the row that closed the ledger")
        if row.kind == "MOVED" and before != "CLOSED":
            raise _broken(index, "a ledger is closed before it is moved")
        _check_story(row, reserved, released)
        previous, before = row.hash, row.kind


def check_seen(rows: Sequence[LedgerRow], sequence: int, digest: str, source: str) -> None:
    """Check that rows hold the one that `source` has seen, by sequence and hash; LedgerError if not."""
    if sequence >= len(rows):
        raise LedgerError(
            f"the privacy ledger ends at row {len(rows) - 1}, but {source} has seen row {sequence}: rows "
            f"were cut off, first of them row {len(rows)}. What it forgot is still spent; {RESTORE}"
        )
    if rows[sequence].hash != digest:
        raise LedgerError(
            f"the privacy ledger was rewritten: row {sequence} is not what {source} has seen; {RESTORE}"
        )


def _check_story(row: LedgerRow, reserved: dict[int, LedgerRow], released: dict[int, str | None]) -> None:
    if row.kind == "RESERVED":
        row.event()
        reserved[row.sequence] = row
    elif row.kind in ("RELEASED", "RESENT"):
        if row.reference is None or row.reference not in reserved:
            raise _broken(row.sequence, "it is about a reservation that does not exist")
        if row.kind == "RELEASED":
            if row.reference in released:
                raise _broken(row.sequence, f"reservation {row.reference} was released before")
            released[row.reference] = row.payload_digest
        elif row.reference not in released or released[row.reference] != row.payload_digest:
            raise _broken(row.sequence, "it re-sends other bytes than were released")


def _broken(sequence: int, reason: str) -> LedgerError:
    return LedgerError(
        f"the privacy ledger is damaged at row {sequence}: {reason}. What was spent can no longer be shown: "
        f"{RESTORE}, and do not release anything from this data before"
    )
