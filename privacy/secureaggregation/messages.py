"""What members send each other and the server for one sum; each is bound to the sum's terms.

Sizes for m members who opened and D coordinates, up per member:

    opening    32 + 32 + 32 + 64 bytes            keys, check of the self-mask, signed
    envelopes  64·m                               shares, sealed for each member, and checks of them
    vector     ⌈D·bits/8⌉                         masked
    survivors  64                                 signature
    shares     16·m                               one for each member that shared

A false share has an author: whoever seals shares publishes a hash of each. A share that is given away and has
another hash was changed by who gives it; k with the right hashes that do not lead to the announced secret
were made so by who sealed them. The hashes also authenticate an envelope: a server that changes one would
have to find the hash of a share that it does not know.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmosaic.privacy.groupkey.messages import sha256
from fedmosaic.privacy.secureaggregation.masks import derive
from fedmosaic.privacy.secureaggregation.shamir import PRIME, SHARE_BYTES
from fedmosaic.privacy.secureaggregation.terms import SumTerms
from fedmosaic.protos.errors import EncryptionError
from fedmosaic.protos.signing import verifies

KEY_BYTES = 32
OPENING_BYTES = 3 * KEY_BYTES + 64
CHECK_BYTES = 16
ENVELOPE_BYTES = 2 * SHARE_BYTES + 2 * CHECK_BYTES
_MISSING = bytes([255]) * SHARE_BYTES
# Keys of small order agree on nothing with any other, whichever it is: coordinates of the points of order 1,
# 2, 4 and 8 of Curve25519 and its twist, also where they are not reduced modulo p = 2^255 − 19.
_SMALL_ORDER = frozenset(
    number.to_bytes(32, "little")
    for number in (
        0,
        1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
        2**255 - 20,
        2**255 - 19,
        2**255 - 18,
    )
)


@dataclass(frozen=True)
class Opening:
    """A member takes part: fresh X25519 public keys for masks and envelopes, and its signature on all of it.

    `self_check` is the `seed_check` of its self-mask, by which the server knows whether it has the right one.
    """

    mask_key: bytes
    envelope_key: bytes
    self_check: bytes
    signature: bytes

    @property
    def content(self) -> tuple[bytes, bytes, bytes]:
        """What is signed."""
        return self.mask_key, self.envelope_key, self.self_check

    def encoded(self) -> bytes:
        """160 bytes."""
        return b"".join((*self.content, self.signature))

    @classmethod
    def decoded(cls, data: bytes) -> "Opening":
        """What `encoded` gave; EncryptionError for another length."""
        if len(data) != OPENING_BYTES:
            raise EncryptionError(f"an opening of {len(data)} bytes, expected {OPENING_BYTES}")
        mask_key, envelope_key, self_check = split(data[: 3 * KEY_BYTES], KEY_BYTES, 3)
        return cls(mask_key, envelope_key, self_check, data[3 * KEY_BYTES :])


@dataclass(frozen=True)
class Unmasking:
    """A share by member who shared: of the self-mask of who contributes, of the mask key of who vanished.

    None where that member's envelope did not hold what it announced.
    """

    shares: Mapping[str, int | None]

    def encoded(self) -> bytes:
        """16 bytes per member, in ascending order of names: who contributes says which kind each is."""
        ordered = (self.shares[member] for member in sorted(self.shares))
        return b"".join(_MISSING if s is None else s.to_bytes(SHARE_BYTES, "little") for s in ordered)

    @classmethod
    def decoded(cls, data: bytes, shared: Collection[str]) -> "Unmasking":
        """What `encoded` gave, of the members that shared; EncryptionError if it is no list of shares."""
        shares: dict[str, int | None] = {}
        for member, piece in zip(sorted(shared), split(data, SHARE_BYTES, len(shared)), strict=True):
            shares[member] = None if piece == _MISSING else int.from_bytes(piece, "little")
            if (shares[member] or 0) >= PRIME:
                raise EncryptionError(f"the number that was sent as a share of {member!r} is none")
        return cls(shares)


def sign_opening(
    terms: SumTerms, member: str, content: tuple[bytes, bytes, bytes], identity: Ed25519PrivateKey
) -> Opening:
    """A member's opening, signed with its long-term key."""
    return Opening(*content, identity.sign(_opening_digest(terms, member, content)))


def transcript(terms: SumTerms, openings: Mapping[str, Opening]) -> bytes:
    """SHA-256 of the terms and of who opened with which keys; EncryptionError if too few did."""
    check_number("opened", openings, terms)
    parts = [terms.digest]
    for member in sorted(openings):
        parts += [member.encode(), *openings[member].content]
    return sha256(b"secure-sum/openings", *parts)


