"""Moving a ledger, joining it with another one of the same data, and making a backup.

A ledger that exists twice forgets: what is charged to one copy, the other does not know. So whatever makes a
second file closes the first, in the chain itself and durably, before anything can be charged to the second:

    OLD  … CLOSED(to NEW)                              NEW does not exist, or does not hold OLD's charges
    OLD  … CLOSED(to NEW)         NEW … CLOSED RESUMED     the same rows, and NEW goes on
    OLD  … CLOSED(to NEW) MOVED   NEW … CLOSED RESUMED     finished

A crash after any step leaves OLD closed; the same command finishes the move. Where NEW is a ledger already,
of the same data, what only OLD holds is charged to NEW as well, before its RESUMED row. The closing row is
bound by the chain of hashes, not signed: whoever can write the file can use the key beside it.
"""

import datetime as dt
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from fedmosaic.privacy.files import make_directory, sync_directory, write_atomically
from fedmosaic.privacy.ledger.ledger import LEDGER
from fedmosaic.privacy.ledger.rows import Kind, LedgerRow, canonical_json, charges
from fedmosaic.privacy.ledger.rules import bound_of, check_open, parameters_of
from fedmosaic.privacy.ledger.store import LedgerLog, LedgerStore
from fedmosaic.protos.errors import LedgerError

PROFILES = "profile-*.npy"
"""Noised profiles that may be sent again free of charge; they go wherever the ledger goes."""
UNFINISHED = ".new"
"""At the end of a directory's name: it is being made there, or was when a move or a backup was cut short."""


def move(old: Path, new: Path, after: Callable[[str], None] = lambda _: None) -> int:
    """Close the ledger in one directory and go on with it in another; or finish a move that was begun.

    `new` is made, or holds another ledger of the same data: how many releases were charged to that is
    returned. A backup is put back in the same way. `after` is told of every step that is done; tests crash
    there.
    """
    old, new = old.resolve(), new.resolve()
    if not (old / LEDGER).exists():
        raise LedgerError(f"{old} holds no {LEDGER}; give the directory of the ledger to move")
    joined = (new / LEDGER).exists()
    if old == new or (not joined and new.exists() and (not new.is_dir() or any(new.iterdir()))):
        raise LedgerError(f"{new} is not free; give a directory that does not exist, and is not the old one")
    carried = 0
    with closing(LedgerStore(old / LEDGER)) as store:
        log = _verified(store)
        if joined:
            closed = _close(log, new)
            after("closed")
            carried = _join(log.rows, closed, old, new)
            _copy_profiles(old, new)  # also where they alone are missing
        else:
            with _building(new) as place:  # first: where nothing can be made, nothing is closed
                closed = _close(log, new)
                after("closed")
                _copy(store, place, "RESUMED", {"closed": closed.hash, "from": str(old)})
                _copy_profiles(old, place)
        after("resumed")
        with log.appending(closed=True):
            _append(log, "MOVED", {"moved_to": str(new)})
    return carried


def back_up(ledger: Path, out: Path) -> None:
    """Write a closed copy of a ledger and its profiles to a new directory; `move` puts it back."""
    ledger, out = ledger.resolve(), out.resolve()
    if out.exists():
        raise LedgerError(f"{out} exists already; give a new directory: a backup overwrites nothing")
    with closing(LedgerStore(ledger / LEDGER, read_only=True)) as store:
        check_open(store.verified_rows())
        with _building(out) as place:
            _copy(store, place, "CLOSED", {"moved_to": ""})
            _copy_profiles(ledger, place)


def _close(log: LedgerLog, new: Path) -> LedgerRow:
    """The row that closed a ledger for a move to `new`, written if it is not there yet."""
    last = log.rows[-1]
    place = json.loads(last.mechanism or "{}").get("moved_to", "") if last.kind == "CLOSED" else ""
    if last.kind == "MOVED" or (place and place != str(new)):
        check_open(log.rows)
    if place:
        return last
    if (new / LEDGER).exists():
        _check_joinable(new / LEDGER, log.rows)
    with log.appending(closed=True) as rows:
        if rows[-1].kind == "CLOSED":  # a backup; it names the one place where it is put back
            _append(log, "RESUMED", {"closed": rows[-1].hash})
        return _append(log, "CLOSED", {"moved_to": str(new)})


