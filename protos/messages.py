"""What crosses the border between a client and the server, as frozen data.

Every class checks its own bounds when it is made, on the side that sends and on the side that receives,
so that an instance is always well-formed. Whether it fits the run is the coordinator's question.
"""

import enum
import hashlib
import struct
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from fedmosaic.protos import bounds
from fedmosaic.protos.errors import WireError

PROTOCOL_VERSION: Final = 2
"""Version of the wire; both sides must speak the same."""

NO_HEAD: Final = bytes(bounds.HASH_BYTES)
"""Head of no run, for answers that are not about one."""

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
class Enrolment:
    """What a client believes about the federation when it arrives.

    Attributes:
        protocol_version: version of this wire that the client speaks.
        federation: id of the federation.
        roster_hash: SHA-256 of the canonical roster.
        adapter_spec_hash: SHA-256 of the adapter spec (rank, blocks, module names).
        family: architecture name as on the roster, or nothing.
        software: name and version of the client, for the server's log.
        check_only: compare both sides and answer, but enrol nobody: the client has not loaded its model yet.
        ledger_head: anchor of the client's privacy ledger, 32 bytes; empty to have none kept.
        ledger_signature: Ed25519 signature over `fedmosaic.protos.signing.ledger_digest`.
    """

    protocol_version: int
    federation: str
    roster_hash: bytes
    adapter_spec_hash: bytes
    family: str
    software: str
    check_only: bool = False
    ledger_head: bytes = b""
    ledger_signature: bytes = b""

    def __post_init__(self) -> None:
        bounds.check_integer("enrolment.protocol_version", self.protocol_version, 0, 2**32 - 1)
        bounds.check_identifier("enrolment.federation", self.federation)
        bounds.check_hash("enrolment.roster_hash", self.roster_hash)
        bounds.check_hash("enrolment.adapter_spec_hash", self.adapter_spec_hash)
        bounds.check_family("enrolment.family", self.family)
        bounds.check_text("enrolment.software", self.software, 200)
        if self.ledger_head or self.ledger_signature:
            bounds.check_hash("enrolment.ledger_head", self.ledger_head)
            length = bounds.SIGNATURE_BYTES
            bounds.check_bytes("enrolment.ledger_signature", self.ledger_signature, length, length)


@dataclass(frozen=True)
class Enrolled:
    """Where the run is.

    Attributes:
        run_id: 32 hexadecimal digits, made by the server when the run began.
        round: the open round, 1 … rounds, or rounds + 1 once the run is finished.
        rounds: how many rounds the run has.
        key_epoch: epoch that an upload of `round` must use.
        members: ids of all members of the roster, sorted.
        head: hash chain over all rounds below `round`: it differs between a server and an older copy of it.
        ledger_head: what the server keeps of this client's privacy ledger; empty if nothing.
    """

    run_id: str
    round: int
    rounds: int
    key_epoch: int
    members: tuple[str, ...]
    head: bytes = NO_HEAD
    ledger_head: bytes = b""

    def __post_init__(self) -> None:
        bounds.check_hash("enrolled.head", self.head)
        if self.ledger_head:
            bounds.check_hash("enrolled.ledger_head", self.ledger_head)
        bounds.check_run_id("enrolled.run_id", self.run_id)
        bounds.check_integer("enrolled.rounds", self.rounds, 1, bounds.MAX_ROUNDS)
        bounds.check_integer("enrolled.round", self.round, 1, self.rounds + 1)
        bounds.check_integer("enrolled.key_epoch", self.key_epoch, 0, bounds.MAX_KEY_EPOCH)
        bounds.check_unique("enrolled.members", self.members, bounds.MAX_MEMBERS)
        for member in self.members:
            bounds.check_identifier("enrolled.members", member)


@dataclass(frozen=True, eq=False)
class Profile:
    """A sanitised task profile: an exponential average of differentially private releases.

    Attributes:
        vector: (k,) float32, finite; made read-only.
        noise_variance: variance of the noise per coordinate of `vector`, ≥ 0.
        releases: how many releases were averaged, ≥ 1.
    """

    vector: npt.NDArray[np.float32]
    noise_variance: float
    releases: int

    def __post_init__(self) -> None:
        vector = self.vector
        if not isinstance(vector, np.ndarray) or vector.dtype != np.float32 or vector.ndim != 1:
            raise WireError("profile.vector has the wrong type, expected a one-dimensional float32 array")
        if not 1 <= vector.size <= bounds.MAX_PROFILE_DIMENSIONS:
            raise WireError(
                f"profile.vector has {vector.size} values, expected 1 … {bounds.MAX_PROFILE_DIMENSIONS}"
            )
        unusable = int(vector.size - np.count_nonzero(np.isfinite(vector)))
        if unusable:
            raise WireError(
                f"profile.vector has {unusable} of {vector.size} values that are NaN or infinite, expected "
                "finite values: check the probe model's gradients on this client"
            )
        bounds.check_real("profile.noise_variance", self.noise_variance, 0.0, 3.4e38)
        bounds.check_integer("profile.releases", self.releases, 1, bounds.MAX_RELEASES)
        owned = np.array(vector, dtype=np.float32)
        owned.flags.writeable = False
        object.__setattr__(self, "vector", owned)

    def digest(self) -> bytes:
        """SHA-256 over the vector (little-endian), its noise variance and number of releases."""
        head = b"fedmosaic/profile/v1\x00" + struct.pack(
            "<IdI", self.vector.size, self.noise_variance, self.releases
        )
        return hashlib.sha256(head + self.vector.astype("<f4").tobytes()).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Profile) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())


