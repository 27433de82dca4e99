"""The privacy ledger of a client's data and what is planned to be charged; `fedmosaic ledger`.

It stands in DATA.jsonl.ledger/ beside the training examples, or in the directory that `data.ledger` names, as
it must for data that are no file or folder here: `ledger.sqlite` with every release from these data, by any
run, client and federation, `ledger.sqlite.head`, its last row, and `profile-<data>-<map>.npy`, a noised
profile, sent again free of charge. STATE/ledger.json tells which ledger a state charges, and its last row as
seen there. Every run on the data opens the same ledger, also two at once.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import tyro

from fedmosaic.client.settings import DataSettings
from fedmosaic.client.state import SessionRecord
from fedmosaic.privacy.accounting.calibrate import noise_multiplier_for
from fedmosaic.privacy.accounting.epsilon import default_delta
from fedmosaic.privacy.accounting.leverage import noise_share
from fedmosaic.privacy.audit import AuditLog
from fedmosaic.privacy.configuration import read_own
from fedmosaic.privacy.federation.roster import Roster
from fedmosaic.privacy.federation.terms import Terms
from fedmosaic.privacy.federation.terms_checks import plan_inputs
from fedmosaic.privacy.files import write_atomically
from fedmosaic.privacy.ledger.ledger import LEDGER, Ledger, has_begun, parameters_of, read_ledger
from fedmosaic.privacy.ledger.move import back_up, move
from fedmosaic.privacy.ledger.rows import Channel, LedgerRow, data_epoch
from fedmosaic.privacy.ledger.rules import LedgerParameters, keeper
from fedmosaic.privacy.mechanism.shares import ShareGrid, plan_grid
from fedmosaic.privacy.statement.rounding import round_up
from fedmosaic.protos.errors import AccountingError, ConfigurationError, LedgerError
from fedmosaic.protos.messages import LedgerHead


@dataclass(frozen=True)
class AdapterPlan:
    """σ, noise over clipping norm, 0 without privacy; and the rate q, expected batch size over examples."""

    noise_multiplier: float
    sampling_rate: float


def sampling_rate(terms: Terms, examples: float) -> float:
    """Poisson sampling rate q of DP-SGD: the expected batch size over the number of examples."""
    return min(1.0, terms.adapter_privacy.expected_batch_size / examples)


def plan_adapter(terms: Terms, examples: float, delta: float, target_epsilon: float) -> AdapterPlan:
    """σ for all rounds of n examples, within what the profile leaves of (ε, δ); AccountingError if none."""
    if not terms.adapter.private:
        return AdapterPlan(0.0, sampling_rate(terms, examples))
    if not terms.adapter.in_group_sums:
        settled, rate, steps = plan_inputs(terms, examples, terms.schedule.rounds)
        return AdapterPlan(noise_multiplier_for(target_epsilon, delta, settled, rate, steps), rate)
    sums = terms.group_sums
    if sums.noise_multiplier is None:
        raise AccountingError("the roster does not say the noise of its sums; found the federation again")
    if examples < sums.least_examples:
        raise AccountingError(
            f"{examples:.0f} examples are fewer than the {sums.least_examples} that a member needs for the "
            "noise which all have agreed on (group_sums.least_examples); add examples or leave"
        )
    return AdapterPlan(sums.noise_multiplier, sampling_rate(terms, examples))


def group_grid(terms: Terms, members: int) -> ShareGrid:
    """The integers of a group's sum, a function of the signed terms and the group's size alone."""
    sums = terms.group_sums
    noise = noise_share(sums.noise_multiplier or 0.0, sums.minimum_contributors, sums.colluders)
    return plan_grid(members, terms.adapter_privacy.expected_batch_size, noise, sums.bits)


log = logging.getLogger("fedmosaic.client.ledger")
SEEN: Final = "ledger.json"
SUFFIX: Final = ".ledger"
_AUDITED: Final = {
    "RESERVED": "charged", "RELEASED": "released", "RESENT": "resent", "REFUSED": "budget-refused",
}  # fmt: skip
NO_LEDGER: Final = (
    "data.ledger: missing; data {} have no place beside them for their privacy ledger. Name a directory in "
    "[data] ledger, or Client(…, ledger=…), the same one for every run on these data: a fresh one would "
    "forget what was spent"
)


class ServerAnchor:
    """What the server keeps of this client's ledger, so that one put back from an older copy is noticed.

    The client looks for it in its own ledger: it is honest about its budget, but may have lost some of it. A
    server that lies can only make a client refuse.
    """

    def __init__(self, ledger: Ledger, record: SessionRecord) -> None:
        self._ledger = ledger
        self._keeper = keeper(record.federation, record.client)
        self._kept = b""

    def head(self) -> bytes:
        """Anchor of the ledger's last row; see `fedmosaic.privacy.ledger.rules.anchor_of`."""
        return self._ledger.anchor(self._keeper)

    def check(self, kept: bytes) -> None:
        """LedgerError where the ledger does not hold what the server has kept of it: 32 bytes, or none."""
        if kept:
            self._ledger.check_anchor(self._keeper, kept, "the server")
        self._kept = kept

    def claim(self) -> LedgerHead:
        """The head to send with an upload, and the one that it was checked to follow."""
        return LedgerHead(self.head(), self._kept)

    def accepted(self, claim: LedgerHead | None) -> None:
        """The server has stored an upload, and with it this head."""
        if claim is not None:
            self._kept = claim.head


