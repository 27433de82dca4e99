"""The fixed-length header of every encrypted record, and the checks that come before its payload.

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

from fedmosaic.protos.errors import CiphertextError, EncryptionError
from fedmosaic.protos.messages import WeightRow

FORMAT_VERSION = 1
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
    """What both sides know of an exchange before any record arrives.

    Attributes:
        federation: its name, or of the run where one federation runs several.
        epoch: number of the group key's epoch, 0 … 2**64 − 1.
        round: its number, 0 … 2**64 − 1.
        section: which vector: "shared", or "family:" and the family's name.
        dimensions: length d of the vector.
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

    Attributes:
        parameters_hash: 32 bytes, `digest` of the parameters.
        client: contributor of an upload, recipient of an aggregate.
        count: ring blocks of a `ckks` record, relayed nonces of a `mask` aggregate, else 0.
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
    """Check a record against the header and payload length it must have, and split it.

    The 16-byte nonce and a view of the payload, whose content is still unchecked; CiphertextError names the
    first field that differs.
    """
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
    "magic", "format version", "kind", "back end", "parameters hash", "federation", "section", "client",
    "epoch", "round", "nonce", "number of dimensions", "count",
)  # fmt: skip


def row_digest(row: WeightRow, recipient: str, round_number: int) -> bytes:
    """16 bytes that name a weight row: the nonce field of the aggregate made with it.

    They keep an aggregate and its row together. They do not prove that the server used the row.
    """
    count = len(row.contributors)
    # No name holds a line break, so no two rows have one canonical form.
    names = "\n".join((recipient, *row.contributors))
    numbers = struct.pack(f"<QII{count}I", round_number, row.bits, count, *row.weights)
    return hashlib.sha256(_ROW_LABEL + numbers + names.encode()).digest()[:NONCE_BYTES]


@functools.lru_cache(maxsize=4096)
def _name_hash(name: str) -> bytes:
    return hashlib.sha256(b"fedmosaic/name/v1\n" + name.encode()).digest()
