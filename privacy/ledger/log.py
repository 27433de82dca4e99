"""The ledger's rows in memory and on disk, one at a time, in one order, whoever appends."""

import datetime as dt
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fedmosaic.privacy.accounting.epsilon import EpsilonBound
from fedmosaic.privacy.ledger.rows import Kind, LedgerRow
from fedmosaic.privacy.ledger.rules import check_open
from fedmosaic.privacy.ledger.store import LedgerStore
from fedmosaic.protos.errors import LedgerError


class LedgerLog:
    """An append-only sequence of rows that several threads and processes may extend."""

    def __init__(self, store: LedgerStore, clock: Callable[[], dt.datetime]) -> None:
        self.store = store
        self.rows: list[LedgerRow] = []
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
        """All rows so far, while nobody else appends; what is appended inside is durable afterwards.

        Args:
            closed: append also to a ledger that was closed.

        Raises:
            LedgerError: the file cannot be written, a new row does not continue the chain, or the ledger was
                closed, perhaps by another process while this one had it open.
        """
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
            self.store.write_head(self.rows[-1])

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
            if (row.sequence, row.previous_hash, row.hash) != (position, previous, row.computed_hash()):
                raise LedgerError(
                    f"the privacy ledger is damaged at row {position}: it does not continue the rows before "
                    "it"
                )
            self.rows.append(row)