@dataclass(frozen=True)
class SectionHeader:
    """A section as announced: its size in bytes and SHA-256, before a byte of it is sent.

    The size has no upper bound here: what is too large is for the server to refuse, with a reason.
    """

    name: SectionName
    size: int
    sha256: bytes

    def __post_init__(self) -> None:
        if self.name not in SECTION_NAMES:
            raise WireError(f"section.name is {self.name!r:.80}, expected one of {', '.join(SECTION_NAMES)}")
        bounds.check_integer(f"section {self.name!r} size", self.size, 1, 2**64 - 1)
        bounds.check_hash(f"section {self.name!r} sha256", self.sha256)


@dataclass(frozen=True)
class Section:
    """One part of the adapter, as the back end of the federation wrote it.

    Attributes:
        name: "shared" for P and Q, "family" for the LoRA of the other layers.
        payload: bytes of the back end, not empty.
    """

    name: SectionName
    payload: bytes = field(repr=False)

    def header(self) -> SectionHeader:
        """Name, size and SHA-256."""
        return SectionHeader(self.name, len(self.payload), hashlib.sha256(self.payload).digest())


@dataclass(frozen=True)
class LedgerHead:
    """How far a client's privacy ledger is, as anchors that only the client can read.

    Attributes:
        head: anchor of its last row.
        follows: the anchor that the server kept before, and that the ledger was found to hold; empty if none.
    """

    head: bytes
    follows: bytes = b""

    def __post_init__(self) -> None:
        bounds.check_hash("upload.ledger_head", self.head)
        if self.follows:
            bounds.check_hash("upload.ledger_follows", self.follows)


@dataclass(frozen=True)
class UploadHeader:
    """An upload without its payloads; see `Upload`."""

    round: int
    attempt_id: str
    key_epoch: int
    sections: tuple[SectionHeader, ...]
    profile: Profile | None
    signature: bytes
    ledger: LedgerHead | None = None

    def __post_init__(self) -> None:
        bounds.check_integer("upload.round", self.round, 1, bounds.MAX_ROUNDS)
        bounds.check_attempt_id("upload.attempt_id", self.attempt_id)
        bounds.check_integer("upload.key_epoch", self.key_epoch, 0, bounds.MAX_KEY_EPOCH)
        bounds.check_unique("upload.sections", [s.name for s in self.sections], len(SECTION_NAMES))
        bounds.check_bytes("upload.signature", self.signature, bounds.SIGNATURE_BYTES, bounds.SIGNATURE_BYTES)

    @property
    def size(self) -> int:
        """Bytes of all sections together."""
        return sum(section.size for section in self.sections)


