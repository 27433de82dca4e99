"""Messages of the key agreement: fixed-length binary, signed, bound to one epoch of one member list.

    opening       body 8+32·5+8 | signature 64          every member to all, through the server
    sealed box    body | AES-256-GCM ciphertext | signature 64       leader to each member
    confirmation  body | tag 32 | signature 64          every member to all

Every message starts with its magic and names what it belongs to; every field but the fresh ones is known to
the reader beforehand and compared. Signatures are Ed25519 over a label and everything before the signature.
"""

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedmosaic.protos.errors import KeyAgreementError

SIGNATURE_BYTES = 64
_LABEL = b"fedmosaic/key-agreement/v1\n"
_OPENING = struct.Struct("<8s32s32s32s32sQ32s")
_BOX = struct.Struct("<8s32s32s32s32s")
_CONFIRMATION = struct.Struct("<8s32s32s32s32s")
OPENING_BYTES = _OPENING.size + SIGNATURE_BYTES
CONFIRMATION_BYTES = _CONFIRMATION.size + SIGNATURE_BYTES
_OPENING_MAGIC = b"FMKOPEN1"
_BOX_MAGIC = b"FMKSEAL1"
_CONFIRMATION_MAGIC = b"FMKCONF1"


@dataclass(frozen=True)
class Epoch:
    """What every member must agree on before it opens an epoch.

    Attributes:
        federation: Name of the federation.
        number: Epoch, never used before; 0 … 2**64 − 1.
        roster_hash: 32 bytes, hash of the signed roster.
        parameters_hash: 32 bytes, digest of the encryption parameters.
        members: Ids of all members that take part, in ascending order.
        identity_keys: Raw Ed25519 public key (32 bytes) of every member that takes part.
    """

    federation: str
    number: int
    roster_hash: bytes
    parameters_hash: bytes
    members: tuple[str, ...]
    identity_keys: Mapping[str, bytes]

    def federation_hash(self) -> bytes:
        """Return the SHA-256 of the federation's name."""
        return sha256(b"federation", self.federation.encode())

    def terms_hash(self) -> bytes:
        """Return the SHA-256 of roster, parameters and the list of members with their identity keys."""
        parts = [self.roster_hash, self.parameters_hash]
        for member in self.members:
            parts += [member.encode(), self.identity_keys[member]]
        return sha256(b"terms", *parts)


def sha256(label: bytes, *parts: bytes) -> bytes:
    """Return the SHA-256 of a label and parts, each preceded by its length, so that no two inputs collide."""
    state = hashlib.sha256(_LABEL)
    for part in (label, *parts):
        state.update(struct.pack("<Q", len(part)))
        state.update(part)
    return state.digest()


def write_opening(epoch: Epoch, member: str, public_key: bytes, identity: Ed25519PrivateKey) -> bytes:
    """Return the signed opening of a member with its ephemeral X25519 key (32 bytes)."""
    body = _OPENING.pack(
        _OPENING_MAGIC,
        epoch.federation_hash(),
        epoch.terms_hash(),
        epoch.parameters_hash,
        sha256(b"member", member.encode()),
        epoch.number,
        public_key,
    )
    return _signed(body, identity)


def read_opening(epoch: Epoch, member: str, message: bytes) -> bytes:
    """Check the opening of a member and return its ephemeral X25519 key (32 bytes).

    Raises:
        KeyAgreementError: Naming the member and the first thing that is wrong.
    """
    what = f"opening of {member!r}"
    body = _verified(what, message, OPENING_BYTES, epoch.identity_keys[member])
    magic, federation, terms, parameters, sender, number, public_key = _OPENING.unpack(body)
    _expect(what, "kind of message", magic, _OPENING_MAGIC)
    _expect(what, "federation", federation, epoch.federation_hash())
    _expect(what, "member", sender, sha256(b"member", member.encode()))
    if number != epoch.number:
        raise KeyAgreementError(
            f"{what} is of epoch {number}, expected {epoch.number}: it was replayed or is late"
        )
    _expect(what, "set of encryption parameters", parameters, epoch.parameters_hash)
    _expect(what, "roster or list of members", terms, epoch.terms_hash())
    return bytes(public_key)


def write_box(
    transcript: bytes,
    recipient: str,
    commitment: bytes,
    public_key: bytes,
    ciphertext: bytes,
    identity: Ed25519PrivateKey,
) -> bytes:
    """Return the leader's signed box for one member."""
    name = sha256(b"member", recipient.encode())
    return _signed(_BOX.pack(_BOX_MAGIC, transcript, name, commitment, public_key) + ciphertext, identity)


def read_box(
    transcript: bytes, recipient: str, leader: str, leader_key: bytes, message: bytes, ciphertext_bytes: int
) -> tuple[bytes, bytes, bytes]:
    """Check the leader's box for a member; return commitment, ephemeral key and ciphertext.

    Raises:
        KeyAgreementError: Naming the first thing that is wrong.
    """
    what = f"sealed key of leader {leader!r}"
    body = _verified(what, message, _BOX.size + ciphertext_bytes + SIGNATURE_BYTES, leader_key)
    magic, found, name, commitment, public_key = _BOX.unpack_from(body)
    _expect(what, "kind of message", magic, _BOX_MAGIC)
    _expect(what, "set of openings", found, transcript)
    _expect(what, "recipient", name, sha256(b"member", recipient.encode()))
    return commitment, public_key, body[_BOX.size :]


def write_confirmation(
    transcript: bytes, member: str, commitment: bytes, tag: bytes, identity: Ed25519PrivateKey
) -> bytes:
    """Return a member's signed statement of the key it holds: the commitment, and a tag made with the key."""
    name = sha256(b"member", member.encode())
    return _signed(_CONFIRMATION.pack(_CONFIRMATION_MAGIC, transcript, name, commitment, tag), identity)


def read_confirmation(
    transcript: bytes, member: str, identity_key: bytes, message: bytes
) -> tuple[bytes, bytes]:
    """Check a member's confirmation and return its commitment and tag.

    Raises:
        KeyAgreementError: Naming the member and the first thing that is wrong.
    """
    what = f"confirmation of {member!r}"
    body = _verified(what, message, CONFIRMATION_BYTES, identity_key)
    magic, found, name, commitment, tag = _CONFIRMATION.unpack(body)
    _expect(what, "kind of message", magic, _CONFIRMATION_MAGIC)
    _expect(what, "member", name, sha256(b"member", member.encode()))
    _expect(what, "set of openings", found, transcript)
    return commitment, tag


def _signed(body: bytes, identity: Ed25519PrivateKey) -> bytes:
    return body + identity.sign(_LABEL + body)


def _verified(what: str, message: bytes, length: int, identity_key: bytes) -> bytes:
    if len(message) != length:
        raise KeyAgreementError(f"{what} has {len(message)} bytes, expected {length}")
    body, signature = message[:-SIGNATURE_BYTES], message[-SIGNATURE_BYTES:]
    try:
        Ed25519PublicKey.from_public_bytes(identity_key).verify(signature, _LABEL + body)
    except (InvalidSignature, ValueError):
        raise KeyAgreementError(
            f"{what} is not signed by the identity key that the roster pins: it was altered or is forged"
        ) from None
    return body


def _expect(what: str, field: str, found: bytes, expected: bytes) -> None:
    if found != expected:
        raise KeyAgreementError(f"{what} is for another {field} than expected")
