"""The file under the privacy ledger: SQLite that only grows, and a head file beside it.

Every append is one transaction, fsynced before the call returns (WAL, synchronous=FULL). After it, and before
the call returns, the head file, `<ledger>.head`, is replaced by the last row's sequence and hash, which tells
a ledger that is shorter. A row that a crash leaves out of it is one that nothing was drawn or sent on. Both
files replaced together (a rolled-back disk image) are only caught by an anchor kept elsewhere.
"""

import datetime as dt
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedmosaic.privacy.accounting.epsilon import EpsilonBound
from fedmosaic.privacy.configuration import misfit
from fedmosaic.privacy.files import make_directory, private_opener, sync_directory, write_atomically
from fedmosaic.privacy.ledger.rows import (
    RESTORE,
    Kind,
    LedgerRow,
    charges,
    check_chain,
    check_seen,
    epoch_of_hashes,
)
from fedmosaic.privacy.ledger.rules import check_open
from fedmosaic.protos.errors import LedgerError

_SCHEMA_VERSION = 2
_WAIT_SECONDS = 60.0
_COLUMNS = tuple(LedgerRow.model_fields)
_BOOLEANS = ("secure_noise", "disjoint")
_TYPES = {"sequence": "INTEGER PRIMARY KEY", "epsilon": "REAL NOT NULL", "hash": "TEXT NOT NULL UNIQUE"}
_SCHEMA = (
    f"CREATE TABLE rows ({', '.join(f'{name} {_TYPES.get(name, str())}' for name in _COLUMNS)})",
    "CREATE TABLE epoch_examples (data_epoch TEXT NOT NULL, example_hash TEXT NOT NULL, "
    "PRIMARY KEY (data_epoch, example_hash)) WITHOUT ROWID",
    "CREATE INDEX examples_by_hash ON epoch_examples (example_hash)",
    *(
        f"CREATE TRIGGER {table}_keep_{verb.lower()} BEFORE {verb} ON {table} "
        "BEGIN SELECT RAISE(ABORT, 'the privacy ledger only grows'); END"
        for table in ("rows", "epoch_examples")
        for verb in ("UPDATE", "DELETE")
    ),
    f"PRAGMA user_version = {_SCHEMA_VERSION}",
)


