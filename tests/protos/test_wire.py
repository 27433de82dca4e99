"""Messages survive the wire unchanged, and bytes that are no message are refused."""

import contextlib
import hashlib
import itertools
import tracemalloc
from functools import partial
from typing import TypeVar

import hypothesis.strategies as st
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as Buffer
from hypothesis import given
from hypothesis.extra import numpy as hnp

from fedmosaic.protos import bounds, messages, wire
from fedmosaic.protos.bounds import Message
from fedmosaic.protos.errors import WireError
from fedmosaic.protos.v1 import federation_pb2 as pb

AnyBuffer = TypeVar("AnyBuffer", bound=Buffer)
hashes = st.binary(min_size=32, max_size=32)
ids = st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True)
names = st.lists(ids, unique=True, max_size=6).map(tuple)
rounds = st.integers(1, bounds.MAX_ROUNDS)
epochs = st.integers(0, bounds.MAX_KEY_EPOCH)
texts = st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), max_size=60)
families = st.sampled_from(["", "Llama-3.2-1B", "qwen2/0.5b"])
finite32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
profiles = st.builds(
    messages.Profile,
    hnp.arrays(np.float32, st.integers(1, 40), elements=finite32),
    st.floats(0.0, 1e30),
    st.integers(1, 1000),
)
section_headers = st.lists(
    st.builds(messages.SectionHeader, st.sampled_from(["shared", "family"]), st.integers(1, 2**63), hashes),
    max_size=2,
    unique_by=lambda s: s.name,
).map(tuple)
upload_headers = st.builds(
    messages.UploadHeader,
    rounds,
    st.from_regex(r"[A-Za-z0-9-]{1,64}", fullmatch=True),
    epochs,
    section_headers,
    st.none() | profiles,
    st.binary(min_size=64, max_size=64),
    st.none() | st.builds(messages.LedgerHead, hashes, st.just(b"") | hashes),
)
enrolments = st.builds(
    messages.Enrolment, st.integers(0, 2**32 - 1), ids, hashes, hashes, families, texts
) | st.builds(
    messages.Enrolment,
    st.integers(0, 2**32 - 1),
    ids,
    hashes,
    hashes,
    families,
    texts,
    st.booleans(),
    hashes,
    st.binary(min_size=64, max_size=64),
)
enrolled = st.integers(1, 50).flatmap(
    lambda n: st.builds(
        messages.Enrolled,
        st.from_regex(r"[0-9a-f]{32}", fullmatch=True),
        st.integers(1, n + 1),
        st.just(n),
        epochs,
        names,
        hashes,
        st.just(b"") | hashes,
    )
)
receipts = st.builds(messages.Receipt, st.sampled_from(messages.ReceiptStatus), rounds, hashes)
statuses = st.builds(
    messages.RoundStatus, rounds, st.sampled_from(messages.Phase), names, names, st.floats(0.0, 1e9), texts
)
key_messages = st.builds(
    messages.KeyMessage,
    epochs,
    st.from_regex(r"[a-z0-9-]{1,32}", fullmatch=True),
    st.just("") | ids,
    st.binary(max_size=200),
)


@st.composite
def weight_rows(draw: st.DrawFn) -> messages.WeightRow:
    contributors = draw(st.lists(ids, unique=True, min_size=1, max_size=8))
    bits = draw(st.integers(4, 20))
    count = len(contributors) - 1
    cuts = sorted(draw(st.lists(st.integers(0, 1 << bits), min_size=count, max_size=count)))
    edges = [0, *cuts, 1 << bits]
    return messages.WeightRow(tuple(contributors), tuple(b - a for a, b in itertools.pairwise(edges)), bits)


@st.composite
def aggregates(draw: st.DrawFn) -> messages.Aggregate:
    sections = []
    for name in draw(st.lists(st.sampled_from(messages.SECTION_NAMES), unique=True, max_size=2)):
        refused = draw(st.booleans())
        sections.append(
            messages.AggregateSection(name, None, b"", "too few contributors")
            if refused
            else messages.AggregateSection(
                name, draw(weight_rows()), draw(st.binary(min_size=1, max_size=300))
            )
        )
    return messages.Aggregate(draw(rounds), tuple(sections), draw(epochs), draw(epochs))


def again(message: AnyBuffer) -> AnyBuffer:
    """The message after a trip over the wire."""
    return type(message).FromString(message.SerializeToString())


KINDS = {
    messages.Enrolment: pb.EnrolRequest,
    messages.Enrolled: pb.EnrolResponse,
    messages.Receipt: pb.PushResponse,
    messages.RoundStatus: pb.RoundState,
    messages.KeyMessage: pb.PostKeyMessageRequest,
}


@given(enrolments | enrolled | receipts | statuses | key_messages)
def test_every_message_survives_the_wire(value: Message) -> None:
    assert wire.decode(again(wire.encode(value, KINDS[type(value)])), type(value)) == value


@given(upload_headers)
def test_upload_header_round_trip(value: messages.UploadHeader) -> None:
    assert wire.decode_upload_header(again(wire.encode_upload_header(value))) == value


@given(aggregates(), st.integers(1, 97))
def test_aggregate_round_trip_through_chunks_of_any_size(value: messages.Aggregate, chunk_bytes: int) -> None:
    payloads = [section.payload for section in value.sections]
    stream = b"".join(payloads)
    sizes = [len(payload) for payload in payloads]
    header = pb.AggregateHeader.FromString(
        wire.encode_aggregate_header(value, sizes, hashlib.sha256(stream).digest(), 0)
    )
    received = bytearray()
    for chunk in wire.chunks(payloads, 0, chunk_bytes):
        wire.check_chunk(chunk, len(received), len(stream))
        received += chunk.data
    assert wire.decode_aggregate(header, bytes(received)) == value


