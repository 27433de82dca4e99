"""Messages to protocol buffers and back, and payloads to chunks and back.

Decoding makes the frozen classes of `messages`, whose own checks hold every field to its bounds; here is
only what the classes cannot see: byte order, absent parts, enumerations, and the order of chunks.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Final, cast

import numpy as np

from fedmosaic.protos import bounds
from fedmosaic.protos.errors import WireError
from fedmosaic.protos.messages import (
    Aggregate,
    AggregateSection,
    Enrolled,
    Enrolment,
    KeyMessage,
    LedgerHead,
    Phase,
    Profile,
    Receipt,
    ReceiptStatus,
    RoundStatus,
    SectionHeader,
    SectionName,
    UploadHeader,
    WeightRow,
)
from fedmosaic.protos.v1 import federation_pb2 as pb

_PHASES: Final = {
    Phase.OPEN: pb.PHASE_OPEN,
    Phase.CLOSED: pb.PHASE_CLOSED,
    Phase.FINISHED: pb.PHASE_FINISHED,
}
_RECEIPTS: Final = {
    ReceiptStatus.ACCEPTED: pb.RECEIPT_STATUS_ACCEPTED,
    ReceiptStatus.DUPLICATE: pb.RECEIPT_STATUS_DUPLICATE,
    ReceiptStatus.LATE: pb.RECEIPT_STATUS_LATE,
}
_PHASES_BACK: Final = {int(value): phase for phase, value in _PHASES.items()}
_RECEIPTS_BACK: Final = {int(value): status for status, value in _RECEIPTS.items()}


def encode_enrolment(enrolment: Enrolment) -> pb.EnrolRequest:
    """Enrolment to its message."""
    return pb.EnrolRequest(
        protocol_version=enrolment.protocol_version,
        federation=enrolment.federation,
        roster_hash=enrolment.roster_hash,
        adapter_spec_hash=enrolment.adapter_spec_hash,
        family=enrolment.family,
        software=enrolment.software,
        check_only=enrolment.check_only,
        ledger_head=enrolment.ledger_head,
        ledger_signature=enrolment.ledger_signature,
    )


def decode_enrolment(message: pb.EnrolRequest) -> Enrolment:
    """Message to enrolment; WireError names the field that breaks a bound."""
    return Enrolment(
        message.protocol_version,
        message.federation,
        message.roster_hash,
        message.adapter_spec_hash,
        message.family,
        message.software,
        message.check_only,
        message.ledger_head,
        message.ledger_signature,
    )


def encode_enrolled(enrolled: Enrolled) -> pb.EnrolResponse:
    """Answer to an enrolment to its message."""
    return pb.EnrolResponse(
        run_id=enrolled.run_id,
        round=enrolled.round,
        rounds=enrolled.rounds,
        key_epoch=enrolled.key_epoch,
        members=enrolled.members,
        head=enrolled.head,
        ledger_head=enrolled.ledger_head,
    )


def decode_enrolled(message: pb.EnrolResponse) -> Enrolled:
    """Message to answer; WireError names the field that breaks a bound."""
    return Enrolled(
        message.run_id,
        message.round,
        message.rounds,
        message.key_epoch,
        tuple(message.members),
        message.head,
        message.ledger_head,
    )


def encode_profile(profile: Profile) -> pb.Profile:
    """Profile to its message; the vector as little-endian float32."""
    return pb.Profile(
        vector=profile.vector.astype("<f4").tobytes(),
        noise_variance=profile.noise_variance,
        releases=profile.releases,
    )


def decode_profile(message: pb.Profile) -> Profile:
    """Message to profile; WireError names the field that breaks a bound."""
    if len(message.vector) % 4:
        raise WireError(f"profile.vector has {len(message.vector)} bytes, expected a multiple of 4 (float32)")
    vector = np.frombuffer(message.vector, dtype="<f4").astype(np.float32)
    return Profile(vector, message.noise_variance, message.releases)


def encode_upload_header(header: UploadHeader, resume_offset: int = 0) -> pb.PushHeader:
    """Header of an upload to its message; `resume_offset` bytes are not sent again."""
    return pb.PushHeader(
        round=header.round,
        attempt_id=header.attempt_id,
        key_epoch=header.key_epoch,
        sections=[pb.SectionHeader(name=s.name, size=s.size, sha256=s.sha256) for s in header.sections],
        profile=None if header.profile is None else encode_profile(header.profile),
        signature=header.signature,
        resume_offset=resume_offset,
        ledger_head=b"" if header.ledger is None else header.ledger.head,
        ledger_follows=b"" if header.ledger is None else header.ledger.follows,
    )


def decode_upload_header(message: pb.PushHeader) -> UploadHeader:
    """Message to the header of an upload; WireError names the field that breaks a bound."""
    bounds.check_unique("upload.sections", range(len(message.sections)), 2)
    return UploadHeader(
        message.round,
        message.attempt_id,
        message.key_epoch,
        tuple(SectionHeader(cast(SectionName, s.name), s.size, s.sha256) for s in message.sections),
        decode_profile(message.profile) if message.HasField("profile") else None,
        message.signature,
        LedgerHead(message.ledger_head, message.ledger_follows)
        if message.ledger_head or message.ledger_follows
        else None,
    )


def encode_receipt(receipt: Receipt) -> pb.PushResponse:
    """Receipt to its message."""
    return pb.PushResponse(
        status=_RECEIPTS[receipt.status],
        round=receipt.round,
        content_hash=receipt.content_hash,
        head=receipt.head,
    )


def decode_receipt(message: pb.PushResponse) -> Receipt:
    """Message to receipt; WireError if its status is none we know."""
    status = _RECEIPTS_BACK.get(int(message.status))
    if status is None:
        raise WireError(f"receipt.status is {int(message.status)}, expected one of {sorted(_RECEIPTS_BACK)}")
    return Receipt(status, message.round, message.content_hash, message.head)


def encode_status(status: RoundStatus) -> pb.RoundState:
    """Status of the round to its message."""
    return pb.RoundState(
        round=status.round,
        phase=_PHASES[status.phase],
        arrived=status.arrived,
        waiting_for=status.waiting_for,
        seconds_left=status.seconds_left,
        message=status.message,
        head=status.head,
    )


def decode_status(message: pb.RoundState) -> RoundStatus:
    """Message to status of the round; WireError names the field that breaks a bound."""
    phase = _PHASES_BACK.get(int(message.phase))
    if phase is None:
        raise WireError(f"status.phase is {int(message.phase)}, expected one of {sorted(_PHASES_BACK)}")
    return RoundStatus(
        message.round,
        phase,
        tuple(message.arrived),
        tuple(message.waiting_for),
        message.seconds_left,
        message.message,
        message.head,
    )


def encode_key_message(message: KeyMessage) -> pb.PostKeyMessageRequest:
    """Key message to its request."""
    return pb.PostKeyMessageRequest(
        epoch=message.epoch, stage=message.stage, recipient=message.recipient, payload=message.payload
    )


def decode_key_message(message: pb.PostKeyMessageRequest) -> KeyMessage:
    """Request to key message; WireError names the field that breaks a bound."""
    return KeyMessage(message.epoch, message.stage, message.recipient, message.payload)


def encode_aggregate_header(
    aggregate: Aggregate, sizes: Sequence[int], sha256: bytes, resume_offset: int
) -> pb.AggregateHeader:
    """Everything of an aggregate but its payloads.

    Args:
        aggregate: the aggregate; its payloads are not looked at.
        sizes: bytes of the payload of every section.
        sha256: of all payloads, laid end to end.
        resume_offset: where the first chunk will start.
    """
    return pb.AggregateHeader(
        round=aggregate.round,
        key_epoch=aggregate.key_epoch,
        upload_key_epoch=aggregate.upload_key_epoch,
        sections=[
            pb.AggregateSection(
                name=section.name,
                row=None
                if section.row is None
                else pb.WeightRow(
                    contributors=section.row.contributors, weights=section.row.weights, bits=section.row.bits
                ),
                size=size,
                refusal=section.refusal,
            )
            for section, size in zip(aggregate.sections, sizes, strict=True)
        ],
        sha256=sha256,
        resume_offset=resume_offset,
        head=aggregate.head,
    )


def announced_size(header: pb.AggregateHeader) -> int:
    """Bytes of all payloads that an aggregate's header announces; WireError if it is too many."""
    size = sum(section.size for section in header.sections)
    bounds.check_hash("aggregate.sha256", header.sha256)
    bounds.check_integer("aggregate size", size, 0, bounds.MAX_PAYLOAD_BYTES)
    bounds.check_integer("aggregate.resume_offset", header.resume_offset, 0, size)
    return size


