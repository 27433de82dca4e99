"""What a client signs when it uploads: one canonical digest, computed alike on both sides.

The digest binds the upload to the federation, the run, the round, the client and the key epoch, so that
no part of it can be replayed elsewhere; it is also the content hash that makes pushes idempotent.
"""

import hashlib
import struct
from collections.abc import Sequence

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedmosaic.protos.errors import IdentityError
from fedmosaic.protos.messages import LedgerHead, Profile, Section, SectionHeader, Upload

_LABEL = b"fedmosaic/upload/v1"
_LEDGER_LABEL = b"fedmosaic/ledger-head/v1"


def ledger_digest(*, federation: str, client_id: str, head: bytes) -> bytes:
    """Digest of the head of a privacy ledger that a client enrols with: SHA-256, 32 bytes."""
    return fields_digest([_LEDGER_LABEL, federation.encode(), client_id.encode(), head])


def upload_digest(
    *,
    federation: str,
    run_id: str,
    round_number: int,
    client_id: str,
    key_epoch: int,
    sections: Sequence[SectionHeader],
    profile: Profile | bytes | None,
    ledger: LedgerHead | None = None,
) -> bytes:
    """SHA-256 of one upload, its sections in the order of sending; of the profile its digest is enough."""
    fields = [_LABEL, federation.encode(), run_id.encode(), number(round_number), client_id.encode()]
    fields += [number(key_epoch), number(len(sections))]
    for section in sections:
        fields += [section.name.encode(), number(section.size), section.sha256]
    fields.append(profile.digest() if isinstance(profile, Profile) else profile or b"")
    if ledger is not None:
        fields += [ledger.head, ledger.follows]
    return fields_digest(fields)


def sign_upload(
    key: Ed25519PrivateKey,
    *,
    federation: str,
    run_id: str,
    round_number: int,
    client_id: str,
    key_epoch: int,
    attempt_id: str,
    sections: tuple[Section, ...],
    profile: Profile | None,
    ledger: LedgerHead | None = None,
) -> Upload:
    """Build an upload and sign its digest; see `upload_digest` and `Upload` for the arguments."""
    digest = upload_digest(
        federation=federation,
        run_id=run_id,
        round_number=round_number,
        client_id=client_id,
        key_epoch=key_epoch,
        sections=[section.header() for section in sections],
        profile=profile,
        ledger=ledger,
    )
    return Upload(round_number, attempt_id, key_epoch, sections, profile, key.sign(digest), ledger)


def verify_digest(public_key: bytes, digest: bytes, signature: bytes, client_id: str) -> None:
    """Check a client's signature over an upload's digest; IdentityError if it is not by this key."""
    if not verifies(public_key, signature, digest):
        raise IdentityError(
            f"the upload is not signed by the identity key of {client_id!r} for this federation, run, round "
            "and key epoch: sign it again with the key the roster names, after enrolling in the present run"
        )


def verifies(public_key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether a signature over a message is by an Ed25519 key (raw, 32 bytes)."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def fields_digest(fields: Sequence[bytes]) -> bytes:
    """SHA-256 over fields that are each preceded by their length, so that no two lists have one encoding."""
    return hashlib.sha256(b"".join(number(len(field)) + field for field in fields)).digest()


def number(value: int) -> bytes:
    """A whole number as a field: 8 bytes, little-endian."""
    return struct.pack("<Q", value)
