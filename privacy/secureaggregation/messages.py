"""What members send each other and the server for one sum; each is bound to the sum's terms.

Sizes for a group of m members and D coordinates, up per member:

    opening    32 + 32 + 64 bytes                 keys, signed
    envelopes  48·(m − 1)                         shares, one sealed for each other member
    vector     ⌈D·bits/8⌉                         masked
    survivors  64                                 signature
    shares     16·m                               one for each member that opened
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedmosaic.privacy.groupkey.messages import sha256
from fedmosaic.privacy.secureaggregation.masks import agree, derive
from fedmosaic.privacy.secureaggregation.shamir import PRIME, SHARE_BYTES
from fedmosaic.privacy.secureaggregation.terms import SumTerms
from fedmosaic.protos.errors import EncryptionError

KEY_BYTES = 32
OPENING_BYTES = 2 * KEY_BYTES + 64
ENVELOPE_BYTES = 2 * SHARE_BYTES + 16
# Every envelope has a key of its own, so the nonce may be constant.
_NONCE = bytes(12)
# A key of small order agrees on nothing with any other, whichever it is.
_PROBE = X25519PrivateKey.from_private_bytes(bytes(32))


@dataclass(frozen=True)
class Opening:
    """A member takes part: two fresh X25519 public keys, for masks and for envelopes, and its signature."""

    mask_key: bytes
    envelope_key: bytes
    signature: bytes

    def encoded(self) -> bytes:
        """128 bytes."""
        return self.mask_key + self.envelope_key + self.signature

    @classmethod
    def decoded(cls, data: bytes) -> "Opening":
        """What `encoded` gave; EncryptionError for another length."""
        if len(data) != OPENING_BYTES:
            raise EncryptionError(f"an opening of {len(data)} bytes, expected {OPENING_BYTES}")
        return cls(data[:KEY_BYTES], data[KEY_BYTES : 2 * KEY_BYTES], data[2 * KEY_BYTES :])


@dataclass(frozen=True)
class Unmasking:
    """Shares by member: of the self-mask of who contributes, of the mask key of who vanished."""

    self_masks: Mapping[str, int]
    mask_keys: Mapping[str, int]

    def encoded(self) -> bytes:
        """16 bytes per member, in ascending order of names: who contributes says which kind each is."""
        shares = {**self.self_masks, **self.mask_keys}
        return b"".join(shares[member].to_bytes(SHARE_BYTES, "little") for member in sorted(shares))

    @classmethod
    def decoded(cls, data: bytes, shared: Collection[str], survivors: Collection[str]) -> "Unmasking":
        """What `encoded` gave, of the members that shared; EncryptionError for another length."""
        shares = dict(zip(sorted(shared), split(data, SHARE_BYTES, len(shared)), strict=True))
        numbers = {member: int.from_bytes(share, "little") for member, share in shares.items()}
        return cls(
            {member: number for member, number in numbers.items() if member in survivors},
            {member: number for member, number in numbers.items() if member not in survivors},
        )


def sign_opening(
    terms: SumTerms, member: str, mask_key: bytes, envelope_key: bytes, identity: Ed25519PrivateKey
) -> Opening:
    """A member's opening, signed with its long-term key."""
    message = sha256(b"secure-sum/opening", terms.digest(), member.encode(), mask_key, envelope_key)
    return Opening(mask_key, envelope_key, identity.sign(message))


def transcript(terms: SumTerms, openings: Mapping[str, Opening]) -> bytes:
    """SHA-256 of the terms and of who opened with which keys, after every signature is checked.

    Raises:
        EncryptionError: naming the member whose opening is foreign, forged or malformed; or too few opened.
    """
    foreign = sorted(set(openings) - set(terms.members))
    if foreign:
        raise EncryptionError(f"openings of {', '.join(foreign)}, who are not of this group")
    check_number("opened", openings, terms)
    parts = [terms.digest()]
    for member in sorted(openings):
        check_opening(terms, member, openings[member])
        parts += [member.encode(), openings[member].mask_key, openings[member].envelope_key]
    return sha256(b"secure-sum/openings", *parts)