def audited(audit: AuditLog, client: str, roster: Roster) -> Callable[[LedgerRow], None]:
    """Note that a client begins; what notes the rows of its ledger: which row, and its hash."""
    about = {"federation": roster.federation, "roster": roster.hash.hex()}
    audit.add("started", role="client", name=client, **about)

    def note(row: LedgerRow) -> None:
        if row.channel is not None and row.kind in _AUDITED:
            about = {"round": row.round or 0, "row": row.sequence, "row_hash": row.hash}
            audit.add(_AUDITED[row.kind], channel=row.channel, **about)

    return note


@dataclass(frozen=True)
class DataLedger:
    """A data set's one ledger, in `place`, `named` by `data.ledger` or beside it, as one client sees it."""

    place: Path
    named: bool
    state: Path
    record: SessionRecord

    @classmethod
    def of(cls, settings: DataSettings, state: Path, record: SessionRecord) -> "DataLedger":
        """The ledger beside the data or as configured; LedgerError if one in the state is to be moved."""
        train, named = settings.train, settings.ledger
        if named is not None:
            place = named.resolve()
        elif not isinstance(train, Path):
            raise ConfigurationError(NO_LEDGER.format("of a hub" if train else "handed over in Python"))
        else:
            data = train.resolve()  # two links to one file are one data set
            place = data.with_name(data.name + SUFFIX)
        earlier = state / LEDGER
        begun = earlier.exists() or earlier.with_name(f"{LEDGER}.head").exists()
        if begun and place != state.resolve() and read_ledger(earlier)[-1].kind != "MOVED":
            raise LedgerError(
                f"there is a privacy ledger in {state}, where an early version kept it; releases from the "
                f"same data are charged to one: run `fedmosaic ledger move {state} {place}`, which joins them"
            )
        return cls(place, named is not None, state, record)

    def open(self, terms: Terms, unit_ids: Sequence[str], target: float) -> Ledger:
        """Open the ledger of n units; LedgerError if it is behind, or a fresh one would forget."""
        path = self.place / LEDGER
        seen = self._seen()
        if not has_begun(path):
            self._check_fresh(seen, data_epoch(unit_ids))
            log.info("a new privacy ledger begins in %s; every run on these data has to use it", self.place)
        try:
            ledger = open_ledger(path, self.record.client, terms, len(unit_ids), target)
        except OSError as error:
            raise LedgerError(
                f"no privacy ledger can be kept in {self.place} ({error.strerror}); make it writable, or "
                "name another directory in data.ledger, for every run on these data"
            ) from None
        try:
            if seen is not None:
                ledger.check_anchor(self._keeper, seen[1], f"the state directory {self.state}")
            self.remember(ledger)
        except BaseException:
            ledger.close()
            raise
        return ledger

    def remember(self, ledger: Ledger) -> None:
        """Note in the state directory how far the ledger is."""
        content = {"ledger": str(self.place), "anchor": ledger.anchor(self._keeper).hex()}
        write_atomically(self.state / SEEN, json.dumps(content).encode())

    @property
    def _keeper(self) -> str:
        return keeper(self.record.federation, self.record.client)

    def _seen(self) -> tuple[str, bytes] | None:
        remedy = "give a new state_dir, and name the ledger of these data in data.ledger"
        return read_own(
            self.state / SEEN, lambda kept: (str(kept["ledger"]), bytes.fromhex(kept["anchor"])), remedy
        )

    def _check_fresh(self, seen: tuple[str, bytes] | None, epoch: str) -> None:
        if seen is not None or self.record.run_id:
            where = f"the one in {seen[0]}" if seen is not None else f"that of {self.state}, which is gone"
            raise LedgerError(
                f"{self.place} holds no privacy ledger, and what {self.state} has released was charged to "
                f"{where}. A fresh ledger would forget it: name the right directory in data.ledger, or put a "
                f"backup back with `fedmosaic ledger move BACKUP {self.place}`. For data that share no "
                "example with those, take a new state_dir"
            )
        if self.named:
            return
        for other in filter(has_begun, sorted(self.place.parent.glob(f"*{SUFFIX}/{LEDGER}"))):
            rows = read_ledger(other)
            if rows[-1].kind not in ("CLOSED", "MOVED") and any(row.data_epoch == epoch for row in rows):
                raise LedgerError(
                    f"{other.parent} is the privacy ledger of a data set with exactly these example ids. If "
                    f"the data were renamed, `fedmosaic ledger move {other.parent} {self.place}`; if they "
                    "are other data with the same ids, name a directory for their ledger in data.ledger"
                )


