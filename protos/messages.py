"""What crosses the border between a client and the server, as frozen data.

An instance holds its bounds, on the side that sends and on the side that receives. Whether it fits the run is
the coordinator's question. Fields have the names that they have in `federation.proto`.
"""

import dataclasses
import enum
import functools
import hashlib
import struct
from typing import Annotated, Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, FailFast, Field, PlainValidator
from pydantic.dataclasses import dataclass

from fedmosaic.protos import bounds
from fedmosaic.protos.errors import WireError
from fedmosaic.protos.v1 import federation_pb2 as pb

PROTOCOL_VERSION: Final = 3
"""Version of the wire; both sides must speak the same."""

NO_HEAD: Final = bytes(bounds.HASH_BYTES)
"""Head of no run, for answers that are not about one."""

SUM_STAGES: Final = "sum-"
"""What the stages of a secure sum begin with; such a message may fill a chunk."""

SectionName = Literal["shared", "family"]
SECTION_NAMES: Final[tuple[SectionName, ...]] = ("shared", "family")


class ReceiptStatus(enum.Enum):
    """What became of an upload."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    LATE = "late"


class Phase(enum.Enum):
    """Where a round is: taking uploads, being aggregated, or the last one done."""

    OPEN = "open"
    CLOSED = "closed"
    FINISHED = "finished"


@dataclass(frozen=True)
class Enrolment(bounds.Message):
    """What a client believes about the federation when it arrives.

    With `check_only` both sides are compared but nobody is enrolled: the client has not loaded its model yet.
    The anchor of its privacy ledger is signed over `fedmosaic.protos.signing.ledger_digest`; empty to have
    none kept.
    """

    protocol_version: Annotated[int, Field(strict=True, ge=0, le=2**32 - 1)]
    federation: bounds.Identifier
    roster_hash: bounds.Hash
    adapter_spec_hash: bounds.Hash
    family: bounds.Family
    software: Annotated[bounds.Text, Field(max_length=200)]
    check_only: Annotated[bool, Field(strict=True)] = False
    ledger_head: bounds.HashOrNothing = b""
    ledger_signature: bounds.SignatureOrNothing = b""

    def __post_init__(self) -> None:
        expected = bounds.SIGNATURE_BYTES if self.ledger_head else 0
        if len(self.ledger_signature) != expected:
            raise WireError(f"Enrolment.ledger_signature: {len(self.ledger_signature)} bytes, not {expected}")


@dataclass(frozen=True)
class Enrolled(bounds.Message):
    """Where the run is; its round is rounds + 1 once it is finished.

    `head` is a hash chain over all rounds below: it differs between a server and an older copy of it.
    `ledger_head` is what the server keeps of this client's privacy ledger.
    """

    run_id: bounds.RunId
    round: bounds.Round
    rounds: Annotated[int, Field(strict=True, ge=1, le=bounds.MAX_ROUNDS)]
    key_epoch: bounds.KeyEpoch
    members: bounds.Members
    head: bounds.Hash = NO_HEAD
    ledger_head: bounds.HashOrNothing = b""

    def __post_init__(self) -> None:
        if self.round > self.rounds + 1:
            raise WireError(f"Enrolled.round is {self.round}: expected at most {self.rounds + 1}")


def _profile_vector(value: object) -> npt.NDArray[np.float32]:
    """A read-only copy of a vector, which is little-endian float32 on the wire."""
    if isinstance(value, bytes):
        if len(value) % 4:
            raise WireError(f"profile.vector has {len(value)} bytes, expected a multiple of 4 (float32)")
        value = np.frombuffer(value, dtype="<f4").astype(np.float32)
    if not isinstance(value, np.ndarray) or value.dtype != np.float32 or value.ndim != 1:
        raise WireError("profile.vector has the wrong type, expected a one-dimensional float32 array")
    if not 1 <= value.size <= bounds.MAX_PROFILE_DIMENSIONS:
        raise WireError(f"profile.vector has {value.size} values, not 1 … {bounds.MAX_PROFILE_DIMENSIONS}")
    unusable = int(value.size - np.count_nonzero(np.isfinite(value)))
    if unusable:
        raise WireError(
            f"profile.vector has {unusable} of {value.size} values that are NaN or infinite, expected "
            "finite values: check the probe model's gradients on this client"
        )
    owned = np.array(value, dtype=np.float32)
    owned.flags.writeable = False
    return owned


@dataclass(frozen=True, eq=False)
class Profile(bounds.Message):
    """A sanitised task profile, (k,) float32, with the variance of its noise per coordinate."""

    vector: Annotated[npt.NDArray[np.float32], PlainValidator(_profile_vector)]
    noise_variance: Annotated[float, Field(strict=True, ge=0.0, le=3.4e38)]
    releases: Annotated[int, Field(strict=True, ge=1, le=bounds.MAX_RELEASES)]

    def digest(self) -> bytes:
        """SHA-256 over the vector (little-endian), its noise variance and number of releases."""
        head = struct.pack("<IdI", self.vector.size, self.noise_variance, self.releases)
        content = b"fedmosaic/profile/v1\x00" + head + self.vector.astype("<f4").tobytes()
        return hashlib.sha256(content).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Profile) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())


@dataclass(frozen=True)
class SectionHeader(bounds.Message):
    """A section as announced: its size in bytes and SHA-256, before a byte of it is sent.

    The size has no upper bound here: what is too large is for the server to refuse, with a reason.
    """

    name: SectionName
    size: Annotated[int, Field(strict=True, ge=1, le=2**64 - 1)]
    sha256: bounds.Hash


@dataclasses.dataclass(frozen=True)
class Section:
    """One part of the adapter, "shared" (P and Q) or "family" (other layers' LoRA), of a back end."""

    name: SectionName
    payload: bytes = dataclasses.field(repr=False)

    def header(self) -> SectionHeader:
        """Name, size and SHA-256."""
        return SectionHeader(self.name, len(self.payload), hashlib.sha256(self.payload).digest())


@dataclass(frozen=True)
class LedgerHead(bounds.Message):
    """How far a client's privacy ledger is, as anchors that only the client can read.

    `follows` is the one that the server kept before, and that the ledger was found to hold; empty if none.
    """

    head: bounds.Hash
    follows: bounds.HashOrNothing = b""


def _once_each(sections: tuple[Any, ...]) -> tuple[Any, ...]:
    if len({section.name for section in sections}) != len(sections):
        raise ValueError("every section may appear once")
    return sections


@dataclass(frozen=True)
class UploadHeader(bounds.Message):
    """An upload without its payloads; see `Upload`."""

    round: Annotated[int, Field(strict=True, ge=1, le=bounds.MAX_ROUNDS)]
    attempt_id: bounds.AttemptId
    key_epoch: bounds.KeyEpoch
    sections: Annotated[tuple[SectionHeader, ...], AfterValidator(_once_each)]
    profile: Profile | None
    signature: bounds.Signature
    ledger: LedgerHead | None = None

    @property
    def size(self) -> int:
        """Bytes of all sections together."""
        return sum(section.size for section in self.sections)


@dataclasses.dataclass(frozen=True)
class Upload:
    """What one client contributes to one round.

    A retry of the same bytes may keep or change the attempt's id. No sections mean "present, but contributes
    nothing", no profile that the last one goes on. The signature is over
    `fedmosaic.protos.signing.upload_digest`.
    """

    round: int
    attempt_id: str
    key_epoch: int
    sections: tuple[Section, ...]
    profile: Profile | None
    signature: bytes
    ledger: LedgerHead | None = None

    def header(self) -> UploadHeader:
        """The upload without its payloads; hashes every payload."""
        sections = tuple(section.header() for section in self.sections)
        return UploadHeader(
            self.round, self.attempt_id, self.key_epoch, sections, self.profile, self.signature, self.ledger
        )


@dataclass(frozen=True)
class Receipt(bounds.Message):
    """The server's answer to an upload, by its digest; `round` is the one that is open now."""

    status: ReceiptStatus
    round: bounds.Round
    content_hash: bounds.Hash
    head: bounds.Hash = NO_HEAD


@dataclass(frozen=True)
class WeightRow(bounds.Message):
    """What a recipient receives of a section: integer shares that sum to exactly 2**bits."""

    contributors: bounds.Identifiers
    weights: Annotated[tuple[Annotated[int, Field(strict=True, ge=0)], ...], FailFast()]
    bits: Annotated[int, Field(strict=True, ge=1, le=bounds.MAX_WEIGHT_BITS)]

    @functools.cached_property
    def encoded(self) -> bytes:
        """Serialised; the same rows are sent in every round that brings no new profile."""
        row = pb.WeightRow(contributors=self.contributors, weights=self.weights, bits=self.bits)
        return row.SerializeToString()

    @functools.cached_property
    def canonical(self) -> tuple[bytes, bytes]:
        """What digests are over: weights as little-endian uint32; names, each after a line break."""
        names = "".join(f"\n{name}" for name in self.contributors)
        return struct.pack(f"<{len(self.weights)}I", *self.weights), names.encode()

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.contributors):
            raise WireError(f"{len(self.weights)} weights for {len(self.contributors)} contributors")
        if sum(self.weights) != 1 << self.bits:
            raise WireError(f"weights sum to {sum(self.weights)}, expected exactly {1 << self.bits}")


