"""Headers of encrypted records: every field is checked, and named when it is wrong."""

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmosaic.privacy.encryption import records
from fedmosaic.protos.errors import CiphertextError, EncryptionError
from fedmosaic.protos.messages import WeightRow

CONTEXT = records.RoundContext("federation", 2, 9, "shared", 100)
HEADER = records.Header(records.Kind.UPLOAD, "mask", b"h" * 32, CONTEXT, "clinic-a", 0)
NONCE = bytes(range(16))
RECORD = HEADER.encode(NONCE) + b"payload!"


@pytest.mark.parametrize(("offset", "name"), [(0, "magic"), (4, "format version: got"), (7, "reserved byte")])
def test_what_every_record_shares_is_named_when_it_is_wrong(offset: int, name: str) -> None:
    altered = bytearray(RECORD)
    altered[offset] ^= 1
    with pytest.raises(CiphertextError, match=name):
        records.read_record(bytes(altered), HEADER, 8)


@given(position=st.integers(0, records.HEADER_BYTES - 1), flip=st.integers(1, 255))
def test_any_altered_header_byte_but_the_nonce_is_refused(position: int, flip: int) -> None:
    altered = bytearray(RECORD)
    altered[position] ^= flip
    if 152 <= position < 168:
        assert records.read_record(bytes(altered), HEADER, 8)[0] != NONCE
    else:
        with pytest.raises(CiphertextError):
            records.read_record(bytes(altered), HEADER, 8)


@pytest.mark.parametrize(
    "length", [0, 1, records.HEADER_BYTES, len(RECORD) - 1, len(RECORD) + 1, 10 * len(RECORD)]
)
def test_other_lengths_are_refused_before_anything_is_read(length: int) -> None:
    content = (RECORD * 10)[:length]
    with pytest.raises(CiphertextError, match=f"record has {length} bytes, expected {len(RECORD)}"):
        records.read_record(content, HEADER, 8)


@given(content=st.binary(max_size=400))
def test_random_bytes_never_pass_and_never_raise_anything_else(content: bytes) -> None:
    with pytest.raises(CiphertextError):
        records.read_record(content, HEADER, 8)
    padded = (content + bytes(len(RECORD)))[: len(RECORD)]
    with pytest.raises(CiphertextError):
        records.read_record(padded, HEADER, 8)


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (replace(HEADER, kind=records.Kind.AGGREGATE), "kind: got"),
        (replace(HEADER, backend="plain"), "back end: got"),
        (replace(HEADER, parameters_hash=b"i" * 32), "parameters hash"),
        (replace(HEADER, client="clinic-b"), "client"),
        (replace(HEADER, count=1), "count: got"),
        (replace(HEADER, context=replace(CONTEXT, federation="other")), "federation"),
        (replace(HEADER, context=replace(CONTEXT, epoch=3)), "epoch: got"),
        (replace(HEADER, context=replace(CONTEXT, round=8)), "round: got"),
        (replace(HEADER, context=replace(CONTEXT, section="family:x")), "section"),
        (replace(HEADER, context=replace(CONTEXT, dimensions=101)), "number of dimensions: got"),
    ],
)
def test_records_of_another_exchange_are_refused_by_name(other: records.Header, name: str) -> None:
    with pytest.raises(CiphertextError, match=f"different {name}"):
        records.read_record(other.encode(NONCE) + b"payload!", HEADER, 8)


def test_header_has_the_documented_layout() -> None:
    assert records.HEADER_BYTES == 176
    assert RECORD[:8] == b"FMEA" + bytes([1, 1, 2, 0])
    assert struct.unpack_from("<QQ", RECORD, 136) == (2, 9)
    assert RECORD[152:168] == NONCE
    assert struct.unpack_from("<II", RECORD, 168) == (100, 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"epoch": -1},
        {"epoch": 1 << 64},
        {"round": -1},
        {"round": 1 << 64},
        {"dimensions": 0},
        {"dimensions": records.MAX_DIMENSIONS + 1},
    ],
)
def test_contexts_out_of_bounds_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(EncryptionError, match="expected"):
        replace(CONTEXT, **fields)  # type: ignore[arg-type]  # integers, but of which fields is open


def test_nonces_have_one_length() -> None:
    with pytest.raises(EncryptionError, match="15 bytes, expected 16"):
        HEADER.encode(bytes(15))


def test_row_digests_depend_on_every_field_and_on_nothing_else() -> None:
    row = WeightRow(("b", "c", "d"), (1, 2, 1), 2)
    variants = [
        (row, "a", 1),
        (row, "a", 2),
        (row, "x", 1),
        (replace(row, contributors=("b", "c", "e")), "a", 1),
        (replace(row, contributors=("c", "b", "d")), "a", 1),
        (replace(row, weights=(2, 1, 1)), "a", 1),
        (replace(row, weights=(2, 4, 2), bits=3), "a", 1),
        (replace(row, contributors=("b", "cd"), weights=(1, 3)), "a", 1),
    ]
    assert len({records.row_digest(*variant) for variant in variants}) == len(variants)
    assert records.row_digest(row, "a", 1) == records.row_digest(
        WeightRow(("b", "c", "d"), (1, 2, 1), 2), "a", 1
    )
    assert len(records.row_digest(row, "a", 1)) == 16
