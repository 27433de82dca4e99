"""`fedmosaic witness CONFIG`: see that a server keeps to its weights.

Asks the server for each round that waits, has `WitnessBook` judge it, and answers. It sees
ciphertexts, rows and signatures.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import tyro
from pydantic import Field

from fedmosaic.client.settings import Located
from fedmosaic.client.transport.connection import Patience, open_channel
from fedmosaic.privacy.audit import AuditLog
from fedmosaic.privacy.configuration import read_configuration
from fedmosaic.privacy.federation.identity import public_hex
from fedmosaic.privacy.federation.kits import Kit, open_kit
from fedmosaic.privacy.federation.names import Address
from fedmosaic.privacy.federation.witness import WitnessBook
from fedmosaic.privacy.files import hold_directory, private_directory
from fedmosaic.protos import wire
from fedmosaic.protos.errors import IdentityError, WireError
from fedmosaic.protos.messages import Phase, RoundStatus
from fedmosaic.protos.refusal import Refusal
from fedmosaic.protos.v1 import federation_pb2 as pb
from fedmosaic.protos.v1 import federation_pb2_grpc as rpc
from fedmosaic.protos.witnessing import AggregateClaim, ReviewHeader, SignedUpload, Verdict

log = logging.getLogger("fedmosaic.client.witness")
_WAIT_SECONDS: Final = 25.0
_CALL_SECONDS: Final = 600.0
_SHORTEST_POLL_SECONDS: Final = 0.5


class WitnessSettings(Located):
    """Everything the witness decides for itself. Paths are relative to the file."""

    kit: Path
    """The directory of your keys, with the certificate and roster that the consortium signed."""
    server: Address
    """Host and port of the federation's server."""
    state_dir: Path
    """Directory of what was judged, and of the audit log."""
    retry_seconds: float = Field(default=3600.0, gt=0.0, le=1e9)
    """Give up when the server could not be reached for so long."""


@dataclass
class Review:
    """A round as the server shows it; or, while none waits, what the server waits for."""

    status: RoundStatus | None = None
    header: ReviewHeader | None = None
    uploads: dict[str, tuple[SignedUpload, bytearray]] = field(default_factory=dict)
    claims: list[AggregateClaim] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether all that was announced has come."""
        head = self.header
        return head is not None and (len(self.uploads), len(self.claims)) == (head.uploads, head.aggregates)


def receive(parts: Iterable[pb.ReviewResponse], book: WitnessBook) -> Review:
    """Read an answer of the server, and no more of it than the terms and its announcement allow.

    WireError, EncryptionError or IdentityError if a piece is out of place, too large, or of no member.
    """
    review, payload, size = Review(), bytearray(), 0
    for part in parts:
        if part.HasField("waiting"):
            review.status = wire.decode(part.waiting, RoundStatus)
        elif part.HasField("header"):
            review.header = wire.decode(part.header, ReviewHeader)
        elif part.HasField("upload"):
            signed = wire.decode(part.upload, SignedUpload)
            book.check_size(signed)
            payload, size = bytearray(), sum(section.size for section in signed.sections)
            review.uploads[signed.client] = signed, payload
        elif part.HasField("chunk"):
            wire.check_chunk(part.chunk, len(payload), size)
            payload += part.chunk.data
        else:
            review.claims.append(wire.decode(part.aggregate, AggregateClaim))
        if review.header is not None and len(review.claims) > review.header.aggregates:
            raise WireError(f"more than the announced {review.header.aggregates} aggregates came")
    return review


def run(settings: WitnessSettings) -> tuple[int, int]:
    """Witness a run until its last round.

    Returns:
        How many aggregates were countersigned, and how many were refused.

    Raises:
        IdentityError: the kit is not the witness's.
        StateError: the state is in use or damaged, or the server is an older copy of itself.
        TransportError: the server could not be reached for `retry_seconds`.
        WireError: what the server sends is no review.
    """
    kit = _own_kit(settings.kit)
    private_directory(settings.state_dir)
    patience, signed, refused, judged, told = Patience(settings.server, settings.retry_seconds), 0, 0, 0, ""
    with ExitStack() as held:
        held.enter_context(hold_directory(settings.state_dir / "lock", "give the witness its own state_dir"))
        audit = held.enter_context(closing(AuditLog(settings.state_dir)))
        about = {"federation": kit.roster.federation, "roster": kit.roster.hash.hex()}
        audit.add("started", role="witness", name=kit.member_id(), **about)
        while True:
            kit = _own_kit(settings.kit)  # certificate and roster may have been renewed
            book = WitnessBook(kit.roster, kit.signing_key(), settings.state_dir, audit)
            asked = time.monotonic()
            with open_channel(settings.server, kit.authority, kit.tls_certificate, kit.tls_key) as channel:
                stub = rpc.WitnessStub(channel)
                review = patience.retry("review", lambda: _review(stub, book))  # noqa: B023
                verdicts: list[Verdict] = []
                if review.header is not None and review.complete:
                    verdicts = book.judge(review.header, review.uploads, review.claims)
                for verdict in verdicts:
                    _answer(stub, patience, verdict)
                    signed, refused = signed + (not verdict.refusal), refused + bool(verdict.refusal)
            if review.header is not None and verdicts:
                good = sum(not verdict.refusal for verdict in verdicts)
                log.info("round %d: %d of %d countersigned", review.header.round, good, len(verdicts))
                if review.header.round > judged:
                    judged = review.header.round
                    continue
            elif review.status is not None:
                if review.status.phase is Phase.FINISHED:
                    return signed, refused
                if review.status.message != told:
                    log.info("%s", review.status.message)
                told = review.status.message
            # A server that is stopping, or shows a round again, is asked no faster than this.
            time.sleep(max(0.0, _SHORTEST_POLL_SECONDS - (time.monotonic() - asked)))


def _own_kit(directory: Path) -> Kit:
    kit = open_kit(directory)
    witness = kit.roster.witness
    if witness is None or witness.identity_key != public_hex(kit.signing_key().public_key()):
        raise IdentityError(
            f"{directory} is not the kit of the witness that its roster names "
            f"({witness.id if witness else 'it names none'}); take the witness's own"
        )
    return kit


def _review(stub: rpc.WitnessStub, book: WitnessBook) -> Review:
    request = pb.ReviewRequest(wait_milliseconds=int(_WAIT_SECONDS * 1000))
    return receive(stub.Review(request, timeout=_CALL_SECONDS), book)


def _answer(stub: rpc.WitnessStub, patience: Patience, verdict: Verdict) -> None:
    request = wire.encode(verdict, pb.CountersignRequest)
    try:
        patience.retry("countersign", lambda: stub.Countersign(request, timeout=30.0))
    except Refusal as refusal:
        log.warning("round %d, %s: %s", verdict.round, verdict.recipient, refusal)


@dataclass(frozen=True)
class Arguments:
    """Recompute every aggregate of a federation from its signed uploads, and countersign what is right."""

    config: tyro.conf.Positional[Path]
    """The witness's configuration (TOML or JSON): kit, server, state_dir."""


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic witness` with its arguments; 1 says that something was not countersigned."""
    path = tyro.cli(Arguments, args=list(arguments), prog="fedmosaic witness").config
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(message)s", force=True)
    signed, refused = run(read_configuration(path, WitnessSettings).located(path.parent))
    print(f"{signed} aggregates countersigned, {refused} refused")
    return 1 if refused else 0