@dataclass(frozen=True)
class AggregateSection(bounds.Message):
    """One part of what a recipient receives, with its weight row, or the reason why it receives none.

    Hash of the signed uploads and countersignature are the witness's, see `fedmosaic.protos.witnessing`.
    """

    name: SectionName
    row: WeightRow | None
    payload: Annotated[bytes, Field(strict=True)] = dataclasses.field(repr=False)
    refusal: bounds.Text = ""
    uploads_sha256: bounds.HashOrNothing = b""
    countersignature: bounds.SignatureOrNothing = b""

    def __post_init__(self) -> None:
        if (self.row is None) != bool(self.refusal):
            raise WireError(f"aggregate section {self.name!r} has a row and a refusal, or neither of them")
        if self.row is None and self.payload:
            raise WireError(f"aggregate section {self.name!r} is refused but has a payload")


@dataclass(frozen=True)
class Aggregate(bounds.Message):
    """What a client loads before it trains a round, made of the uploads of the round before.

    There are no sections in round 1. `key_epoch` is that of the uploads inside, `upload_key_epoch` that of
    the next.
    """

    round: bounds.Round
    sections: Annotated[tuple[AggregateSection, ...], AfterValidator(_once_each)]
    key_epoch: bounds.KeyEpoch
    upload_key_epoch: bounds.KeyEpoch
    head: bounds.Hash = NO_HEAD


