"""Messages to protocol buffers and back, and payloads to chunks and back.

One rule for all messages: a field of the class is the field of that name in the protocol buffer. The classes
of `messages` hold every field to its bounds when they are made; here is only what they cannot see.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any, Final, TypeVar

import numpy as np
from google.protobuf.message import Message as Buffer

from fedmosaic.protos import bounds
from fedmosaic.protos.bounds import Message
from fedmosaic.protos.errors import WireError
from fedmosaic.protos.messages import SECTION_NAMES, Aggregate, LedgerHead, UploadHeader
from fedmosaic.protos.v1 import federation_pb2 as pb

CHUNK_BYTES: Final = 1 << 18
_SCALAR: Final = (bool, int, float, str, bytes)
B = TypeVar("B", bound=Buffer)
M = TypeVar("M", bound=Message)


def encode(message: Message, kind: type[B]) -> B:
    """A message as a protocol buffer."""
    return kind(**_outward(message, kind.DESCRIPTOR))


def decode(buffer: Buffer, kind: type[M]) -> M:
    """A protocol buffer as a message; WireError names the field that breaks a bound."""
    content = _inward(buffer)
    return kind(**{field.name: content[field.name] for field in dataclasses.fields(kind)})


def _outward(message: Message, descriptor: Any) -> dict[str, Any]:
    content = {}
    for name in (field.name for field in dataclasses.fields(message)):
        value = getattr(message, name)
        if name in descriptor.fields_by_name and value is not None:
            content[name] = _raw(value, descriptor.fields_by_name[name])
    return content


def _raw(value: Any, field: Any) -> Any:
    if isinstance(value, tuple):
        # Names and numbers as they are: a federation's weight rows hold N² of them.
        return [_raw(item, field) for item in value] if field.message_type else value
    if isinstance(value, Message):
        return _outward(value, field.message_type)
    if isinstance(value, Enum):
        return next(v.number for v in field.enum_type.values if v.name.endswith(f"_{value.name}"))
    return value.astype("<f4").tobytes() if isinstance(value, np.ndarray) else value


def _inward(buffer: Buffer) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for field in buffer.DESCRIPTOR.fields:
        value = getattr(buffer, field.name)
        if isinstance(value, Buffer):
            content[field.name] = _inward(value) if buffer.HasField(field.name) else None
        elif field.message_type is not None:
            # Sections, all of them; looked at before any is unpacked.
            if len(value) > len(SECTION_NAMES):
                raise WireError(f"{field.full_name} has {len(value)} entries, expected at most 2")
            content[field.name] = tuple(_inward(item) for item in value)
        elif field.enum_type is not None:
            known = field.enum_type.values_by_number.get(value)
            content[field.name] = value if known is None else known.name.rpartition("_")[2].lower()
        else:
            content[field.name] = value if isinstance(value, _SCALAR) else tuple(value)
    return content


def encode_upload_header(header: UploadHeader, resume_offset: int = 0) -> pb.PushHeader:
    """Header of an upload as a protocol buffer; `resume_offset` bytes are not sent again."""
    buffer = encode(header, pb.PushHeader)
    buffer.resume_offset = resume_offset
    if header.ledger is not None:
        buffer.ledger_head, buffer.ledger_follows = header.ledger.head, header.ledger.follows
    return buffer


def decode_upload_header(buffer: pb.PushHeader) -> UploadHeader:
    """Protocol buffer as the header of an upload; WireError names the field that breaks a bound."""
    content = _inward(buffer)
    del content["resume_offset"]
    head, follows = content.pop("ledger_head"), content.pop("ledger_follows")
    return UploadHeader(**content, ledger=LedgerHead(head, follows) if head or follows else None)


def field(number: int, content: bytes) -> bytes:
    """The serialised message `content` as field `number`, below 16, of the message around it."""
    size, left = bytearray(), len(content)
    while left > 127:
        size.append(left & 127 | 128)
        left >>= 7
    return bytes((number << 3 | 2, *size, left)) + content


def encode_aggregate_header(
    aggregate: Aggregate, sizes: Sequence[int], sha256: bytes, resume_offset: int
) -> bytes:
    """Everything of an aggregate but its payloads, of which only sizes and SHA-256 are told.

    Serialised, as `pb.AggregateHeader`: rows of a thousand names take longer to copy than all else.
    """
    content = {**vars(aggregate), "sections": ()}
    parts = [pb.AggregateHeader(**content, sha256=sha256, resume_offset=resume_offset).SerializeToString()]
    for section, size in zip(aggregate.sections, sizes, strict=True):
        content = {key: value for key, value in vars(section).items() if key not in ("row", "payload")}
        told = pb.AggregateSection(**content, size=size).SerializeToString()
        if section.row is not None:
            told += field(pb.AggregateSection.ROW_FIELD_NUMBER, section.row.encoded)
        parts.append(field(pb.AggregateHeader.SECTIONS_FIELD_NUMBER, told))
    return b"".join(parts)


def announced_size(header: pb.AggregateHeader) -> int:
    """Bytes of all payloads that an aggregate's header announces; WireError if it is too many."""
    size = sum(section.size for section in header.sections)
    if size > bounds.MAX_PAYLOAD_BYTES:
        raise WireError(f"aggregate size is {size}, expected at most {bounds.MAX_PAYLOAD_BYTES} bytes")
    if header.resume_offset > size or len(header.sha256) != bounds.HASH_BYTES:
        raise WireError(
            f"the aggregate goes on at byte {header.resume_offset} of {size}, its hash has "
            f"{len(header.sha256)} bytes"
        )
    return size


def decode_aggregate(header: pb.AggregateHeader, stream: bytes) -> Aggregate:
    """Header and payloads, laid end to end, as an aggregate; WireError if they are not the announced ones."""
    if announced_size(header) != len(stream) or hashlib.sha256(stream).digest() != header.sha256:
        raise WireError(
            f"the aggregate of round {header.round} arrived damaged: another SHA-256 was announced; pull it "
            "again"
        )
    content, start = _inward(header), 0
    del content["sha256"], content["resume_offset"]
    for section in content["sections"]:
        size = section.pop("size")
        section["payload"] = stream[start : start + size]
        start += size
    return Aggregate(**content)


def chunks(
    payloads: Sequence[bytes | memoryview], offset: int, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[pb.Chunk]:
    """Payloads laid end to end, less the first `offset` bytes, as chunks; none spans two payloads."""
    start = 0
    for payload in payloads:
        view = memoryview(payload)
        position = max(0, min(offset - start, len(view)))
        while position < len(view):
            data = bytes(view[position : position + chunk_bytes])
            yield pb.Chunk(offset=start + position, data=data)
            position += len(data)
        start += len(view)


def check_chunk(chunk: pb.Chunk, position: int, size: int) -> None:
    """Refuse a chunk that is empty, out of order after `position` bytes, or beyond the announced size."""
    if not 1 <= len(chunk.data) <= bounds.MAX_CHUNK_BYTES:
        raise WireError(f"chunk has {len(chunk.data)} bytes, expected 1 … {bounds.MAX_CHUNK_BYTES}")
    if chunk.offset != position:
        raise WireError(f"chunk starts at byte {chunk.offset}, expected {position}: send chunks in order")
    if position + len(chunk.data) > size:
        raise WireError(f"chunks go beyond the {size} bytes that were announced")