def check_opening(terms: SumTerms, member: str, opening: Opening) -> None:
    """EncryptionError if a stranger opened, or a member that did not sign it for this sum, or a bad key."""
    if member not in terms.members:
        raise EncryptionError(f"an opening of {member!r}, who is not of this group")
    signed = _opening_digest(terms, member, opening.content)
    if any(len(part) != KEY_BYTES for part in opening.content) or not verifies(
        terms.identity_keys[member], opening.signature, signed
    ):
        raise EncryptionError(f"the opening of {member!r} is not signed by it for this sum")
    # X25519 leaves the highest bit out. Found later, it would end the sum for all but the one who sent it.
    if any(key[:31] + bytes([key[31] & 127]) in _SMALL_ORDER for key in opening.content[:2]):
        raise EncryptionError(f"{member!r} opened with a key of small order")


def seed_check(digest: bytes, member: str, seed: int) -> bytes:
    """32 bytes by which a self-mask's seed of 127 bits is recognised and not found."""
    return sha256(b"secure-sum/seed", digest, member.encode(), seed.to_bytes(SHARE_BYTES, "little"))


def share_check(transcript: bytes, sender: str, recipient: str, kind: int, share: int) -> bytes:
    """16 bytes by which a share is recognised: of a self-mask (kind 0) or a mask key (kind 1)."""
    names = (transcript, sender.encode(), recipient.encode())
    piece = share.to_bytes(SHARE_BYTES, "little")
    return sha256(b"secure-sum/share", *names, bytes([kind]), piece)[:CHECK_BYTES]


def seal_shares(
    agreed: bytes, transcript: bytes, sender: str, recipient: str, shares: tuple[int, int]
) -> bytes:
    """An envelope: shares of the sender's self-mask and mask key for one recipient, and their checks."""
    plain = b"".join(share.to_bytes(SHARE_BYTES, "little") for share in shares)
    sealed = _xor(plain, _pad(agreed, transcript, sender, recipient))
    return sealed + _checks(transcript, sender, recipient, shares)


def open_shares(
    agreed: bytes, transcript: bytes, sender: str, recipient: str, envelope: bytes
) -> tuple[int, int] | None:
    """What `seal_shares` was given; None if it was altered, or sealed otherwise, or for another sum."""
    plain = _xor(envelope[: 2 * SHARE_BYTES], _pad(agreed, transcript, sender, recipient))
    shares = (
        int.from_bytes(plain[:SHARE_BYTES], "little"),
        int.from_bytes(plain[SHARE_BYTES:], "little"),
    )
    told = envelope[2 * SHARE_BYTES :]
    fits = max(shares) < PRIME and told == _checks(transcript, sender, recipient, shares)
    return shares if fits else None


def survivors_digest(transcript: bytes, survivors: Collection[str]) -> bytes:
    """What members sign: these are the members whose vectors are added."""
    return sha256(b"secure-sum/survivors", transcript, *(member.encode() for member in sorted(survivors)))


def check_survivor_signatures(
    terms: SumTerms, digest: bytes, survivors: Collection[str], signatures: Mapping[str, bytes], needed: int
) -> None:
    """EncryptionError unless enough survivors, and nobody else, signed a `survivors_digest`."""
    for member, signature in signatures.items():
        if member not in survivors or not verifies(terms.identity_keys[member], signature, digest):
            raise EncryptionError(f"{member!r} did not sign this list of {len(survivors)} contributors")
    if len(signatures) < needed:
        raise EncryptionError(
            f"{len(signatures)} members agree on the contributors, {needed} must: or two lists could be "
            "opened"
        )


def split(data: bytes, size: int, count: int) -> list[bytes]:
    """Pieces of equal size; EncryptionError if there are not so many."""
    if len(data) != size * count:
        raise EncryptionError(f"{len(data)} bytes, expected {count} pieces of {size}")
    return [data[start : start + size] for start in range(0, len(data), size)]


def check_number(what: str, members: Collection[str], terms: SumTerms) -> None:
    """EncryptionError if fewer members are left than a sum may be formed of."""
    if len(members) < terms.minimum:
        raise EncryptionError(f"{len(members)} members {what}, a sum needs {terms.minimum} for its noise")


def check_left(what: str, members: Collection[str], terms: SumTerms, opened: int) -> None:
    """EncryptionError if fewer members are left than a sum may be formed of, or than open its masks."""
    check_number(what, members, terms)
    needed = terms.threshold(opened)
    if len(members) < needed:
        raise EncryptionError(f"{len(members)} members {what}, {needed} of {opened} are needed to unmask")


def _opening_digest(terms: SumTerms, member: str, content: tuple[bytes, bytes, bytes]) -> bytes:
    return sha256(b"secure-sum/opening", terms.digest, member.encode(), *content)


def _checks(transcript: bytes, sender: str, recipient: str, shares: tuple[int, int]) -> bytes:
    return b"".join(
        share_check(transcript, sender, recipient, kind, share) for kind, share in enumerate(shares)
    )


def _pad(agreed: bytes, transcript: bytes, sender: str, recipient: str) -> bytes:
    """32 bytes that are used for one envelope alone."""
    names = sha256(b"secure-sum/envelope", sender.encode(), recipient.encode())
    return derive(agreed, b"fedmosaic/secure-sum/envelope", transcript, names)


def _xor(data: bytes, pad: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(data, pad, strict=True))
