"""An upload's signature binds every part of it to one place."""

import hashlib
import struct

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmosaic.protos.errors import IdentityError
from fedmosaic.protos.messages import LedgerHead, Profile, Section, SectionHeader
from fedmosaic.protos.signing import ledger_digest, sign_upload, upload_digest, verify_digest

PROFILE = Profile(np.array([1.0, -2.0], dtype=np.float32), 0.25, 3)
SECTION = SectionHeader("shared", 3, hashlib.sha256(b"abc").digest())
BASE = {
    "federation": "fed",
    "run_id": "0" * 32,
    "round_number": 2,
    "client_id": "clinic-a",
    "key_epoch": 1,
    "sections": (SECTION,),
    "profile": PROFILE,
}


def test_digest_is_the_documented_encoding() -> None:
    def field(content: bytes) -> bytes:
        return struct.pack("<Q", len(content)) + content

    profile = hashlib.sha256(
        b"fedmosaic/profile/v1\x00" + struct.pack("<IdI2f", 2, 0.25, 3, 1.0, -2.0)
    ).digest()
    fields = [
        b"fedmosaic/upload/v1",
        b"fed",
        b"0" * 32,
        struct.pack("<Q", 2),
        b"clinic-a",
        struct.pack("<Q", 1),
        struct.pack("<Q", 1),
        b"shared",
        struct.pack("<Q", 3),
        hashlib.sha256(b"abc").digest(),
        profile,
    ]
    expected = hashlib.sha256(b"".join(map(field, fields))).digest()
    assert upload_digest(**BASE) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"federation": "fee"},
        {"run_id": "1" * 32},
        {"round_number": 3},
        {"client_id": "clinic-b"},
        {"key_epoch": 2},
        {"sections": ()},
        {"sections": (SectionHeader("family", 3, SECTION.sha256),)},
        {"sections": (SectionHeader("shared", 4, SECTION.sha256),)},
        {"sections": (SectionHeader("shared", 3, bytes(32)),)},
        {"profile": None},
        {"profile": Profile(PROFILE.vector, 0.25, 4)},
        {"profile": Profile(PROFILE.vector, 0.5, 3)},
        {"profile": Profile(-PROFILE.vector, 0.25, 3)},
        {"ledger": LedgerHead(bytes(32))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_no_part_can_be_changed_without_changing_the_digest(change: dict[str, object]) -> None:
    assert upload_digest(**(BASE | change)) != upload_digest(**BASE)  # type: ignore[arg-type]


def test_both_heads_of_the_ledger_are_signed() -> None:
    heads = [LedgerHead(bytes(32)), LedgerHead(bytes([1]) * 32), LedgerHead(bytes(32), bytes([1]) * 32)]
    digests = {upload_digest(**(BASE | {"ledger": head})) for head in heads}  # type: ignore[arg-type]
    assert len(digests) == 3
    enrolments = {
        ledger_digest(federation=federation, client_id=client, head=head)
        for federation in ("fed", "fee")
        for client in ("clinic-a", "clinic-b")
        for head in (bytes(32), bytes([1]) * 32)
    }
    assert len(enrolments) == 8


def test_fields_cannot_run_into_each_other() -> None:
    one = upload_digest(**(BASE | {"federation": "fed0", "run_id": "0" * 31}))  # type: ignore[arg-type]
    assert one != upload_digest(**BASE)  # type: ignore[arg-type]


def test_a_signed_upload_verifies_with_its_own_key_only() -> None:
    key, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    sections = (Section("shared", b"abc"),)
    upload = sign_upload(key, attempt_id="a", **(BASE | {"sections": sections}))  # type: ignore[arg-type]
    digest = upload_digest(**BASE)  # type: ignore[arg-type]
    verify_digest(key.public_key().public_bytes_raw(), digest, upload.signature, "clinic-a")
    with pytest.raises(IdentityError, match="clinic-a"):
        verify_digest(other.public_key().public_bytes_raw(), digest, upload.signature, "clinic-a")
    with pytest.raises(IdentityError, match="not signed"):
        verify_digest(key.public_key().public_bytes_raw(), bytes(32), upload.signature, "clinic-a")