class LedgerStore:
    """Rows on disk, in a file of its owner's; knows nothing of budgets."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self.head_path = path.with_name(path.name + ".head")
        existed = path.exists()
        if not existed and (read_only or self.head_path.exists()):
            although = (
                f" although {self.head_path.name} shows there was one" if self.head_path.exists() else ""
            )
            raise LedgerError(
                f"{path}: the ledger is missing{although}; what it says is spent stays spent: {RESTORE}"
            )
        if not existed:
            make_directory(path.parent)
            os.close(private_opener(str(path), os.O_CREAT | os.O_RDWR))
            sync_directory(path.parent)
        with self._reported():
            uri = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rw'}"
            self._connection = sqlite3.connect(
                uri, uri=True, isolation_level=None, timeout=_WAIT_SECONDS, check_same_thread=False
            )
            if not read_only:
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute("PRAGMA synchronous = FULL")
                self._connection.execute("PRAGMA fullfsync = ON")

    def copy_to(self, path: Path) -> None:
        """Write everything that is committed to a new file, whoever writes to this one meanwhile.

        A copy of the file alone may lack the newest rows, which SQLite keeps beside it until they are merged.
        """
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        with self._reported(), closing(sqlite3.connect(path)) as copy:
            self._connection.backup(copy)

    def close(self) -> None:
        """Close the file; the store cannot be used afterwards."""
        self._connection.close()

    def is_blank(self) -> bool:
        """Whether nothing was ever committed to the file."""
        with self._reported():
            (tables,) = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        return not tables

    def prepare(self) -> bool:
        """Create the tables, inside a transaction, where there are none; whether they were created."""
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version == _SCHEMA_VERSION:
            return False
        if version or not self.is_blank():
            raise LedgerError(
                f"{self.path} is no privacy ledger of version {_SCHEMA_VERSION} (found version {version}); "
                "give another path, or open it with the version of fedmosaic that wrote it"
            )
        for statement in _SCHEMA:
            self._connection.execute(statement)
        return True

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """One write transaction that excludes every other process; committed and fsynced at the end."""
        with self._reported():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                with suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def rows(self, start: int = 0) -> list[LedgerRow]:
        """Rows from `start` on, in order; LedgerError if one holds something that no row may hold."""
        with self._reported():
            cursor = self._connection.execute(
                f"SELECT {', '.join(_COLUMNS)} FROM rows WHERE sequence >= ? ORDER BY sequence",  # noqa: S608  # the columns are this module's own
                (start,),
            )
            return [_row(values) for values in cursor]

    def verified_rows(self) -> list[LedgerRow]:
        """All rows, after checking chain, head file and evidence; else LedgerError."""
        # The head first: a row that another process appends in between must not look cut off.
        head, rows = self.read_head(), self.rows()
        if head is None and len(rows) > 1:  # begun by another process in between
            head, rows = self.read_head(), self.rows()
        if not rows:
            raise LedgerError(f"{self.path} holds no rows, not even the opening one; {RESTORE}")
        check_chain(rows)
        self.check_head(head, rows)
        self.check_examples({c.disjoint_epoch for c in charges(rows) if c.disjoint_epoch is not None})
        return rows

    def append(self, row: LedgerRow) -> None:
        """Add a sealed row; call inside a transaction."""
        values = [getattr(row, name) for name in _COLUMNS]
        marks = ", ".join("?" for _ in _COLUMNS)
        self._connection.execute(f"INSERT INTO rows ({', '.join(_COLUMNS)}) VALUES ({marks})", values)  # noqa: S608  # the columns are this module's own

    def keep_head(self, since: int) -> None:
        """Have the head file name the newest row, which `since` is no later than.

        Under the lock of a transaction: after it, a slower process would put an older head over a newer one,
        and rows that are cut off in between would not be missed.
        """
        with self.transaction():
            self.write_head(self.rows(since)[-1])

    def write_head(self, row: LedgerRow) -> None:
        """Replace the head file durably by this row's sequence and hash."""
        content = json.dumps({"sequence": row.sequence, "hash": row.hash}).encode()
        write_atomically(self.head_path, content)

    def read_head(self) -> tuple[int, str] | None:
        """Sequence and hash in the head file; None when there is none, LedgerError when it cannot be read."""
        try:
            head = json.loads(self.head_path.read_bytes())
            return int(head["sequence"]), str(head["hash"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise LedgerError(
                f"{self.head_path} cannot be read ({error!r}), so it cannot be shown that no row was cut off "
                f"the ledger's end; {RESTORE}"
            ) from None

    def check_head(self, head: tuple[int, str] | None, rows: Sequence[LedgerRow]) -> None:
        """Compare rows with the head file, which was read before them; LedgerError if rows are missing.

        A head that is behind is what a crash between commit and head leaves; the next append moves it on.
        """
        if head is not None:
            check_seen(rows, *head, str(self.head_path))
        elif len(rows) > 1:
            raise LedgerError(
                f"{self.head_path} is missing, so it cannot be shown that no row was cut off the ledger's "
                f"end; {RESTORE}"
            )

    def overlaps(self, epoch: str, hashes: Sequence[str]) -> bool:
        """Whether any other stored epoch shares one of these example hashes; call inside a transaction."""
        shared = self._connection.execute(
            "SELECT 1 FROM json_each(?) JOIN epoch_examples ON example_hash = value "
            "WHERE data_epoch <> ? LIMIT 1",
            (json.dumps(hashes), epoch),
        ).fetchone()
        return shared is not None

    def keep_examples(self, epoch: str, hashes: Sequence[str]) -> None:
        """Store the examples of an epoch, once; call inside a transaction, after `overlaps`."""
        self._connection.executemany(
            "INSERT OR IGNORE INTO epoch_examples VALUES (?, ?)", ((epoch, value) for value in hashes)
        )

    def check_examples(self, epochs: Iterable[str]) -> None:
        """Check that the stored evidence still proves these epochs disjoint; LedgerError if not."""
        with self._reported():
            twice = self._connection.execute(
                "SELECT 1 FROM epoch_examples GROUP BY example_hash HAVING count(*) > 1 LIMIT 1"
            ).fetchone()
            if twice is not None:
                raise LedgerError("the ledger's evidence of disjoint data epochs is damaged: two overlap")
            for epoch in epochs:
                stored = self._connection.execute(
                    "SELECT example_hash FROM epoch_examples WHERE data_epoch = ?", (epoch,)
                )
                if epoch_of_hashes(value for (value,) in stored) != epoch:
                    raise LedgerError(
                        "the ledger's evidence of disjoint data epochs is damaged: the examples stored for "
                        f"an epoch are not those it was named after; {RESTORE}"
                    )

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the second of a message about damaged text
            raise LedgerError(
                f"{self.path}: the ledger cannot be read or written ({error}); nothing is released until then"
            ) from error


class LedgerLog:
    """An append-only sequence of rows that several threads and processes may extend."""

    def __init__(self, store: LedgerStore, clock: Callable[[], dt.datetime]) -> None:
        self.store = store
        self.rows: list[LedgerRow] = []
        self.told: Callable[[LedgerRow], None] | None = None
        """Called with every row that this process has appended, once it is durable."""
        self._clock = clock
        self._lock = threading.RLock()

    @contextmanager
    def reading(self) -> Iterator[list[LedgerRow]]:
        """All rows so far, while no other thread appends; LedgerError if one does not continue the chain."""
        with self._lock:
            self._refresh()
            yield self.rows

    @contextmanager
    def appending(self, *, closed: bool = False) -> Iterator[list[LedgerRow]]:
        """All rows so far, while nobody else appends; what is appended inside is durable afterwards."""
        with self._lock:
            known = len(self.rows)
            try:
                with self.store.transaction():
                    self._refresh()
                    known = len(self.rows)
                    if not closed:
                        check_open(self.rows)
                    yield self.rows
            except BaseException:
                del self.rows[known:]
                raise
            self.store.keep_head(self.rows[-1].sequence)
            if self.told is not None:
                for row in self.rows[known:]:
                    self.told(row)

    def append(self, kind: Kind, *, bound: EpsilonBound, **fields: Any) -> LedgerRow:
        """Write the next row, inside `appending`; `bound` is the running ε after it."""
        last = self.rows[-1] if self.rows else None
        row = LedgerRow.sealed(
            sequence=last.sequence + 1 if last else 0,
            time=self._clock().astimezone(dt.UTC).isoformat(timespec="microseconds"),
            kind=kind,
            epsilon=bound.epsilon,
            accountant=bound.accountant,
            **({"previous_hash": last.hash} if last else {}),
            **fields,
        )
        self.store.append(row)
        self.rows.append(row)
        return row

    def running_bound(self) -> EpsilonBound:
        """ε after the last row that was not a refusal, whose ε is only what it would have become."""
        row = next(row for row in reversed(self.rows) if row.kind != "REFUSED")
        return EpsilonBound(row.epsilon, row.accountant)

    def verify(self) -> None:
        """Read everything again and check it; see `LedgerStore.verified_rows`."""
        with self._lock:
            self.rows = self.store.verified_rows()

    def _refresh(self) -> None:
        for row in self.store.rows(len(self.rows)):
            previous = self.rows[-1].hash if self.rows else row.previous_hash
            position = len(self.rows)
            if misfit(row, position, previous):
                raise LedgerError(f"the privacy ledger is damaged at row {position}: it does not continue")
            self.rows.append(row)


def has_begun(path: Path) -> bool:
    """Whether a ledger stands at a path; one whose first transaction was not committed holds nothing yet.

    An empty file is what a kill leaves, and what stands there for a moment while another process begins one.
    """
    if not path.exists() or path.with_name(path.name + ".head").exists():
        return path.exists()
    with closing(LedgerStore(path, read_only=True)) as store:
        return not store.is_blank()


def read_ledger(path: Path) -> list[LedgerRow]:
    """All rows of a ledger, verified, without writing to it; LedgerError if it is missing or damaged."""
    with closing(LedgerStore(path, read_only=True)) as store:
        return store.verified_rows()


def _row(values: Sequence[object]) -> LedgerRow:
    fields = dict(zip(_COLUMNS, values, strict=True))
    for name in _BOOLEANS:
        if fields[name] in (0, 1):
            fields[name] = bool(fields[name])
    try:
        return LedgerRow.model_validate(fields)
    except ValidationError as error:
        where = ", ".join(str(problem["loc"][0]) for problem in error.errors() if problem["loc"])
        raise LedgerError(
            f"the privacy ledger is damaged at row {fields['sequence']}: impossible {where}; {RESTORE}"
        ) from None
