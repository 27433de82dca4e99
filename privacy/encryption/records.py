"""The fixed-length header of every encrypted record, its length, and the checks that come before its payload.

    magic 4 | format 1 | kind 1 | back end 1 | 0 | parameters 32 | federation 32 | section 32 | client 32 |
    epoch 8 | round 8 | nonce 16 | dimensions 4 | count 4

All integers are little-endian. Names enter as SHA-256, so the header has one length. A reader knows every
field beforehand except the nonce, and so the length of the record too: nothing in a record decides how much
is read or allocated.
"""

import enum
import functools
import hashlib
import struct
from dataclasses import dataclass

from fedmosaic.privacy.encryption.ckks.modular import SEED_BYTES, WORD_BYTES
from fedmosaic.privacy.encryption.parameters import CkksParameters, MaskParameters, Parameters
from fedmosaic.protos.errors import CiphertextError, EncryptionError
from fedmosaic.protos.messages import WeightRow

FORMAT_VERSION = 1
FLOAT_BYTES = 4
NONCE_BYTES = 16
MAX_DIMENSIONS = 1 << 28
_MAGIC = b"FMEA"
_LAYOUT = struct.Struct("<4sBBBx32s32s32s32sQQ16sII")
HEADER_BYTES = _LAYOUT.size
_NONCE = slice(152, 168)
_ROW_LABEL = b"fedmosaic/weight-row/v1\n"


class Kind(enum.IntEnum):
    """What a record carries."""

    UPLOAD = 1
    AGGREGATE = 2


BACKEND_CODES = {"ckks": 1, "mask": 2, "plain": 3}


@dataclass(frozen=True)
class RoundContext:
    """What both sides know of an exchange: epoch and round are 0 … 2**64 − 1, d is the vector's length.

    The section is "shared", or "family:" and the family's name; the federation may be one of its runs.
    """

    federation: str
    epoch: int
    round: int
    section: str
    dimensions: int

    def __post_init__(self) -> None:
        for name, value in (("epoch", self.epoch), ("round", self.round)):
            if not 0 <= value < 1 << 64:
                raise EncryptionError(f"{name} is {value}, expected 0 to 2^64 − 1")
        if not 1 <= self.dimensions <= MAX_DIMENSIONS:
            raise EncryptionError(f"vector has {self.dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}")


@dataclass(frozen=True)
class Header:
    """Every field of a record's header but the constants.

    `client` contributed an upload, or receives an aggregate. `count` is of the ring blocks of a `ckks`
    record, or the relayed nonces of a `mask` aggregate.
    """

    kind: Kind
    backend: str
    parameters_hash: bytes
    context: RoundContext
    client: str
    count: int

    def encode(self, nonce: bytes) -> bytes:
        """The header's bytes; the nonce is fresh for an upload, the row's digest for an aggregate."""
        if len(nonce) != NONCE_BYTES:
            raise EncryptionError(f"nonce has {len(nonce)} bytes, expected {NONCE_BYTES}")
        about, context = (_MAGIC, FORMAT_VERSION, self.kind, BACKEND_CODES[self.backend]), self.context
        names = map(_name_hash, (context.federation, context.section, self.client))
        sizes = context.dimensions, self.count
        return _LAYOUT.pack(*about, self.parameters_hash, *names, context.epoch, context.round, nonce, *sizes)


def read_record(record: bytes | memoryview, expected: Header, payload_bytes: int) -> tuple[bytes, memoryview]:
    """Check a record against the header and length it must have; its nonce and a view of its payload."""
    if len(record) != HEADER_BYTES + payload_bytes:
        raise CiphertextError(
            f"record has {len(record)} bytes, expected {HEADER_BYTES + payload_bytes} for "
            f"{expected.context.dimensions} dimensions with back end {expected.backend!r}"
        )
    nonce = bytes(record[_NONCE])
    wanted = expected.encode(nonce)
    if record[:HEADER_BYTES] != wanted:
        raise _difference(record, wanted, f"{expected.kind.name.lower()} of {expected.client!r}")
    return nonce, memoryview(record)[HEADER_BYTES:]