@dataclass(frozen=True)
class Upload:
    """What one client contributes to one round.

    Attributes:
        round: the open round.
        attempt_id: names this attempt in logs; a retry of the same bytes may keep or change it.
        key_epoch: epoch of the group key the sections are encrypted under.
        sections: at most one of each name; none means "present, but contributes nothing".
        profile: a new task profile, or None to go on with the last one.
        signature: Ed25519 signature over `fedmosaic.protos.signing.upload_digest`.
        ledger: head of the client's privacy ledger, or None to have none kept.
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
class Receipt:
    """The server's answer to an upload.

    Attributes:
        status: what became of it.
        round: the round that is open now.
        content_hash: digest of the upload that the answer is about.
        head: see `Enrolled`.
    """

    status: ReceiptStatus
    round: int
    content_hash: bytes
    head: bytes = NO_HEAD

    def __post_init__(self) -> None:
        bounds.check_hash("receipt.head", self.head)
        bounds.check_integer("receipt.round", self.round, 1, bounds.MAX_ROUNDS + 1)
        bounds.check_hash("receipt.content_hash", self.content_hash)


@dataclass(frozen=True)
class WeightRow:
    """What one recipient receives of one section: an integer share of every contributor.

    Attributes:
        contributors: clients whose uploads are summed, each named once.
        weights: one integer in 0 … 2**bits per contributor; they sum to exactly 2**bits.
        bits: precision; the share of contributor j is weights[j] / 2**bits.
    """

    contributors: tuple[str, ...]
    weights: tuple[int, ...]
    bits: int

    def __post_init__(self) -> None:
        bounds.check_integer("weights.bits", self.bits, 1, bounds.MAX_WEIGHT_BITS)
        bounds.check_unique("weights.contributors", self.contributors, bounds.MAX_MEMBERS)
        for contributor in self.contributors:
            bounds.check_identifier("weights.contributors", contributor)
        if len(self.weights) != len(self.contributors):
            raise WireError(f"{len(self.weights)} weights for {len(self.contributors)} contributors")
        for weight in self.weights:
            bounds.check_integer("weights.weights", weight, 0, 1 << self.bits)
        if sum(self.weights) != 1 << self.bits:
            raise WireError(f"weights sum to {sum(self.weights)}, expected exactly {1 << self.bits}")


@dataclass(frozen=True)
class AggregateSection:
    """One part of what a recipient receives, or the reason why it receives none.

    Attributes:
        name: "shared" or "family".
        row: the weight row that was used; None where the aggregate is refused.
        payload: the weighted sum in the back end's format; empty where it is refused.
        refusal: why there is no aggregate; empty where there is one.
    """

    name: SectionName
    row: WeightRow | None
    payload: bytes = field(repr=False)
    refusal: str = ""

    def __post_init__(self) -> None:
        if self.name not in SECTION_NAMES:
            raise WireError(f"section.name is {self.name!r:.80}, expected one of {', '.join(SECTION_NAMES)}")
        bounds.check_text("aggregate.refusal", self.refusal)
        if (self.row is None) != bool(self.refusal):
            raise WireError(
                f"aggregate section {self.name!r} has a row and a refusal, or neither; expected one"
            )
        if self.row is None and self.payload:
            raise WireError(f"aggregate section {self.name!r} is refused but has a payload")


@dataclass(frozen=True)
class Aggregate:
    """What a client loads before it trains a round, made of the uploads of the round before.

    Attributes:
        round: the round that is open now; rounds + 1 once the run is finished.
        sections: empty in round 1; afterwards one per section name of the federation.
        key_epoch: epoch of the uploads inside, to decrypt them.
        upload_key_epoch: epoch that the upload of `round` must use.
        head: see `Enrolled`.
    """

    round: int
    sections: tuple[AggregateSection, ...]
    key_epoch: int
    upload_key_epoch: int
    head: bytes = NO_HEAD

    def __post_init__(self) -> None:
        bounds.check_hash("aggregate.head", self.head)
        bounds.check_integer("aggregate.round", self.round, 1, bounds.MAX_ROUNDS + 1)
        bounds.check_unique("aggregate.sections", [s.name for s in self.sections], len(SECTION_NAMES))
        bounds.check_integer("aggregate.key_epoch", self.key_epoch, 0, bounds.MAX_KEY_EPOCH)
        bounds.check_integer("aggregate.upload_key_epoch", self.upload_key_epoch, 0, bounds.MAX_KEY_EPOCH)


@dataclass(frozen=True)
class RoundStatus:
    """What the server is waiting for.

    Attributes:
        round: the round that is open or being aggregated; rounds + 1 once the run is finished.
        phase: where the round is.
        arrived: clients whose upload is stored.
        waiting_for: clients the round still waits for.
        seconds_left: until the deadline, ≥ 0.
        message: one line for people.
        head: see `Enrolled`.
    """

    round: int
    phase: Phase
    arrived: tuple[str, ...]
    waiting_for: tuple[str, ...]
    seconds_left: float
    message: str
    head: bytes = NO_HEAD

    def __post_init__(self) -> None:
        bounds.check_hash("status.head", self.head)
        bounds.check_integer("status.round", self.round, 1, bounds.MAX_ROUNDS + 1)
        bounds.check_unique("status.arrived", self.arrived, bounds.MAX_MEMBERS)
        bounds.check_unique("status.waiting_for", self.waiting_for, bounds.MAX_MEMBERS)
        for member in (*self.arrived, *self.waiting_for):
            bounds.check_identifier("status", member)
        bounds.check_real("status.seconds_left", self.seconds_left, 0.0, 1e12)
        bounds.check_text("status.message", self.message)


@dataclass(frozen=True)
class KeyMessage:
    """One message of a key agreement; the server relays it and the sender is its certificate's id.

    Attributes:
        epoch: key epoch the message is about.
        stage: name of the step of the agreement.
        recipient: client that may read it; empty for everybody.
        payload: sealed or signed by the sender.
    """

    epoch: int
    stage: str
    recipient: str
    payload: bytes = field(repr=False)

    def __post_init__(self) -> None:
        bounds.check_integer("key_message.epoch", self.epoch, 0, bounds.MAX_KEY_EPOCH)
        bounds.check_stage("key_message.stage", self.stage)
        if self.recipient:
            bounds.check_identifier("key_message.recipient", self.recipient)
        bounds.check_bytes("key_message.payload", self.payload, 0, bounds.MAX_KEY_PAYLOAD_BYTES)