@dataclass(frozen=True)
class RoundStatus(bounds.Message):
    """What the server is waiting for; the round is rounds + 1 once the run is finished."""

    round: bounds.Round
    phase: Phase
    arrived: bounds.Identifiers
    waiting_for: bounds.Members
    seconds_left: Annotated[float, Field(strict=True, ge=0.0, le=1e12)]
    message: bounds.Text
    head: bounds.Hash = NO_HEAD


@dataclass(frozen=True)
class KeyMessage(bounds.Message):
    """One message of a key agreement, sealed or signed, that the server relays; no recipient: everybody."""

    epoch: bounds.KeyEpoch
    stage: bounds.Stage
    recipient: Annotated[str, Field(strict=True, pattern=r"^([a-z0-9][a-z0-9-]{0,62})?$")]
    payload: bounds.KeyPayload = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        limit = bounds.MAX_CHUNK_BYTES if self.stage.startswith(SUM_STAGES) else bounds.MAX_KEY_PAYLOAD_BYTES
        if len(self.payload) > limit:
            raise WireError(
                f"KeyMessage.payload is {len(self.payload)} bytes: at most {limit} in {self.stage!r}"
            )


@dataclass(frozen=True)
class RelayedKeyMessage(bounds.Message):
    """A message of a key agreement, or of a sum, as its reader gets it."""

    sender: bounds.Identifier
    payload: bounds.KeyPayload = dataclasses.field(repr=False)


@dataclass(frozen=True)
class Report(bounds.Message):
    """A client's privacy statement: a JSON object, which the server checks further."""

    statement: Annotated[bytes, Field(strict=True, min_length=2, max_length=bounds.MAX_STATEMENT_BYTES)]