def decode_aggregate(header: pb.AggregateHeader, stream: bytes) -> Aggregate:
    """Header and payloads to an aggregate.

    Args:
        header: as received; its sizes must add up to the stream.
        stream: all payloads, laid end to end.

    Raises:
        WireError: a bound is broken, or the stream is not the announced one.
    """
    bounds.check_unique("aggregate.sections", range(len(header.sections)), 2)
    if announced_size(header) != len(stream) or hashlib.sha256(stream).digest() != header.sha256:
        raise WireError(
            f"the aggregate of round {header.round} arrived damaged: its SHA-256 is not the announced one; "
            "pull it again"
        )
    sections: list[AggregateSection] = []
    start = 0
    for section in header.sections:
        row = None
        if section.HasField("row"):
            row = WeightRow(tuple(section.row.contributors), tuple(section.row.weights), section.row.bits)
        payload = stream[start : start + section.size]
        start += section.size
        sections.append(AggregateSection(cast(SectionName, section.name), row, payload, section.refusal))
    return Aggregate(header.round, tuple(sections), header.key_epoch, header.upload_key_epoch, header.head)


def chunks(payloads: Sequence[bytes | memoryview], offset: int, chunk_bytes: int) -> Iterator[pb.Chunk]:
    """Cut payloads, laid end to end, into chunks.

    Args:
        payloads: in the order of their header.
        offset: bytes to leave out at the start, because the other side has them.
        chunk_bytes: size of every chunk but the last of a payload, 1 … MAX_CHUNK_BYTES.

    Yields:
        Chunks in order; none of them spans two payloads.
    """
    bounds.check_integer("chunk_bytes", chunk_bytes, 1, bounds.MAX_CHUNK_BYTES)
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
    """Refuse a chunk that is empty, out of order, or goes beyond the announced size.

    Args:
        chunk: as received.
        position: bytes received so far.
        size: bytes announced.
    """
    if not 1 <= len(chunk.data) <= bounds.MAX_CHUNK_BYTES:
        raise WireError(f"chunk has {len(chunk.data)} bytes, expected 1 … {bounds.MAX_CHUNK_BYTES}")
    if chunk.offset != position:
        raise WireError(f"chunk starts at byte {chunk.offset}, expected {position}: send chunks in order")
    if position + len(chunk.data) > size:
        raise WireError(f"chunks go beyond the {size} bytes that were announced")