def _check_joinable(path: Path, rows: Sequence[LedgerRow]) -> None:
    with closing(LedgerStore(path, read_only=True)) as store:
        present = store.verified_rows()
    check_open(present)
    units = parameters_of(present).unit, parameters_of(rows).unit
    if units[0] != units[1]:
        raise LedgerError(f"{path} counts one {units[0]}, the ledger to move one {units[1]}; not both")


def _join(rows: Sequence[LedgerRow], closed: LedgerRow, old: Path, new: Path) -> int:
    """Charge to the ledger in `new` what only `rows` hold, in one transaction; nothing if it was done."""
    with closing(LedgerStore(new / LEDGER)) as store:
        log = _verified(store)
        with log.appending() as present:
            told = [json.loads(row.mechanism or "{}") for row in present if row.kind == "RESUMED"]
            known = {row.hash for row in present}.union(*(each.get("carried", ()) for each in told))
            if closed.hash in known or closed.hash in {each["closed"] for each in told}:
                return 0
            missing = [row for row in rows[1:] if row.hash not in known]
            carried = _carry(log, rows, missing)
            # With the opening row, which a keeper has seen of a ledger that had no other yet.
            carried_rows = [rows[0].hash, *(row.hash for row in missing)]
            told_here = {"closed": closed.hash, "from": str(old), "carried": carried_rows}
            salt = json.loads(rows[0].mechanism or "{}")["salt"]
            _append(log, "RESUMED", told_here | {"salt": salt})
    return carried


def _carry(log: LedgerLog, rows: Sequence[LedgerRow], missing: Sequence[LedgerRow]) -> int:
    """Append reservations, releases and refusals among the missing rows. Returns how many reservations."""
    parameters = parameters_of(log.rows)
    drawn = {row.sequence for row in missing if row.kind == "RESERVED"}
    # A reservation that both ledgers hold and both released is two draws of noise, and charged twice.
    drawn |= {row.reference for row in missing if row.kind == "RELEASED" and row.reference is not None}
    reservations = [rows[sequence] for sequence in sorted(drawn)]
    charged = charges([*log.rows, *reservations], parameters.budgeted_channels)
    bound = bound_of(charged, parameters.delta, parameters.accountant)
    again: dict[int, int] = {}
    for row in reservations:
        again[row.sequence] = log.append("RESERVED", bound=bound, **_content(row, disjoint=False)).sequence
    for row in missing:
        if row.kind == "RELEASED" and row.reference is not None:
            log.append("RELEASED", bound=bound, **_content(row, reference=again[row.reference]))
        elif row.kind in ("REFUSED", "RESUMED"):  # a draw that was lost and then refused stays so
            log.append(row.kind, bound=bound, **_content(row))
    return len(reservations)


def _content(row: LedgerRow, **changes: object) -> dict[str, Any]:
    own = {"sequence", "time", "kind", "epsilon", "accountant", "previous_hash", "hash"}
    return {name: value for name, value in dict(row).items() if name not in own} | changes


def _append(log: LedgerLog, kind: Kind, mechanism: dict[str, object]) -> LedgerRow:
    unit = parameters_of(log.rows).unit
    return log.append(kind, bound=log.running_bound(), unit=unit, mechanism=canonical_json(mechanism))


def _verified(store: LedgerStore) -> LedgerLog:
    log = LedgerLog(store, lambda: dt.datetime.now(dt.UTC))
    log.verify()
    return log


def _copy(store: LedgerStore, place: Path, kind: Kind, mechanism: dict[str, object]) -> None:
    """The same rows in another file, and one more."""
    store.copy_to(place / LEDGER)
    with closing(LedgerStore(place / LEDGER)) as copy:
        copy.write_head(copy.rows()[-1])
        log = _verified(copy)
        with log.appending(closed=True):
            _append(log, kind, mechanism)


@contextmanager
def _building(directory: Path) -> Iterator[Path]:
    """A directory to fill, put in its place when it is complete; what a crash left behind is done anew."""
    temporary = directory.with_name(directory.name + UNFINISHED)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        make_directory(temporary)
        yield temporary
        if directory.exists():
            directory.rmdir()
        temporary.rename(directory)
        sync_directory(directory.parent)
    except OSError as error:
        raise LedgerError(f"{directory} cannot be made ({error}); nothing is lost, try again") from error


def _copy_profiles(old: Path, new: Path) -> None:
    for file in sorted(old.glob(PROFILES)):
        if not (new / file.name).exists():
            write_atomically(new / file.name, file.read_bytes())