def check_opening(terms: SumTerms, member: str, opening: Opening) -> None:
    """EncryptionError if a member of the group did not sign its opening for this sum, or with a bad key."""
    keys = (opening.mask_key, opening.envelope_key)
    signed = sha256(b"secure-sum/opening", terms.digest(), member.encode(), *keys)
    if any(len(key) != KEY_BYTES for key in keys) or not _verifies(
        terms.identity_keys[member], opening.signature, signed
    ):
        raise EncryptionError(f"the opening of {member!r} is not signed by it for this sum")
    try:
        for key in keys:
            agree(_PROBE, key)
    except EncryptionError:
        # Found later, it would end the sum for everybody but the one who sent it.
        raise EncryptionError(f"{member!r} opened with a key of small order") from None


def seal_shares(
    agreed: bytes, transcript: bytes, sender: str, recipient: str, shares: tuple[int, int]
) -> bytes:
    """An envelope: shares of the sender's self-mask and mask key, for one recipient's eyes."""
    plain = b"".join(share.to_bytes(SHARE_BYTES, "little") for share in shares)
    return AESGCM(_envelope_key(agreed, transcript, sender, recipient)).encrypt(_NONCE, plain, None)


def open_shares(
    agreed: bytes, transcript: bytes, sender: str, recipient: str, envelope: bytes
) -> tuple[int, int]:
    """What `seal_shares` was given.

    Raises:
        EncryptionError: it was altered, or sealed by or for somebody else, or for another sum.
    """
    if len(envelope) != ENVELOPE_BYTES:
        raise EncryptionError(
            f"the envelope of {sender!r} has {len(envelope)} bytes, expected {ENVELOPE_BYTES}"
        )
    key = _envelope_key(agreed, transcript, sender, recipient)
    try:
        plain = AESGCM(key).decrypt(_NONCE, envelope, None)
    except InvalidTag:
        raise EncryptionError(
            f"the envelope of {sender!r} was altered, or is of another sum or for another member"
        ) from None
    first = int.from_bytes(plain[:SHARE_BYTES], "little")
    second = int.from_bytes(plain[SHARE_BYTES:], "little")
    if first >= PRIME or second >= PRIME:
        raise EncryptionError(f"the envelope of {sender!r} holds no shares")
    return first, second


def survivors_digest(transcript: bytes, survivors: Collection[str]) -> bytes:
    """What members sign: these are the members whose vectors are added."""
    return sha256(b"secure-sum/survivors", transcript, *(member.encode() for member in sorted(survivors)))


def check_survivor_signatures(
    terms: SumTerms,
    transcript: bytes,
    survivors: Collection[str],
    signatures: Mapping[str, bytes],
    needed: int,
) -> None:
    """Make sure that enough survivors agree on who survived.

    Raises:
        EncryptionError: a signature is foreign or does not fit, or there are fewer than `needed`.
    """
    digest = survivors_digest(transcript, survivors)
    for member, signature in signatures.items():
        if member not in survivors or not _verifies(terms.identity_keys[member], signature, digest):
            raise EncryptionError(f"{member!r} did not sign this list of {len(survivors)} contributors")
    if len(signatures) < needed:
        raise EncryptionError(
            f"{len(signatures)} members agree on the contributors, {needed} must: a server could otherwise "
            "open the sums of two lists"
        )


def split(data: bytes, size: int, count: int) -> list[bytes]:
    """Pieces of equal size; EncryptionError if there are not so many."""
    if len(data) != size * count:
        raise EncryptionError(f"{len(data)} bytes, expected {count} pieces of {size}")
    return [data[start : start + size] for start in range(0, len(data), size)]


def check_number(what: str, members: Collection[str], terms: SumTerms) -> None:
    """EncryptionError if fewer members are left than a sum may be formed of."""
    if len(members) < terms.minimum:
        raise EncryptionError(
            f"{len(members)} members {what}, a sum needs {terms.minimum}: with fewer, the noise is too little"
        )


def check_left(what: str, members: Collection[str], terms: SumTerms, opened: int) -> None:
    """EncryptionError if fewer members are left than a sum may be formed of, or than open its masks.

    Args:
        what: they did, for the message.
        members: who is left.
        terms: of the sum.
        opened: members that opened it.
    """
    check_number(what, members, terms)
    needed = terms.threshold(opened)
    if len(members) < needed:
        raise EncryptionError(
            f"{len(members)} members {what}, {needed} of {opened} are needed to take the masks off"
        )


def _envelope_key(agreed: bytes, transcript: bytes, sender: str, recipient: str) -> bytes:
    names = sha256(b"secure-sum/envelope", sender.encode(), recipient.encode())
    return derive(agreed, b"fedmosaic/secure-sum/envelope", transcript, names)


def _verifies(key: bytes, signature: bytes, message: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True