@given(st.lists(st.binary(max_size=50), max_size=3), st.integers(0, 160), st.integers(1, 20))
def test_chunks_resume_at_any_offset(payloads: list[bytes], offset: int, chunk_bytes: int) -> None:
    stream = b"".join(payloads)
    pieces = list(wire.chunks(payloads, offset, chunk_bytes))
    assert b"".join(piece.data for piece in pieces) == stream[offset:]
    assert all(stream[p.offset : p.offset + len(p.data)] == p.data for p in pieces)
    assert all(1 <= len(p.data) <= chunk_bytes for p in pieces)


@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_a_message_or_a_wire_error(noise: bytes) -> None:
    for kind, decode in (
        *((buffer, partial(wire.decode, kind=kind)) for kind, buffer in KINDS.items()),
        (pb.PushHeader, wire.decode_upload_header),
        (pb.AggregateHeader, lambda m: wire.decode_aggregate(m, noise)),
    ):
        try:
            message = kind.FromString(noise)  # type: ignore[attr-defined]
        except DecodeError:
            continue
        # Any other exception than a refusal fails the test.
        with contextlib.suppress(WireError):
            decode(message)  # type: ignore[operator]


def test_a_damaged_aggregate_is_noticed() -> None:
    row = messages.WeightRow(("a", "b"), (4, 4), 3)
    value = messages.Aggregate(2, (messages.AggregateSection("shared", row, b"payload"),), 0, 0)
    encoded = wire.encode_aggregate_header(value, [7], hashlib.sha256(b"payload").digest(), 0)
    header = pb.AggregateHeader.FromString(encoded)
    with pytest.raises(WireError, match="damaged"):
        wire.decode_aggregate(header, b"pay1oad")
    with pytest.raises(WireError, match="damaged"):
        wire.decode_aggregate(header, b"payloa")


def test_an_announced_aggregate_above_the_limit_is_refused_before_a_byte_of_it() -> None:
    header = pb.AggregateHeader(round=2, sha256=bytes(32))
    header.sections.add(name="shared", size=bounds.MAX_PAYLOAD_BYTES + 1, refusal="")
    with pytest.raises(WireError, match="aggregate size"):
        wire.announced_size(header)


@pytest.mark.parametrize(
    ("chunk", "expected"),
    [
        (pb.Chunk(offset=4, data=b""), "0 bytes"),
        (pb.Chunk(offset=3, data=b"x"), "starts at byte 3"),
        (pb.Chunk(offset=4, data=b"1234567"), "beyond"),
        (pb.Chunk(offset=4, data=bytes(bounds.MAX_CHUNK_BYTES + 1)), "expected 1"),
    ],
)
def test_a_chunk_that_does_not_fit_is_refused(chunk: pb.Chunk, expected: str) -> None:
    with pytest.raises(WireError, match=expected):
        wire.check_chunk(chunk, 4, 10)


@pytest.mark.parametrize(
    ("vector", "words"),
    [
        (b"12345", "multiple of 4"),
        (np.array([1.0, np.nan], dtype="<f4").tobytes(), r"profile\.vector has 1 of 2 values"),
    ],
)
def test_a_vector_that_is_none_is_refused_with_the_field(vector: bytes, words: str) -> None:
    with pytest.raises(WireError, match=words):
        wire.decode(pb.Profile(vector=vector, releases=1), messages.Profile)


def test_what_is_too_many_is_refused_before_each_is_looked_at() -> None:
    header = pb.PushHeader(sections=[pb.SectionHeader()] * 3)
    with pytest.raises(WireError, match="has 3 entries, expected at most 2"):
        wire.decode_upload_header(header)
    state = pb.RoundState(arrived=[""] * (bounds.MAX_MESSAGE_BYTES // 2))
    tracemalloc.start()
    with pytest.raises(WireError):
        wire.decode(state, messages.RoundStatus)
    assert tracemalloc.get_traced_memory()[1] < 16 * bounds.MAX_MESSAGE_BYTES
    tracemalloc.stop()


def test_the_largest_messages_stay_below_the_message_limit() -> None:
    members = tuple(f"{i:063d}" for i in range(bounds.MAX_CONTRIBUTORS))
    everybody = tuple(f"{i:063d}" for i in range(bounds.MAX_MEMBERS))
    enrolled = wire.encode(messages.Enrolled("0" * 32, 1, 1, 0, everybody), pb.EnrolResponse)
    share, rest = divmod(1 << 20, len(members))
    row = messages.WeightRow(members, (share + rest, *[share] * (len(members) - 1)), 20)
    section = messages.AggregateSection("shared", row, b"x")
    family = messages.AggregateSection("family", row, b"x")
    aggregate = wire.encode_aggregate_header(
        messages.Aggregate(2, (section, family), 0, 0), [1, 1], bytes(32), 0
    )
    status = wire.encode(
        messages.RoundStatus(1, messages.Phase.OPEN, members, everybody, 1.0, "x"), pb.RoundState
    )
    chunk = pb.Chunk(offset=1 << 40, data=bytes(bounds.MAX_CHUNK_BYTES))
    vector = np.ones(bounds.MAX_PROFILE_DIMENSIONS, dtype=np.float32)
    header = messages.UploadHeader(1, "a", 0, (), messages.Profile(vector, 0.0, 1), bytes(64))
    for message in (enrolled, status, chunk, wire.encode_upload_header(header)):
        assert message.ByteSize() < bounds.MAX_MESSAGE_BYTES
    assert len(aggregate) < bounds.MAX_MESSAGE_BYTES
