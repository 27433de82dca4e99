"""A closed round that waits for its witness: what the witness is shown, what it said, and when it is over.

The aggregates are made and stored before, so that the witness's answer decides only whether they are handed
out. What it has not countersigned in time is withheld by name, and the run goes on.
"""

import hashlib
import logging
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

from fedmosaic.protos import bounds, wire
from fedmosaic.protos.messages import AggregateSection, RoundStatus, SectionName, UploadHeader
from fedmosaic.protos.refusal import Refusal, RefusalKind
from fedmosaic.protos.v1 import federation_pb2 as pb
from fedmosaic.protos.witnessing import AggregateClaim, ReviewHeader, SignedUpload, Verdict
from fedmosaic.server.round.aggregates import NOWHERE, Place, stored_aggregate
from fedmosaic.server.round.close import ClosedRound
from fedmosaic.server.settings import ServerSettings
from fedmosaic.server.storage.blobs import Blobs

log = logging.getLogger(__name__)
_Key = tuple[str, SectionName]


class Witnessing:
    """The aggregates of the closed round, until the witness has judged all or its time is over.

    Where the federation names no witness, nothing ever waits here.
    """

    def __init__(
        self, settings: ServerSettings, run_id: str, blobs: Blobs, answered: Callable[[], None]
    ) -> None:
        """Prepare; `answered` is called, from any thread, when the witness has said something."""
        self._witness = settings.roster.witness
        self._settings = settings
        self._run_id = run_id
        self._blobs = blobs
        self._answered = answered
        self._lock = threading.Lock()
        self._closed: ClosedRound | None = None
        self._number = 0
        self._deadline = 0.0
        self._uploaded: list[str] = []
        self._claims: dict[_Key, tuple[AggregateSection, Place]] = {}
        self._verdicts: dict[_Key, Verdict] = {}

    @property
    def waiting(self) -> bool:
        """Whether a closed round waits for a word of the witness."""
        return self._closed is not None and len(self._verdicts) < len(self._claims)

    def keep(self, client: str, header: UploadHeader) -> None:
        """Store beside an upload's payload what its client has signed."""
        if self._witness is not None:
            content = wire.encode(SignedUpload.of(client, header), pb.SignedUpload).SerializeToString()
            self._blobs.write("uploads", header.round, _signed(client), content)

    def due(self, number: int) -> bool:
        """Whether a round waits for a witness; what the last one makes is handed to nobody."""
        return self._witness is not None and number < self._settings.terms.schedule.rounds

    def begin(self, number: int, closed: ClosedRound, uploaded: Collection[str], now: float) -> None:
        """Begin to wait for the witness of a round that is `due`, in which `uploaded` shared something.

        `now` is in seconds, in the clock of all later calls.
        """
        claims = {
            (recipient, section.name): (section, place)
            for recipient in closed.offer.stored
            for section, place in closed.offer.sections(self._settings, recipient)
            if section.row is not None
        }
        with self._lock:
            self._closed, self._number, self._uploaded = closed, number, sorted(uploaded)
            self._claims, self._verdicts = claims, {}
            self._deadline = now + (self._witness.seconds if self._witness else 0.0)

    def parts(self) -> Iterator[pb.ReviewResponse]:
        """All that the witness needs, in pieces that each fit a message; nothing while nothing waits."""
        closed = self._closed
        if closed is None:
            return
        epoch = next((stored.key_epoch for stored in closed.offer.stored.values()), 0)
        head = ReviewHeader(self._run_id, self._number, epoch, len(self._uploaded), len(self._claims))
        yield pb.ReviewResponse(header=wire.encode(head, pb.ReviewHeader))
        for client in self._uploaded:
            signed = bytes(self._blobs.read("uploads", head.round, _signed(client)))
            yield pb.ReviewResponse(upload=pb.SignedUpload.FromString(signed))
            for chunk in wire.chunks([self._blobs.read("uploads", head.round, client)], 0):
                yield pb.ReviewResponse(chunk=chunk)
        for (recipient, name), (section, place) in self._claims.items():
            if section.row is not None:
                digest = hashlib.sha256(self._payload(place)).digest()
                claim = AggregateClaim(recipient, name, section.row, digest)
                yield pb.ReviewResponse(aggregate=wire.encode(claim, pb.AggregateClaim))

    def take(self, verdict: Verdict) -> None:
        """Note what the witness says of one aggregate, once; Refusal if that does not wait here."""
        key = verdict.recipient, verdict.section
        with self._lock:
            here = (verdict.run_id, verdict.round) == (self._run_id, self._number)
            if self._closed is None or not here or key not in self._claims:
                raise Refusal(
                    RefusalKind.PRECONDITION,
                    "NOT_UNDER_REVIEW",
                    f"the {verdict.section} aggregate of {verdict.recipient!r} of round {verdict.round} does "
                    "not wait for a countersignature",
                    "ask for the round that does",
                )
            self._verdicts.setdefault(key, verdict)
        if verdict.refusal:
            words = "round %d: NOT countersigned for %s: %s"
            log.error(words, verdict.round, verdict.recipient, verdict.refusal)
        self._answered()

    def describe(self, status: RoundStatus, now: float) -> RoundStatus:
        """A status, which tells of the witness while it is waited for."""
        if self._closed is None or self._witness is None:
            return status
        left, done = max(0.0, self._deadline - now), f"{len(self._verdicts)} of {len(self._claims)}"
        text = f"waiting for the witness {self._witness.id} to countersign, {done} done, {left:.0f} s left"
        return replace(status, seconds_left=left, message=f"round {self._number}: {text}")

    def result(self, now: float) -> tuple[int, ClosedRound] | None:
        """A round, once it waits no more, until `end`; what is not countersigned is withheld."""
        with self._lock:
            if self._closed is None or (self.waiting and now < self._deadline):
                return None
            verdicts, closed = dict(self._verdicts), self._closed
        stored, lines = {}, list(closed.refusals)
        for recipient, before in closed.offer.stored.items():
            parts, digest = [], hashlib.sha256()
            for section, place in closed.offer.sections(self._settings, recipient):
                verdict = verdicts.get((recipient, section.name))
                if section.row is not None and (verdict is None or verdict.refusal):
                    why, place = self._why(verdict), NOWHERE
                    section = AggregateSection(section.name, None, b"", why)
                    lines.append(f"{recipient} trains alone: {why}")
                elif verdict is not None:
                    uploads, signature = verdict.uploads_sha256, verdict.signature
                    section = replace(section, uploads_sha256=uploads, countersignature=signature)
                    digest.update(self._payload(place))
                parts.append((section, place))
            stored[recipient] = stored_aggregate(before.key_epoch, parts, digest.digest())
        offer = replace(closed.offer, stored=stored, made={})
        return self._number, replace(closed, offer=offer, refusals=lines)

    def end(self) -> None:
        """Wait for nothing any more."""
        with self._lock:
            self._closed = None

    def _why(self, verdict: Verdict | None) -> str:
        name = "" if self._witness is None else self._witness.id
        if verdict is None:
            return f"round {self._number}: the witness {name} did not countersign it in time"
        return f"round {self._number}: the witness {name} refused it: {verdict.refusal}"[: bounds.MAX_TEXT]

    def _payload(self, place: Place) -> memoryview:
        return self._blobs.read("aggregates", self._number + 1, place.blob, place.start, place.size)


def _signed(client: str) -> str:
    return f"{client}.signed"  # no client has a dot in its name