def budgeted_channels(terms: Terms) -> tuple[Channel, ...]:
    """Channels that a budget can bound: without DP on the adapter, its ε is ∞ whatever the budget."""
    return ("profile", "adapter") if terms.adapter.private else ("profile",)


def ledger_parameters(path: Path, client: str, terms: Terms, units: int, target: float) -> LedgerParameters:
    """What a client's ledger of n units is opened with: the δ of `ledger_delta`, and a budget ε."""
    delta = ledger_delta(path, units, terms.adapter_privacy.largest_delta)
    channels = budgeted_channels(terms)
    return LedgerParameters(client, delta, target, budgeted_channels=channels, unit=terms.unit)


def open_ledger(path: Path, client: str, terms: Terms, units: int, target: float) -> Ledger:
    """Open a client's ledger, or begin one; LedgerError if it is damaged or of other `ledger_parameters`."""
    wanted = ledger_parameters(path, client, terms, units, target)
    channels, unit = wanted.budgeted_channels, wanted.unit
    return Ledger.open(path, client, wanted.delta, target, budgeted_channels=channels, unit=unit)


def ledger_delta(path: Path, examples: int, largest: float | None = None) -> float:
    """δ of the ledger, or of a new one of n examples; LedgerError if above 1/n or `largest`."""
    if not has_begun(path):
        return default_delta(examples, largest)
    delta = parameters_of(read_ledger(path)).delta
    if largest is not None and delta > largest:
        raise LedgerError(
            f"{path}: δ = {delta:.2e} was fixed when this ledger was opened, and this federation's terms "
            f"allow at most {largest:g} (adapter_privacy.largest_delta). A federation whose terms allow "
            f"{round_up(delta, 2):g} can take these data; this one only data that share no example with them"
        )
    if delta * examples > 1.0:
        raise LedgerError(
            f"{path}: δ = {delta:g} was fixed when there were fewer examples, and {examples} need one below "
            f"1/{examples}; take part with at most {int(1 / delta)} examples. A fresh ledger would forget "
            "what this one has spent; it is right only for data that share no example with these"
        )
    return delta


@dataclass(frozen=True)
class Move:
    """Close the ledger in OLD and go on with it in NEW; run it again if it was interrupted.

    NEW is made, or is another ledger of the same data, to which everything that only OLD holds is charged.
    OLD refuses to open afterwards. A backup is put back in the same way, if the ledger itself is lost.
    """

    old: tyro.conf.Positional[Path]
    """Directory of the ledger; a state directory of a version before is one."""
    new: tyro.conf.Positional[Path]
    """Directory where it goes on: beside the data, DATA.jsonl.ledger, or what data.ledger names."""


@dataclass(frozen=True)
class Backup:
    """Write a backup of a ledger and its profiles; runs may go on meanwhile. Copying files is none."""

    ledger: tyro.conf.Positional[Path]
    """Directory of the ledger."""
    out: tyro.conf.Positional[Path]
    """Directory to be made."""


Command = Annotated[Move, tyro.conf.subcommand("move")] | Annotated[Backup, tyro.conf.subcommand("backup")]


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic ledger` with its arguments."""
    words = "Move or back up the privacy ledger of a data set."
    command: Move | Backup = tyro.cli(Command, args=[*arguments], prog="fedmosaic ledger", description=words)
    match command:
        case Move(old, new):
            carried = move(old, new)
            print(f"{old} is closed; its ledger goes on in {new}")
            if carried:
                print(f"{carried} release(s) that only {old} held are charged there as well")
        case Backup(ledger, out):
            back_up(ledger, out)
            print(f"{out} is a backup; if {ledger} is lost: fedmosaic ledger move {out} {ledger}")
    return 0
