"""The server without its network: every request of a client as a method, safe to call from many threads.

The gRPC service and in-process simulations call the same methods, which raise `Refusal` with what is wrong.
Nothing here waits: `pull` answers None while a round is not open, and `advance` lets time pass.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Self, get_args

from fedmosaic.privacy.files import private_opener
from fedmosaic.protos.errors import StateError
from fedmosaic.protos.messages import (
    Aggregate,
    Enrolled,
    Enrolment,
    KeyMessage,
    Phase,
    Receipt,
    RoundStatus,
    Upload,
    UploadHeader,
)
from fedmosaic.server.admission import Admission
from fedmosaic.server.keys.relay import required
from fedmosaic.server.round.aggregates import Download
from fedmosaic.server.rounds import Rounds
from fedmosaic.server.run import Run, Topic
from fedmosaic.server.settings import ServerSettings
from fedmosaic.server.storage.blobs import MissingBlobError
from fedmosaic.server.storage.store import StoreTakenError
from fedmosaic.server.summary import FILE, last_words
from fedmosaic.server.sums import is_sum_step
from fedmosaic.server.uploads import Ticket, Uploads

log = logging.getLogger(__name__)


class Coordinator:
    """One run of one federation."""

    def __init__(self, settings: ServerSettings, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin a run, or go on with the one in `settings.state_dir`; deadlines are in seconds of `clock`.

        StateError if the state is in use, damaged, or of a run with other terms.
        """
        self._run = Run(settings, clock)
        self.run_id = self._run.run_id
        self.audit, self.witnessing, self.traces = self._run.audit, self._run.witnessing, self._run.traces
        self.describe, self.state_line = self._run.describe, self._run.state_line
        self._take_up(settings)
        self._rounds.go_on()

    def _take_up(self, settings: ServerSettings) -> None:
        run = self._run
        self._admission = Admission(settings, self.run_id, run.aggregator, run.rosters.known)
        self._uploads = Uploads(run, self._admission)
        self._rounds = Rounds(run)
        self.settings = settings  # last: calls that wait look at it, and then ask again

    def subscribe(self, listener: Callable[[Topic], None]) -> None:
        """Call `listener`, from any thread, whenever somebody who waits should look again."""
        self._run.listeners.append(listener)

    def unsubscribe(self, listener: Callable[[Topic], None]) -> None:
        """Call this listener no more."""
        self._run.listeners.remove(listener)

    @property
    def available_round(self) -> int:
        """The round that can be pulled; 0 while one is being aggregated."""
        state = self._run.round
        return 0 if state.phase is Phase.CLOSED else state.number

    def taking_part(self, number: int) -> frozenset[str]:
        """See `Run.taking_part`."""
        return self._run.taking_part(number)

    def renew(self, settings: ServerSettings) -> bool:
        """Go on under another roster of the same terms. Its members enrol again before they do anything else.

        What the server's operator decides stays as it was, and all of it once the run is over. False while a
        round is being aggregated: ask again.

        Raises:
            IdentityError: the roster cannot follow on the present one.
            StateError: the run's roster is fixed, or a member has another family on the new one.
        """
        run = self._run
        with run.lock:
            if run.round.phase is not Phase.OPEN:
                return run.round.phase is Phase.FINISHED
            before = self.settings.roster_hash.hex()
            settings = self.settings.model_copy(update={"roster": settings.roster})
            if run.renew(settings):
                self.audit.add("roster", before=before, after=settings.roster_hash.hex())
                self._take_up(settings)
        for topic in get_args(Topic):
            run.changed(topic)
        return True

    def _seen(self, client: str) -> None:
        self._admission.check_member(client)
        self._run.rosters.check(client)
        self._run.seen(client)

    def enrol(self, client_id: str, enrolment: Enrolment) -> Enrolled:
        """Check that a client speaks of the same federation, and tell where the run is.

        A client that only checks is not counted as present: it may have to load its model first, or be told
        that something there is wrong.
        """
        run = self._run
        with run.lock:
            self._admission.check_enrolment(client_id, enrolment)
            if not enrolment.check_only:
                run.rosters.enrolled(client_id)
                run.seen(client_id)
                run.store.enrol(client_id, enrolment, time.time())
                log.info("%s enrolled (%s)", client_id, enrolment.software)
                self.audit.add("enrolled", client=client_id, run=self.run_id, round=run.round.number)
            members, kept = tuple(sorted(self.settings.members)), run.store.ledger_head(client_id)
            here, last = run.round.number, self.settings.terms.schedule.rounds
            epoch = run.keys.epoch if run.keys else 0
            return Enrolled(self.run_id, here, last, epoch, members, run.position.head, kept)

    def announce(self, client_id: str, header: UploadHeader) -> Receipt | Ticket:
        """Judge an upload by its header: a ticket if the payload is wanted, or the final answer."""
        return self._uploads.announce(client_id, header)

    def commit(
        self, client_id: str, header: UploadHeader, ticket: Ticket, received_bytes: int | None = None
    ) -> Receipt:
        """Check the payload that has arrived in the ticket's spool file, and store the upload.

        `received_bytes` is what the transport counted; the payload's size by default.
        """
        receipt = self._uploads.commit(client_id, header, ticket, received_bytes)
        self._run.changed("upload")
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

    def arrive(self, client_id: str, round_number: int) -> None:
        """A client is about to ask for what it may load before a round."""
        self._admission.check_round(round_number)
        self._seen(client_id)

    def open_download(self, client_id: str, round_number: int) -> Download | None:
        """What a client may load before the open round, unchecked; None while that is below `round_number`.

        Takes no lock and waits for nobody. Where it is not whole, or MissingBlobError says that a file is
        missing, `repaired` is what is called next.
        """
        run, here = self._run, self._run.position
        if here.round.phase is Phase.CLOSED or here.round.number < round_number:
            return None
        epoch = run.keys.epoch if run.keys else 0
        return here.offer.download(self.settings, run.blobs, client_id, epoch, here.head)

    def repaired(self, client_id: str, round_number: int) -> Download | None:
        """What a client may load, made anew where it is damaged; see `open_download`."""
        try:
            download = self.open_download(client_id, round_number)
            if download is None or download.whole:
                return download
            log.error("the aggregate of %s for round %d is damaged", client_id, download.aggregate.round)
        except MissingBlobError as error:
            log.error("%s", error)
        self._rounds.repair(client_id)
        return self.open_download(client_id, round_number)

    def pull(self, client_id: str, round_number: int) -> Aggregate | None:
        """The aggregate with its payloads in memory; see `open_download`."""
        self.arrive(client_id, round_number)
        download = self.repaired(client_id, round_number)
        if download is None:
            return None
        pairs = zip(download.aggregate.sections, download.payloads, strict=True)
        sections = tuple(replace(section, payload=bytes(payload)) for section, payload in pairs)
        self.count_traffic(client_id, 0, download.size)
        return replace(download.aggregate, sections=sections)

    def status(self, client_id: str) -> RoundStatus:
        """What the server is waiting for."""
        self._admission.check_member(client_id)
        return self.describe()

    def move(self) -> bool:
        """Let time pass: extend a deadline, or close and aggregate the round; whether clients should look.

        `tidy` is what is to be called next, once those who wait have their answers.

        Raises:
            FedMosaicError: the round could not be aggregated; it stays open and can be tried again.
            StoreTakenError: another server has taken the database over; this one has to stop.
        """
        return self._rounds.advance()

    def tidy(self) -> None:
        """Write about the run what is due, and remove what nobody asks for any more."""
        self._rounds.tidy()
        self._run.account.show(self._run.describe)

    def advance(self) -> bool:
        """Both, one after the other; see `move`."""
        moved = self.move()
        self.tidy()
        return moved

    def report(self, client_id: str, statement: bytes) -> None:
        """Store a client's privacy statement, if it is about this client, this run and this roster alone."""
        self._admission.check_statement(client_id, statement)
        with self._run.lock:
            self._run.store.add_report(client_id, statement, time.time())
            self._run.account.due = True

    def post_key_message(self, client_id: str, message: KeyMessage) -> None:
        """Relay a message of the key agreement, or take one of a sum; the first in its place counts."""
        run = self._run
        with run.lock:
            self._seen(client_id)
            now = run.clock()
            if run.sums is not None and is_sum_step(message.stage):
                run.sums.post(client_id, message.epoch, message.stage, message.payload)
                run.sums.advance(run.round.members - run.round.absent, now)
            else:
                keys = required(run.keys, self.settings)
                was_ready, held = keys.ready, keys.holders
                unused = run.round.phase is Phase.OPEN and not run.round.arrived
                # Who needs the key that it has lost in neither this round nor the next gets one at its turn.
                unused &= not keys.ready or client_id in run.round.needing_key
                keys.post(client_id, message, now, unused=unused)
                if keys.ready and not was_ready:
                    self.audit.add("key-epoch", epoch=keys.epoch, members=tuple(sorted(keys.holders)))
                    run.round = run.round.key_agreed(keys.holders, now)
                elif keys.ready and keys.holders != held:
                    run.round = run.round.key_lost(client_id)
        run.changed("keys")

    def read_key_messages(self, client_id: str, epoch: int, stage: str) -> dict[str, bytes]:
        """Messages of a stage that a client may read, by sender; empty while they are not open yet."""
        run = self._run
        with run.lock:
            self._seen(client_id)
            if run.sums is not None and is_sum_step(stage):
                return run.sums.read(client_id, epoch, stage)
            return required(run.keys, self.settings).read(client_id, epoch, stage)

    def fewer_key_messages(self, client_id: str, epoch: int, stage: str, count: int) -> bool:
        """Whether `read_key_messages` need not be asked yet by whoever waits for so many; takes no lock."""
        keys = self._run.keys
        return keys is not None and keys.fewer(client_id, epoch, stage, count)

    def count_traffic(self, client_id: str, received: int, sent: int) -> None:
        """Add to the bytes that were received from and sent to a client."""
        self._run.account.count(client_id, received, sent)

    def summary(self) -> Mapping[str, object]:
        """Relevance, weights, refusals, traffic and statements of the run; JSON-compatible."""
        return self._run.account.whole(self._run.round)

    def silent_members(self) -> tuple[str, ...] | None:
        """Who took part and has not handed over a statement, once all rounds are over; None before."""
        store = self._run.store
        if self._run.round.phase is not Phase.FINISHED:
            return None
        present = store.enrolled() & self.settings.members.keys()
        return tuple(sorted(present - store.reports().keys()))

    def last_words(self) -> tuple[list[str], bool]:
        """What to say when the run is over, and whether anybody received anything."""
        return last_words(self.settings, self._run.store)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Close; where an error is on its way, that of closing is logged and does not take its place."""
        try:
            self.close()
        except (StateError, OSError) as late:
            if error is None:
                raise
            log.error("%s", late)

    def close(self) -> None:
        """Write the account and let go of the state; StateError if what is written is older than the run."""
        account = self._run.account
        account.due = True
        try:
            account.keep_up(self._run.round)
        finally:
            self._run.close()
        if account.failure is not None and not isinstance(account.failure, StoreTakenError):
            raise StateError(
                f"{self.settings.state_dir / FILE} is older than the run, since it could not be written "
                f"({account.failure}): start the server again, which writes it anew; nothing else is lost"
            )
