"""The privacy ledger of a client's data: where it stands, how it is opened, and `fedmosaic ledger`.

    DATA.jsonl                     the client's training examples (`data.train`)
    DATA.jsonl.ledger/             or the directory that `data.ledger` names, as it must for data that are no
                                   file or folder here: of a hub, or handed over in Python
        ledger.sqlite              every release from these data, by any run, client and federation
        ledger.sqlite.head         the last row that was written
        profile-<data>-<map>.npy   a noised task profile, sent again free of charge until data or map change
    STATE/ledger.json              which ledger a state directory charges, and its last row as seen there

Every run on the data opens the same ledger, also two at once.
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
from fedmosaic.privacy.accounting.epsilon import default_delta
from fedmosaic.privacy.audit import AuditLog
from fedmosaic.privacy.configuration import read_own
from fedmosaic.privacy.federation.roster import Roster
from fedmosaic.privacy.federation.terms import Terms
from fedmosaic.privacy.files import write_atomically
from fedmosaic.privacy.ledger.ledger import LEDGER, Ledger, has_begun, parameters_of, read_ledger
from fedmosaic.privacy.ledger.move import UNFINISHED, back_up, move
from fedmosaic.privacy.ledger.rows import Channel, LedgerRow, data_epoch
from fedmosaic.privacy.ledger.rules import LedgerParameters, check_anchor, check_open, keeper
from fedmosaic.privacy.statement.rounding import round_up
from fedmosaic.protos.errors import ConfigurationError, LedgerError
from fedmosaic.protos.messages import LedgerHead

log = logging.getLogger("fedmosaic.client.ledger")
SEEN: Final = "ledger.json"
SUFFIX: Final = ".ledger"
_AUDITED: Final = {
    "RESERVED": "charged",
    "RELEASED": "released",
    "RESENT": "resent",
    "REFUSED": "budget-refused",
}
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
    """The one ledger of a data set, as one client of one federation sees it.

    `place` is its directory, `named` tells whether `data.ledger` names it; `state` and `record` are the
    client's.
    """

    place: Path
    named: bool
    state: Path
    record: SessionRecord

    @classmethod
    def of(cls, settings: DataSettings, state: Path, record: SessionRecord) -> "DataLedger":
        """The ledger beside the data, or where the configuration says.

        ConfigurationError if nothing here is beside the data; LedgerError if one in the state directory has
        to be moved first.
        """
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

    def check(self, unit_ids: Sequence[str], kept: bytes = b"") -> None:
        """Look, and change nothing: LedgerError as of `open`, or if the server has `kept` a later anchor."""
        path, seen = self.place / LEDGER, self._seen()
        if not has_begun(path):
            self._check_fresh(seen, data_epoch(unit_ids), kept)
            return
        rows = read_ledger(path)
        check_open(rows)
        if seen is not None:
            check_anchor(rows, self._keeper, seen[1], f"the state directory {self.state}")
        if kept:
            check_anchor(rows, self._keeper, kept, "the server")

    def open(self, terms: Terms, unit_ids: Sequence[str], target: float) -> Ledger:
        """Open the ledger of n units with a budget ε, or make the first of data with no release.

        LedgerError if it cannot be used, is behind what this state has seen, or a fresh one would forget.
        """
        path = self.place / LEDGER
        self.check(unit_ids)
        if not has_begun(path):
            log.info("a new privacy ledger begins in %s; every run on these data has to use it", self.place)
        try:
            ledger = open_ledger(path, self.record.client, terms, len(unit_ids), target)
        except OSError as error:
            raise LedgerError(
                f"no privacy ledger can be kept in {self.place} ({error.strerror}); make it writable, or "
                "name another directory in data.ledger, for every run on these data"
            ) from None
        try:
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

    def _check_fresh(self, seen: tuple[str, bytes] | None, epoch: str, kept: bytes) -> None:
        if seen is not None or self.record.run_id or kept:
            where = "the one that the server knows of" if kept else f"that of {self.state}, which is gone"
            where = f"the one in {seen[0]}" if seen is not None else where
            others = "Other data in the same run are charged to it as well"
            if not kept:
                others = "For data that share no example with those, take a new state_dir"
            raise LedgerError(
                f"{self.place} holds no privacy ledger, and what {self.record.client} has released was "
                f"charged to {where}. A fresh ledger would forget it: name the right directory in "
                f"data.ledger, or put a backup back with `fedmosaic ledger move BACKUP {self.place}`. "
                f"{others}"
            )
        found = () if self.named else sorted(self.place.parent.glob(f"*{SUFFIX}/{LEDGER}"))
        beside = [(other.parent, read_ledger(other)) for other in filter(has_begun, found)]
        # One that is here goes before one that went elsewhere, which says where it is. One that is closed and
        # not moved, as a kill leaves it, or a backup, is as good as open: what it holds is charged nowhere.
        for other, rows in sorted(beside, key=lambda each: each[1][-1].kind == "MOVED"):
            if not any(row.data_epoch == epoch for row in rows):
                continue
            if rows[-1].kind == "MOVED":
                check_open(rows)
            raise LedgerError(
                f"{other} is the privacy ledger of a data set with exactly these example ids. If the data "
                f"were renamed, `fedmosaic ledger move {other} {self.place}`; if they are other data with "
                "the same ids, name a directory for their ledger in data.ledger"
            )
        if (unfinished := self.place.with_name(self.place.name + UNFINISHED)).exists():
            raise LedgerError(
                f"{unfinished} shows that a ledger was to be moved to {self.place}, and a fresh one would "
                f"forget what it has spent: finish it with `fedmosaic ledger move OLD {self.place}`, where "
                "OLD is its directory; delete what is unfinished only if none was to be moved here"
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
    """δ of the ledger that is there, or of a new one for n examples under terms that bound δ.

    LedgerError if its δ is above 1/n or above the bound, or it is damaged.
    """
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
