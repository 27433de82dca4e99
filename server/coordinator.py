"""The server without its network: every request of a client as a method, safe to call from many threads.

The gRPC service and in-process simulations call the same methods, which raise `Refusal` with what is wrong.
Nothing here waits: `pull` answers None while a round is not open, and `advance` lets time pass.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, get_args

from fedmosaic.privacy.encryption.aggregators import create_aggregator
from fedmosaic.privacy.files import private_opener
from fedmosaic.protos.messages import (
    Aggregate,
    Enrolled,
    Enrolment,
    KeyMessage,
    Phase,
    Receipt,
    ReceiptStatus,
    RoundStatus,
    Upload,
    UploadHeader,
)
from fedmosaic.protos.refusal import Refusal, RefusalKind
from fedmosaic.server.admission import Admission
from fedmosaic.server.downloads import Download, read_download
from fedmosaic.server.keys.relay import KeyRelay, check_key_epoch, required
from fedmosaic.server.rosters import Rosters, under_roster
from fedmosaic.server.round import state as rounds
from fedmosaic.server.round.close import ClosedRound, DamagedUploadsError, close_round
from fedmosaic.server.round.repair import repair_aggregate
from fedmosaic.server.run import Ticket, next_round, open_run, resume_round, stored_head
from fedmosaic.server.settings import ServerSettings
from fedmosaic.server.storage.blobs import Blobs, MissingBlobError
from fedmosaic.server.storage.store import MARK, Store, default_url
from fedmosaic.server.summary import Account, last_words, summarise
from fedmosaic.server.sums import PARTITION_FORMED, RunSums, is_sum_step

log = logging.getLogger(__name__)
_SECONDS_TO_SEND_AGAIN = 60.0
"""How long a member has to send an upload again that this server has lost."""
Topic = Literal["upload", "round", "keys"]
"""What a listener is told: an upload is stored, a round has opened, the key epoch has changed."""


class Coordinator:
    """One run of one federation."""

    def __init__(self, settings: ServerSettings, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin a run, or go on with the one in `settings.state_dir`.

        Args:
            settings: of the run.
            clock: seconds, monotonic; deadlines are counted in it.

        Raises:
            StateError: the state is in use, damaged, or of a run with other terms.
        """
        self.settings = settings
        self._clock = clock
        self._lock = threading.RLock()
        self._listeners: list[Callable[[Topic], None]] = []
        self._blobs = Blobs(settings.state_dir, durable=settings.durable)
        try:
            self._open_run(settings)
        except BaseException:
            self._blobs.close()
            raise

    def _open_run(self, settings: ServerSettings) -> None:
        self._store = Store(settings.store_url or default_url(settings.state_dir), durable=settings.durable)
        self._store.hold(self._blobs.mark(MARK) if settings.store_url else None)
        self._account = Account(settings.state_dir, self._store)
        plaintext = not settings.encrypted  # whoever built the settings has asked for it by name
        self._aggregator = create_aggregator(settings.encryption, settings.policy, allow_plaintext=plaintext)
        self.run_id = open_run(settings, self._store, new=self._blobs.empty)
        self._head = stored_head(self._store, self.run_id)
        self._rosters = Rosters(self._store)
        self._rosters.take_up(settings, fixed=self._store.get(PARTITION_FORMED) is not None)
        self._admission = Admission(settings, self.run_id, self._aggregator, self._rosters.known)
        self._keys = KeyRelay(settings, self._store, self._clock()) if settings.encrypted else None
        self._round = resume_round(settings, self._store, self._keys, self._clock())
        self._sums: RunSums | None = None
        if settings.group_sums is not None:
            self._sums = RunSums(settings, self._store, self._blobs, self.run_id, self._round.number)

    def subscribe(self, listener: Callable[[Topic], None]) -> None:
        """Call `listener`, from any thread, whenever somebody who waits should look again."""
        self._listeners.append(listener)

    def _changed(self, topic: Topic) -> None:
        for listener in self._listeners:
            listener(topic)

    @property
    def available_round(self) -> int:
        """The round that can be pulled; 0 while one is being aggregated."""
        state = self._round
        return 0 if state.phase is Phase.CLOSED else state.number

    def renew(self, settings: ServerSettings) -> bool:
        """Go on under another roster of the same terms. Its members enrol again before they do anything else.

        Args:
            settings: with the new roster. What the server's operator decides stays as it was.

        Returns:
            False while a round is being aggregated: ask again. When the run is over, nothing changes.

        Raises:
            IdentityError: the roster cannot follow on the present one.
            StateError: the run's roster is fixed, or a member has another family on the new one.
        """
        with self._lock:
            if self._round.phase is not Phase.OPEN:
                return self._round.phase is Phase.FINISHED
            settings = under_roster(self.settings, settings)
            fixed = self._store.get(PARTITION_FORMED) is not None
            if self._rosters.take_up(settings, fixed=fixed):
                self.settings = settings
                self._admission = Admission(settings, self.run_id, self._aggregator, self._rosters.known)
                self._round = resume_round(settings, self._store, self._keys, self._clock())
                if self._sums is not None:
                    self._sums = RunSums(settings, self._store, self._blobs, self.run_id, self._round.number)
        for topic in get_args(Topic):
            self._changed(topic)
        return True

    def _seen(self, client: str) -> None:
        self._admission.check_member(client)
        with self._lock:
            self._rosters.check(client)
            self._round = self._round.seen(client)

    @property
    def _epoch(self) -> int:
        return self._keys.epoch if self._keys is not None else 0

    def enrol(self, client_id: str, enrolment: Enrolment) -> Enrolled:
        """Check that a client speaks of the same federation, and tell where the run is.

        A client that only checks is not counted as present: it may have to load its model first, or be told
        that something there is wrong.
        """
        with self._lock:
            self._admission.check_enrolment(client_id, enrolment)
            if not enrolment.check_only:
                self._rosters.enrolled(client_id)
                self._round = self._round.seen(client_id)
                self._store.enrol(client_id, enrolment, time.time())
                log.info("%s enrolled (%s)", client_id, enrolment.software)
            members, kept = tuple(sorted(self.settings.members)), self._store.ledger_head(client_id)
            here, last = self._round.number, self.settings.rounds
            return Enrolled(self.run_id, here, last, self._epoch, members, self._head, kept)

    def announce(self, client_id: str, header: UploadHeader) -> Receipt | Ticket:
        """Judge an upload by its header, before a byte of its payload is accepted.

        Returns:
            A ticket if the payload is wanted, or the final answer if not.
        """
        with self._lock:
            self._rosters.check(client_id)  # before the signature, whose key another roster may change
            content_hash = self._admission.check_upload(client_id, header)
            self._seen(client_id)
            _, answer = self._judge(client_id, header, content_hash)
            if answer is not ReceiptStatus.ACCEPTED:
                return self._receipt(client_id, header, answer, content_hash)
            if header.sections:
                check_key_epoch(self._keys, header)
            spool = self._blobs.spool(client_id, content_hash)
        received = min(spool.stat().st_size, header.size) if spool.exists() else 0
        return Ticket(spool, received, header.size, content_hash)

    def commit(
        self, client_id: str, header: UploadHeader, ticket: Ticket, received_bytes: int | None = None
    ) -> Receipt:
        """Check the payload that has arrived in the ticket's spool file, and store the upload.

        Args:
            client_id: who sent it.
            header: as announced.
            ticket: from `announce`.
            received_bytes: what the transport counted; the payload's size by default.
        """
        try:
            self._admission.check_payload(client_id, header, ticket.spool)
        except Refusal:
            ticket.spool.unlink(missing_ok=True)
            raise
        with self._lock:
            self._seen(client_id)  # another roster may have come since it was announced
            state, answer = self._judge(client_id, header, ticket.content_hash)
            if answer is ReceiptStatus.ACCEPTED:
                if header.sections:
                    check_key_epoch(self._keys, header)
                    self._blobs.adopt(ticket.spool, header.round, client_id)
                size = header.size if received_bytes is None else received_bytes
                self._store.add_upload(client_id, header, ticket.content_hash, time.time(), size)
                self._round = state
            else:
                ticket.spool.unlink(missing_ok=True)
            receipt = self._receipt(client_id, header, answer, ticket.content_hash)
        self._changed("upload")
        return receipt

    def push(self, client_id: str, upload: Upload) -> Receipt:
        """Take a whole upload at once; see `announce` and `commit`."""
        header = upload.header()
        ticket = self.announce(client_id, header)
        if isinstance(ticket, Receipt):
            return ticket
        with open(ticket.spool, "wb", opener=private_opener) as file:
            file.writelines(section.payload for section in upload.sections)
        return self.commit(client_id, header, ticket)

    def _judge(
        self, client: str, header: UploadHeader, content_hash: bytes
    ) -> tuple[rounds.Round, ReceiptStatus]:
        stored = self._store.content_hash(header.round, client)
        # In group sums what counts went before the upload, which carries the profile alone.
        contributes = bool(header.sections) or self._sums is not None
        state, status = self._round.judged(
            client, header.round, content_hash, stored, contributes=contributes
        )
        if isinstance(status, rounds.Rejected):
            kind = RefusalKind.CONFLICT if stored is not None else RefusalKind.PRECONDITION
            raise Refusal(kind, status.reason, status.message, status.remedy)
        if status is ReceiptStatus.ACCEPTED:
            self._admission.check_ledger(header, self._store.ledger_head(client))
        return state, status

    def _receipt(
        self, client: str, header: UploadHeader, status: ReceiptStatus, content_hash: bytes
    ) -> Receipt:
        if status is ReceiptStatus.ACCEPTED:
            taken = f"upload of {client} accepted ({header.size} bytes)"
            log.info("%s; %s", taken if header.sections else f"{client} abstains", self.state_line())
        else:
            answer = f"upload of {client} answered {status.name}; round {self._round.number} is open"
            log.info("round %d: %s", header.round, answer)
        return Receipt(status, self._round.number, content_hash, self._head)

    def open_download(self, client_id: str, round_number: int) -> Download | None:
        """What a client may load before the open round; None while that is below `round_number`."""
        self._admission.check_round(round_number)
        self._seen(client_id)
        try:
            # A round opens, and files of the one before are removed, only under the lock.
            with self._lock:
                download = self._read_download(client_id, round_number)
            if download is None or download.whole:
                return download
            log.error("the aggregate of %s for round %d is damaged", client_id, download.aggregate.round)
        except MissingBlobError as error:
            log.error("%s", error)
        with self._lock:
            parts = self.settings, self._store, self._blobs, self._aggregator
            repair_aggregate(*parts, self.available_round, client_id)
            return self._read_download(client_id, round_number)

    def _read_download(self, client: str, round_number: int) -> Download | None:
        here = self.available_round
        if here < round_number:
            return None
        return read_download(self.settings, self._store, self._blobs, client, here, self._epoch, self._head)

    def pull(self, client_id: str, round_number: int) -> Aggregate | None:
        """The aggregate with its payloads in memory; see `open_download`."""
        download = self.open_download(client_id, round_number)
        if download is None or not download.payloads:
            return None if download is None else download.aggregate
        pairs = zip(download.aggregate.sections, download.payloads, strict=True)
        sections = tuple(replace(section, payload=bytes(payload)) for section, payload in pairs)
        self.count_traffic(client_id, 0, sum(len(payload) for payload in download.payloads))
        return replace(download.aggregate, sections=sections)

    def status(self, client_id: str) -> RoundStatus:
        """What the server is waiting for."""
        self._admission.check_member(client_id)
        return self.describe()

    def describe(self) -> RoundStatus:
        """What the server is waiting for, for whoever may know it."""
        with self._lock:
            now = self._clock()
            status = replace(self._round.status(now), head=self._head)
            if self._keys is None or self._keys.ready or self._round.phase is not Phase.OPEN:
                return status
            waiting, left, text = self._keys.describe(self._round.members - self._round.absent, now)
            message = rounds.one_line(f"round {self._round.number}: {text}")
            return replace(status, waiting_for=waiting, seconds_left=left, message=message)

    def state_line(self) -> str:
        """`describe` for the log; whatever is wrong with the line, it stops no round and no answer."""
        try:
            return self.describe().message
        except Exception:
            log.exception("round %d cannot be described", self._round.number)
            return f"round {self._round.number}"

    def advance(self) -> bool:
        """Let time pass: extend a deadline, or close and aggregate the round.

        Returns:
            Whether something changed that a waiting client should see.

        Raises:
            FedMosaicError: the round could not be aggregated; it stays open and can be tried again.
            StoreTakenError: another server has taken the database over; this one has to stop.
        """
        self._store.check_hold()
        with self._lock:
            keys_changed = self._advance_keys()
            if self._sums is not None:
                keys_changed |= self._sums.advance(self._round.members - self._round.absent, self._clock())
            before = self._round
            if self._keys is None or self._keys.ready:
                self._round = before.ticked(self._clock())
            after = self._round
        closing, extended = after.phase is not before.phase, after.extensions > before.extensions
        if extended:
            log.warning("%s", after.extended())
        if closing:
            self._close(after.number)
        self._account.keep_up(self.summary)
        if closing:
            self._changed("round")
        if keys_changed:
            self._changed("keys")
        return keys_changed or closing or extended

    def _advance_keys(self) -> bool:
        if self._keys is None or self._round.phase is Phase.FINISHED:
            return False
        return self._keys.advance(self._round.members - self._round.absent, self._clock())

    def _close(self, number: int) -> None:
        log.info("%s", self.state_line())
        try:
            closed = close_round(self.settings, self._store, self._blobs, self._aggregator, number)
            with self._lock:
                self._open_next(number, closed)
        except DamagedUploadsError as error:
            self._ask_again(number, error)
            return
        except BaseException:
            with self._lock:
                if self._round.number == number:
                    self._round = replace(self._round, phase=Phase.OPEN)
            raise
        for line in closed.refusals:
            log.warning("%s", line)
        log.info("%s", self.state_line())

    def _ask_again(self, number: int, damaged: DamagedUploadsError) -> None:
        """Open the round again for those whose upload this server has lost; they have it still."""
        with self._lock:
            self._round = replace(self._round, phase=Phase.OPEN)
            self._store.drop_uploads(number, damaged.clients)
            self._round = self._round.reopened(damaged.clients, self._clock() + _SECONDS_TO_SEND_AGAIN)
        log.error("%s. They are asked to send it again, for %.0f s", damaged, _SECONDS_TO_SEND_AGAIN)

    def _open_next(self, number: int, closed: ClosedRound) -> None:
        """Close a round and open the next, with the key epoch that is due for it, in one transaction."""
        now = self._clock()
        if self._sums is not None:
            self._sums.close_round(number)
        state = self._round.following(now)
        opening = next_round(self._store, self._keys, self._round, state, closed.aggregates, self._head, now)
        result = {**closed.result, "closed_at": time.time(), "extensions": self._round.extensions}
        key_epoch = 0 if opening.keys is None else opening.keys.epoch
        self._store.close_round(number, result, closed.aggregates, opening.metadata, key_epoch=key_epoch)
        self._round, self._head, self._account.due = state, opening.head, True
        if self._sums is not None:
            self._sums.open_round(state.number, now)
        if self._keys is not None and opening.keys is not None:
            self._keys.adopt(opening.keys)
        self._blobs.remove_before("aggregates", state.number)
        self._blobs.remove_before("uploads", number)

    def report(self, client_id: str, statement: bytes) -> None:
        """Store a client's privacy statement, if it is about this client, this run and this roster alone."""
        self._admission.check_statement(client_id, statement)
        with self._lock:
            self._store.add_report(client_id, statement, time.time())
            self._account.due = True

    def post_key_message(self, client_id: str, message: KeyMessage) -> None:
        """Relay a message of the key agreement, or take one of a sum; the first in its place counts."""
        with self._lock:
            self._seen(client_id)
            if self._sums is not None and is_sum_step(message.stage):
                self._sums.post(client_id, message.epoch, message.stage, message.payload)
                self._sums.advance(self._round.members - self._round.absent, self._clock())
                self._changed("keys")
                return
            keys = required(self._keys, self.settings)
            was_ready, held, now = keys.ready, keys.holders, self._clock()
            unused = self._round.phase is Phase.OPEN and not self._round.arrived
            keys.post(client_id, message, now, unused=unused)
            if keys.ready and not was_ready:
                self._round = self._round.key_agreed(keys.holders, now)
            elif keys.ready and keys.holders != held:
                self._round = self._round.key_lost(client_id)
        self._changed("keys")

    def read_key_messages(self, client_id: str, epoch: int, stage: str) -> dict[str, bytes]:
        """Messages of a stage that a client may read, by sender; empty while they are not open yet."""
        with self._lock:
            self._seen(client_id)
            if self._sums is not None and is_sum_step(stage):
                return self._sums.read(client_id, epoch, stage)
            return required(self._keys, self.settings).read(client_id, epoch, stage)

    def count_traffic(self, client_id: str, received: int, sent: int) -> None:
        """Add to the bytes that were received from and sent to a client."""
        self._account.count(client_id, received, sent)

    def summary(self) -> Mapping[str, object]:
        """Relevance, weights, refusals, traffic and statements of the run; JSON-compatible."""
        with self._lock:
            self._account.flush()
            return summarise(self.settings, self._store, self._round)

    def silent_members(self) -> tuple[str, ...] | None:
        """Who took part and has not handed over a statement, once all rounds are over; None before."""
        if self._round.phase is not Phase.FINISHED:
            return None
        present = self._store.enrolled() & self.settings.members.keys()
        return tuple(sorted(present - self._store.reports().keys()))

    def last_words(self) -> tuple[list[str], bool]:
        """What to say when the run is over, and whether anybody received anything."""
        return last_words(self.settings, self._store)

    def close(self) -> None:
        """Write the summary, as far as that is possible, and let go of the state."""
        self._account.due = True
        self._account.keep_up(self.summary)
        self._store.close()
        self._blobs.close()
