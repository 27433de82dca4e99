"""The server's part in one sum: pass messages on, add masked vectors, take the masks off the sum."""

from collections.abc import Collection, Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fedmosaic.privacy.secureaggregation.masks import (
    WordArray,
    expand,
    from_words,
    pair_mask_key,
    private_key,
    self_mask_key,
    unpack,
)
from fedmosaic.privacy.secureaggregation.messages import (
    ENVELOPE_BYTES,
    Opening,
    Unmasking,
    check_left,
    check_opening,
    check_survivor_signatures,
    transcript,
)
from fedmosaic.privacy.secureaggregation.shamir import PRIME, combine, lagrange_weights
from fedmosaic.privacy.secureaggregation.terms import SumTerms
from fedmosaic.protos.errors import EncryptionError

T = TypeVar("T")


class SumCollector:
    """One sum at the server. What a member sends is checked when it comes, and refused by name."""

    def __init__(self, terms: SumTerms) -> None:
        self._terms = terms
        self._openings: dict[str, Opening] = {}
        self._transcript = b""
        self._envelopes: dict[str, Mapping[str, bytes]] = {}
        self._survivors: set[str] = set()
        self._signatures: dict[str, bytes] = {}
        self._unmaskings: dict[str, Unmasking] = {}
        self._total: WordArray | None = None

    def add_opening(self, member: str, opening: Opening) -> None:
        """Step 1; a repeated one must be the same. One that is not signed for this sum harms nobody else."""
        if member in self._terms.members:
            check_opening(self._terms, member, opening)
        _keep(member, self._terms.members, self._openings, opening, "opening")

    def close_openings(self) -> dict[str, Opening]:
        """Everybody's openings, to be given to everybody.

        Raises:
            EncryptionError: one is forged, or too few came.
        """
        self._transcript = transcript(self._terms, self._openings)
        return dict(self._openings)

    def add_envelopes(self, member: str, envelopes: Mapping[str, bytes]) -> None:
        """Step 2."""
        if set(envelopes) != set(self._openings) - {member}:
            raise EncryptionError(f"{member!r} did not seal shares for exactly the others who opened")
        if any(len(envelope) != ENVELOPE_BYTES for envelope in envelopes.values()):
            raise EncryptionError(f"{member!r} sent an envelope that is not of {ENVELOPE_BYTES} bytes")
        _keep(member, self._openings, self._envelopes, dict(envelopes), "set of envelopes")

    def close_envelopes(self) -> None:
        """EncryptionError if too few shared."""
        check_left("shared their masks", self._envelopes, self._terms, len(self._openings))

    def envelopes_for(self, member: str) -> dict[str, bytes]:
        """Sender → envelope for a member."""
        return {sender: sealed[member] for sender, sealed in self._envelopes.items() if sender != member}

    def add_vector(self, member: str, masked: bytes) -> None:
        """Step 3. Added at once, so memory does not grow with the group."""
        if member not in self._envelopes or member in self._survivors:
            raise EncryptionError(f"a vector of {member!r}, who did not share its masks or has sent one")
        words = unpack(masked, self._terms.dimensions, self._terms.bits)
        self._total = words.copy() if self._total is None else np.add(self._total, words, out=self._total)
        self._survivors.add(member)

    def close_vectors(self) -> tuple[str, ...]:
        """Who contributes, to be given to everybody; a vector that comes later is not added.

        Raises:
            EncryptionError: too few are left to form the sum or to take the masks off.
        """
        check_left("sent their vectors", self._survivors, self._terms, len(self._openings))
        return tuple(sorted(self._survivors))

    def add_signature(self, member: str, signature: bytes) -> None:
        """Step 4; EncryptionError if it is not the member's for this list."""
        check_survivor_signatures(self._terms, self._transcript, self._survivors, {member: signature}, 1)
        self._signatures[member] = signature

    def signatures(self) -> dict[str, bytes]:
        """Member → signature on the list of contributors."""
        return dict(self._signatures)

    def add_unmasking(self, member: str, unmasking: Unmasking) -> None:
        """Step 5."""
        vanished = set(self._envelopes) - self._survivors
        if set(unmasking.self_masks) != self._survivors or set(unmasking.mask_keys) != vanished:
            raise EncryptionError(f"{member!r} sent shares of other members than those that are asked for")
        shares = (*unmasking.self_masks.values(), *unmasking.mask_keys.values())
        if not all(0 <= value < PRIME for value in shares):
            raise EncryptionError(f"{member!r} sent a number that is no share")
        _keep(member, self._survivors, self._unmaskings, unmasking, "set of shares")

    @property
    def can_finish(self) -> bool:
        """Whether shares of enough members are here."""
        return len(self._unmaskings) >= self._needed

    def finish(self) -> npt.NDArray[np.int64]:
        """The sum over the contributors: (D,) int64.

        Raises:
            EncryptionError: too few shares came, or those of a member do not give its key back: somebody
                lied, and nothing says who.
        """
        if not self.can_finish or self._total is None:
            raise EncryptionError(
                f"shares of {len(self._unmaskings)} members came, {self._needed} are needed"
            )
        order = sorted(self._openings)
        senders = sorted(self._unmaskings)[: self._needed]
        weights = lagrange_weights([order.index(sender) + 1 for sender in senders])
        digest, bits, size = self._terms.digest(), self._terms.bits, self._terms.dimensions

        def seed(kind: str, member: str) -> int:
            shares = {n: getattr(self._unmaskings[sender], kind)[member] for n, sender in enumerate(senders)}
            return combine(shares, weights)

        total = self._total.copy()
        for member in sorted(self._survivors):
            total -= expand(self_mask_key(seed("self_masks", member), digest), size, bits)
        for member in sorted(set(self._envelopes) - self._survivors):
            key = private_key(seed("mask_keys", member), digest)
            if key.public_key().public_bytes_raw() != self._openings[member].mask_key:
                raise EncryptionError(f"the shares of {member!r}'s mask key do not fit together")
            for other in self._survivors:
                pair = (member, other)
                shared = pair_mask_key(key, self._openings[other].mask_key, self._transcript, pair)
                mask = expand(shared, size, bits)
                # What the survivor put in, with its sign.
                total = total - mask if other < member else total + mask
        return from_words(total, bits)

    @property
    def _needed(self) -> int:
        return self._terms.threshold(len(self._openings))


def _keep(member: str, allowed: Collection[str], kept: dict[str, T], message: T, what: str) -> None:
    """A member says a thing once: the same again is a retry, another is refused."""
    if member not in allowed:
        raise EncryptionError(f"an {what} of {member!r}, who is not waited for")
    if kept.setdefault(member, message) != message:
        raise EncryptionError(f"{member!r} sent a second, other {what}")