def _difference(record: bytes | memoryview, wanted: bytes, what: str) -> CiphertextError:
    fields = zip(_FIELDS, _LAYOUT.unpack_from(record), _LAYOUT.unpack(wanted), strict=True)
    for name, got, want in fields:
        if got != want:
            detail = f": got {got}, expected {want}" if isinstance(want, int) else ""
            return CiphertextError(f"{what} has a different {name}{detail}")
    return CiphertextError(f"{what} has a reserved byte that is not zero")


_FIELDS = (
    "magic, format version, kind, back end, parameters hash, federation, section, client, epoch, round, "
    "nonce, number of dimensions, count"
).split(", ")


def row_digest(row: WeightRow, recipient: str, round_number: int) -> bytes:
    """16 bytes that name a weight row: the nonce field of the aggregate made with it.

    They keep an aggregate and its row together. They do not prove that the server used the row.
    """
    # No name holds a line break, so no two rows have one canonical form.
    weights, names = row.canonical
    numbers = struct.pack("<QII", round_number, row.bits, len(row.contributors))
    content = b"".join((_ROW_LABEL, numbers, weights, recipient.encode(), names))
    return hashlib.sha256(content).digest()[:NONCE_BYTES]


@functools.lru_cache(maxsize=4096)
def _name_hash(name: str) -> bytes:
    return hashlib.sha256(b"fedmosaic/name/v1\n" + name.encode()).digest()


def ring_blocks(parameters: CkksParameters, dimensions: int) -> int:
    """Return the number of ring elements that carry a vector, ring_degree real values each."""
    return -(-dimensions // parameters.ring_degree)


def upload_header(parameters: Parameters, context: RoundContext, client: str) -> Header:
    """Return the header an upload of a client must carry."""
    blocks = ring_blocks(parameters, context.dimensions) if isinstance(parameters, CkksParameters) else 0
    return Header(Kind.UPLOAD, parameters.backend, parameters.digest(), context, client, blocks)


def aggregate_header(parameters: Parameters, context: RoundContext, row: WeightRow, recipient: str) -> Header:
    """Return the header that a recipient's aggregate must carry."""
    count = 0
    if isinstance(parameters, CkksParameters):
        count = ring_blocks(parameters, context.dimensions)
    elif isinstance(parameters, MaskParameters):
        count = len(row.contributors)
    return Header(Kind.AGGREGATE, parameters.backend, parameters.digest(), context, recipient, count)


def upload_payload_bytes(parameters: Parameters, dimensions: int) -> int:
    """The length of an upload after its header.

    `ckks`: seed 32 | first polynomials, 6 bytes a word. `mask`, `plain`: 4 bytes a value.
    """
    if isinstance(parameters, CkksParameters):
        words = ring_blocks(parameters, dimensions) * parameters.ring_degree
        return SEED_BYTES + words * WORD_BYTES
    return dimensions * FLOAT_BYTES


def aggregate_payload_bytes(parameters: Parameters, header: Header) -> int:
    """Return the length of an aggregate after its header.

    `ckks`: first polynomials | second polynomials. `mask`: nonce 16 per contributor | words. `plain`: values.
    """
    if isinstance(parameters, CkksParameters):
        return 2 * header.count * parameters.ring_degree * WORD_BYTES
    return header.count * NONCE_BYTES + header.context.dimensions * FLOAT_BYTES


def read_upload(
    parameters: Parameters, context: RoundContext, client: str, upload: bytes | memoryview
) -> tuple[bytes, memoryview]:
    """Check header and length of an upload; its nonce and a view of its payload, or CiphertextError."""
    header = upload_header(parameters, context, client)
    return read_record(upload, header, upload_payload_bytes(parameters, context.dimensions))
