"""Uploads: judged by their header, received, and stored with as few waits for the disk as is safe.

What is acknowledged is on the disk: the payload, its name, the row. Payloads are waited for side by side;
whoever then gets the run's lock makes the names and rows of all that wait last, with one wait for each.
"""

import logging
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from fedmosaic.protos.messages import Receipt, ReceiptStatus, UploadHeader
from fedmosaic.protos.refusal import Refusal, RefusalKind
from fedmosaic.server.admission import Admission
from fedmosaic.server.keys.relay import check_key_epoch
from fedmosaic.server.round import state as rounds
from fedmosaic.server.run import Run
from fedmosaic.server.storage.store import Arrival

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ticket:
    """An upload that may be sent: its sections are appended to `spool`, laid end to end.

    So many bytes are there already (`received`), of `size`.
    """

    spool: Path
    received: int
    size: int
    content_hash: bytes


@dataclass(frozen=True)
class _Waiting:
    """A checked payload that waits for its row."""

    arrival: Arrival
    spool: Path
    answer: "Future[Receipt]" = field(default_factory=Future)


class Uploads:
    """Takes the uploads of one run; safe to call from many threads."""

    def __init__(self, run: Run, admission: Admission) -> None:
        self._run = run
        self._admission = admission
        self._mutex = threading.Lock()
        self._waiting: list[_Waiting] = []

    def announce(self, client: str, header: UploadHeader) -> Receipt | Ticket:
        """See `Coordinator.announce`."""
        with self._run.lock:
            self._run.rosters.check(client)  # before the signature, whose key another roster may change
            content_hash = self._admission.check_upload(client, header)
            self._run.seen(client)
            _, answer = self._judge(client, header, content_hash)
            if answer is not ReceiptStatus.ACCEPTED:
                return self._receipt(client, header, answer, content_hash)
            if header.sections:
                check_key_epoch(self._run.keys, header)
        spool = self._run.blobs.spool(client, content_hash)
        received = min(spool.stat().st_size, header.size) if spool.exists() else 0
        return Ticket(spool, received, header.size, content_hash)

    def commit(self, client: str, header: UploadHeader, ticket: Ticket, received: int | None) -> Receipt:
        """See `Coordinator.commit`."""
        try:
            self._admission.check_payload(client, header, ticket.spool)
        except Refusal:
            ticket.spool.unlink(missing_ok=True)
            raise
        self._run.blobs.settle(ticket.spool)
        size = header.size if received is None else received
        mine = _Waiting(Arrival(client, header, ticket.content_hash, time.time(), size), ticket.spool)
        with self._mutex:
            self._waiting.append(mine)
        while not mine.answer.done():
            with self._run.lock:
                if not mine.answer.done():
                    self._store_waiting()
        return mine.answer.result()

    def _store_waiting(self) -> None:
        """Store what waits, the first of every client; the lock is held."""
        with self._mutex:
            batch = {waiting.arrival.client: waiting for waiting in reversed(self._waiting)}
            self._waiting = [w for w in self._waiting if batch[w.arrival.client] is not w]
        run, state, accepted = self._run, self._run.round, []
        for waiting in reversed(batch.values()):
            try:
                run.round, answer = self._take(waiting)
            except Exception as error:  # whatever it is, it is that upload's, and raised where it waits
                waiting.answer.set_exception(error)
                continue
            if answer is ReceiptStatus.ACCEPTED:
                accepted.append(waiting)
            else:
                self._answer(waiting, answer)
        try:
            if any(waiting.arrival.header.sections for waiting in accepted):
                run.blobs.settle_uploads(state.number)
            if accepted:
                run.store.add_uploads([waiting.arrival for waiting in accepted])
        except Exception as error:
            run.round = state
            for waiting in accepted:
                waiting.answer.set_exception(error)
            return
        for waiting in accepted:
            self._answer(waiting, ReceiptStatus.ACCEPTED)

    def _take(self, waiting: _Waiting) -> tuple[rounds.Round, ReceiptStatus]:
        """Judge an upload again, and move its payload into place if it is accepted."""
        client, header = waiting.arrival.client, waiting.arrival.header
        self._admission.check_member(client)  # another roster may have come since it was announced
        self._run.rosters.check(client)
        state, answer = self._judge(client, header, waiting.arrival.content_hash)
        if answer is not ReceiptStatus.ACCEPTED:
            waiting.spool.unlink(missing_ok=True)
        elif header.sections:
            check_key_epoch(self._run.keys, header)
            self._run.blobs.adopt(waiting.spool, header.round, client)
            self._run.witnessing.keep(client, header)
        return state, answer

    def _answer(self, waiting: _Waiting, status: ReceiptStatus) -> None:
        arrival = waiting.arrival
        waiting.answer.set_result(self._receipt(arrival.client, arrival.header, status, arrival.content_hash))

    def _judge(
        self, client: str, header: UploadHeader, content_hash: bytes
    ) -> tuple[rounds.Round, ReceiptStatus]:
        run = self._run
        here = header.round == run.round.number
        stored = run.round.arrived.get(client) if here else run.store.content_hash(header.round, client)
        # In group sums what counts went before the upload, which carries the profile alone.
        contributes = bool(header.sections) or run.sums is not None
        state, status = run.round.judged(client, header.round, content_hash, stored, contributes=contributes)
        if isinstance(status, rounds.Rejected):
            kind = RefusalKind.CONFLICT if stored is not None else RefusalKind.PRECONDITION
            raise Refusal(kind, status.reason, status.message, status.remedy)
        if status is ReceiptStatus.ACCEPTED:
            self._admission.check_ledger(header, run.store.ledger_head(client))
        return state, status

    def _receipt(
        self, client: str, header: UploadHeader, status: ReceiptStatus, content_hash: bytes
    ) -> Receipt:
        if status is ReceiptStatus.ACCEPTED:
            taken = f"upload of {client} accepted ({header.size} bytes)"
            abstains = not header.sections and self._run.sums is None
            log.info("%s; %s", f"{client} abstains" if abstains else taken, self._run.state_line())
        else:
            answer = f"upload of {client} answered {status.name}; round {self._run.round.number} is open"
            log.info("round %d: %s", header.round, answer)
        return Receipt(status, self._run.round.number, content_hash, self._run.position.head)
