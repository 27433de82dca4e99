"""Messages of the key agreement: fixed-length binary, signed, bound to one epoch of one member list.

    opening       magic 8, federation, terms, parameters, member 32 each, epoch 8, key 32 | signature 64
    sealed box    magic 8, transcript, member, commitment 32 each | sealed secrets | signature 64
    confirmation  magic 8, transcript, member, commitment 32 each | tag 32 | signature 64

Every field but the fresh ones is known to the reader beforehand and compared. Signatures are Ed25519 over a
label and everything before the signature.
"""

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmosaic.protos.errors import KeyAgreementError
from fedmosaic.protos.signing import verifies

SIGNATURE_BYTES = 64
TAG_BYTES = 32
_LABEL = b"fedmosaic/key-agreement/v1\n"
_OPENING = struct.Struct("<8s32s32s32s32sQ32s")
_ABOUT_KEY = struct.Struct("<8s32s32s32s")
OPENING_BYTES = _OPENING.size + SIGNATURE_BYTES
CONFIRMATION_BYTES = _ABOUT_KEY.size + TAG_BYTES + SIGNATURE_BYTES
_OPENING_MAGIC = b"FMKOPEN1"
BOX = b"FMKSEAL2"
CONFIRMATION = b"FMKCONF1"


@dataclass(frozen=True)
class Epoch:
    """What every member must agree on before it opens an epoch whose number was never used.

    Members are in ascending order, identity keys raw Ed25519 public keys (32 bytes) by member.
    """

    federation: str
    number: int
    roster_hash: bytes
    parameters_hash: bytes
    members: tuple[str, ...]
    identity_keys: Mapping[str, bytes]

    def federation_hash(self) -> bytes:
        """SHA-256 of the federation's name."""
        return sha256(b"federation", self.federation.encode())

    def terms_hash(self) -> bytes:
        """SHA-256 of roster, parameters and the list of members with their identity keys."""
        parts = [self.roster_hash, self.parameters_hash]
        for member in self.members:
            parts += [member.encode(), self.identity_keys[member]]
        return sha256(b"terms", *parts)


def sha256(label: bytes, *parts: bytes) -> bytes:
    """SHA-256 of a label and parts, each preceded by its length, so that no two inputs collide."""
    state = hashlib.sha256(_LABEL)
    for part in (label, *parts):
        state.update(struct.pack("<Q", len(part)))
        state.update(part)
    return state.digest()


def write_opening(epoch: Epoch, member: str, public_key: bytes, identity: Ed25519PrivateKey) -> bytes:
    """The signed opening of a member with its ephemeral X25519 key (32 bytes)."""
    hashes = epoch.federation_hash(), epoch.terms_hash(), epoch.parameters_hash, _name_hash(member)
    return _signed(_OPENING.pack(_OPENING_MAGIC, *hashes, epoch.number, public_key), identity)


def read_opening(epoch: Epoch, member: str, message: bytes) -> bytes:
    """Check the opening of a member and return its ephemeral X25519 key (32 bytes)."""
    what = f"opening of {member!r}"
    body = _verified(what, message, OPENING_BYTES, epoch.identity_keys[member])
    magic, federation, terms, parameters, sender, number, public_key = _OPENING.unpack(body)
    _expect(what, "kind of message", magic, _OPENING_MAGIC)
    _expect(what, "federation", federation, epoch.federation_hash())
    _expect(what, "member", sender, _name_hash(member))
    if number != epoch.number:
        raise KeyAgreementError(
            f"{what} is of epoch {number}, expected {epoch.number}: it was replayed or is late"
        )
    _expect(what, "set of encryption parameters", parameters, epoch.parameters_hash)
    _expect(what, "roster or list of members", terms, epoch.terms_hash())
    return bytes(public_key)


def write_about_key(
    kind: bytes,
    transcript: bytes,
    member: str,
    commitment: bytes,
    content: bytes,
    identity: Ed25519PrivateKey,
) -> bytes:
    """A signed message about the agreed key: a `BOX` for a member, or the `CONFIRMATION` of one."""
    return _signed(_ABOUT_KEY.pack(kind, transcript, _name_hash(member), commitment) + content, identity)


def read_about_key(
    what: str,
    kind: bytes,
    transcript: bytes,
    member: str,
    identity_key: bytes,
    message: bytes,
    content_bytes: int,
) -> tuple[bytes, bytes]:
    """Check a message about the agreed key; return the commitment and the content, both still unchecked.

    A box is for a member and signed by the leader, a confirmation is of a member and signed by it.
    """
    body = _verified(what, message, _ABOUT_KEY.size + content_bytes + SIGNATURE_BYTES, identity_key)
    magic, found, name, commitment = _ABOUT_KEY.unpack_from(body)
    _expect(what, "kind of message", magic, kind)
    _expect(what, "set of openings", found, transcript)
    _expect(what, "member", name, _name_hash(member))
    return commitment, body[_ABOUT_KEY.size :]


def _name_hash(member: str) -> bytes:
    return sha256(b"member", member.encode())


def _signed(body: bytes, identity: Ed25519PrivateKey) -> bytes:
    return body + identity.sign(_LABEL + body)


def _verified(what: str, message: bytes, length: int, identity_key: bytes) -> bytes:
    if len(message) != length:
        raise KeyAgreementError(f"{what} has {len(message)} bytes, expected {length}")
    body, signature = message[:-SIGNATURE_BYTES], message[-SIGNATURE_BYTES:]
    if not verifies(identity_key, signature, _LABEL + body):
        raise KeyAgreementError(
            f"{what} is not signed by the identity key that the roster pins: it was altered or is forged"
        )
    return body


def _expect(what: str, field: str, found: bytes, expected: bytes) -> None:
    if found != expected:
        raise KeyAgreementError(f"{what} is for another {field} than expected")
