"""The server's part in one sum: pass messages on, add masked vectors, take the masks off the sum."""

from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fedmosaic.privacy.secureaggregation import messages
from fedmosaic.privacy.secureaggregation.masks import (
    Masks,
    WordArray,
    from_words,
    pair_mask_key,
    private_key,
    self_mask_key,
    unpack,
)
from fedmosaic.privacy.secureaggregation.shamir import combine, lagrange_weights
from fedmosaic.privacy.secureaggregation.terms import SumTerms
from fedmosaic.protos.errors import EncryptionError

T = TypeVar("T")


class SumCollector:
    """One sum at the server. What a member sends is checked when it comes, and refused by name.

    Attributes:
        faults: member → what it has provably done.
        disputes: (recipient, sender) of envelopes that, says the recipient, did not hold what was announced:
            one of the two lies.
    """

    def __init__(self, terms: SumTerms) -> None:
        self.faults: dict[str, str] = {}
        self.disputes: set[tuple[str, str]] = set()
        self._terms = terms
        self._openings: dict[str, messages.Opening] = {}
        self._place: dict[str, int] = {}
        self._transcript = b""
        self._envelopes: dict[str, bytes] = {}
        self._survivors: set[str] = set()
        self._listed = b""
        self._signatures: dict[str, bytes] = {}
        self._unmasked: set[str] = set()
        self._shares: dict[str, dict[str, int]] = {}
        self._total: WordArray | None = None

    def add_opening(self, member: str, opening: messages.Opening) -> None:
        """Step 1; a repeated one must be the same. One that is not signed for this sum harms nobody else."""
        messages.check_opening(self._terms, member, opening)
        _keep(member, self._terms.members, self._openings, opening, "opening")

    def close_openings(self) -> dict[str, messages.Opening]:
        """Everybody's openings, to be given to everybody; EncryptionError if too few came."""
        self._transcript = messages.transcript(self._terms, self._openings)
        self._place = {member: place for place, member in enumerate(sorted(self._openings))}
        return dict(self._openings)

    def add_envelopes(self, member: str, envelopes: bytes) -> None:
        """Step 2: envelopes for all who opened, in ascending order of their names."""
        if len(envelopes) != messages.ENVELOPE_BYTES * len(self._openings):
            raise EncryptionError(f"{member!r} did not seal shares for exactly those who opened")
        _keep(member, self._openings, self._envelopes, envelopes, "set of envelopes")
        self._shares.setdefault(member, {})

    def close_envelopes(self) -> None:
        """EncryptionError if too few shared."""
        messages.check_left("shared their masks", self._envelopes, self._terms, len(self._openings))

    def envelopes_for(self, member: str) -> dict[str, bytes]:
        """Sender → envelope for a member."""
        start = messages.ENVELOPE_BYTES * self._place[member]
        end = start + messages.ENVELOPE_BYTES
        return {sender: sealed[start:end] for sender, sealed in self._envelopes.items()}

    def add_vector(self, member: str, masked: bytes) -> None:
        """Step 3. Added at once, so memory does not grow with the group."""
        if member not in self._envelopes or member in self._survivors:
            raise EncryptionError(f"a vector of {member!r}, who did not share its masks or has sent one")
        words = unpack(masked, self._terms.dimensions, self._terms.bits)
        self._total = words.copy() if self._total is None else np.add(self._total, words, out=self._total)
        self._survivors.add(member)

    def close_vectors(self) -> tuple[str, ...]:
        """Who contributes, to be given to everybody; a vector that comes later is not added."""
        messages.check_left("sent their vectors", self._survivors, self._terms, len(self._openings))
        self._listed = messages.survivors_digest(self._transcript, self._survivors)
        return tuple(sorted(self._survivors))

    def add_signature(self, member: str, signature: bytes) -> None:
        """Step 4; EncryptionError if it is not the member's for this list.

        Once k are here, as many as a member asks for, another is not looked at and not passed on: every
        member would check it too.
        """
        if len(self._signatures) < self._terms.threshold(len(self._openings)):
            messages.check_survivor_signatures(
                self._terms, self._listed, self._survivors, {member: signature}, 1
            )
            self._signatures[member] = signature

    def signatures(self) -> dict[str, bytes]:
        """Member → signature on the list of contributors, of the first k who signed it."""
        return dict(self._signatures)

    def add_unmasking(self, member: str, unmasking: messages.Unmasking) -> None:
        """Step 5."""
        if unmasking.shares.keys() != self._envelopes.keys():
            raise EncryptionError(f"{member!r} sent shares of other members than those that are asked for")
        if member not in self._survivors or member in self._unmasked:
            raise EncryptionError(f"shares of {member!r}, who sent no vector or has sent its shares")
        self._unmasked.add(member)
        for sender, share in unmasking.shares.items():
            if share is None:
                self.disputes.add((member, sender))
            else:
                self._shares[sender][member] = share

    @property
    def can_finish(self) -> bool:
        """Whether enough shares of every member's secret are here."""
        fewest = min(map(len, self._shares.values()), default=0)
        return fewest >= self._terms.threshold(len(self._openings))

    def finish(self) -> npt.NDArray[np.int64]:
        """The sum over the contributors: (D,) int64.

        EncryptionError if too few true shares are here. Whoever gave or sealed a false one is in `faults`;
        what comes later may suffice.
        """
        needed = self._terms.threshold(len(self._openings))
        if not self.can_finish or self._total is None:
            raise EncryptionError(
                f"shares of {len(self._unmasked)} members came, true ones of {needed} are needed"
                + self._blame()
            )
        weights = cache(lagrange_weights)
        seeds = {member: self._secret(member, needed, weights) for member in self._shares}
        digest, bits, size = self._terms.digest, self._terms.bits, self._terms.dimensions
        masks, total = Masks(size, bits), self._total.copy()
        for member, seed in seeds.items():
            if seed is None:
                raise EncryptionError("the masks of a member cannot be found" + self._blame())
            if member in self._survivors:
                total -= masks.of(self_mask_key(seed, digest))
                continue
            key = private_key(seed, digest)
            for other in self._survivors:
                pair = (member, other)
                shared = pair_mask_key(key, self._openings[other].mask_key, self._transcript, pair)
                # What the survivor put in, with its sign.
                change = np.subtract if other < member else np.add
                change(total, masks.of(shared), out=total)
        return from_words(total, bits)

    def _secret(
        self, member: str, needed: int, weights: Callable[[tuple[int, ...]], Sequence[int]]
    ) -> int | None:
        """Seed of a contributor's self-mask or of a vanished member's mask key; None if it is not found.

        False shares are looked for only where the first k lead to another secret than was announced.
        """
        shares = self._shares[member]
        while len(holders := sorted(shares)[:needed]) == needed:
            places = tuple(self._place[holder] + 1 for holder in holders)
            seed = combine([shares[holder] for holder in holders], weights(places))
            if self._announced(member, seed):
                return seed
            false = [holder for holder in holders if not self._was_sealed(member, holder)]
            if not false:
                self.faults[member] = "it sealed shares that do not lead to its masks"
                return None
            for holder in false:
                self.faults[holder] = f"it gave another share of {member!r} than was sealed for it"
                for given in self._shares.values():
                    given.pop(holder, None)
        return None

    def _announced(self, member: str, seed: int) -> bool:
        """Whether a secret is the one that its member's opening speaks of."""
        opening, digest = self._openings[member], self._terms.digest
        if member in self._survivors:
            return messages.seed_check(digest, member, seed) == opening.self_check
        return private_key(seed, digest).public_key().public_bytes_raw() == opening.mask_key

    def _was_sealed(self, member: str, holder: str) -> bool:
        """Whether a share has the hash that its sender published, and its recipient did not dispute."""
        kind, share = int(member not in self._survivors), self._shares[member][holder]
        end = messages.ENVELOPE_BYTES * (self._place[holder] + 1)
        checks = self._envelopes[member][end - 2 * messages.CHECK_BYTES : end]
        told = messages.split(checks, messages.CHECK_BYTES, 2)[kind]
        return messages.share_check(self._transcript, member, holder, kind, share) == told

    def _blame(self) -> str:
        return "".join(f"; {member!r}: {fault}" for member, fault in sorted(self.faults.items()))


def _keep(member: str, allowed: Collection[str], kept: dict[str, T], message: T, what: str) -> None:
    """A member says a thing once: the same again is a retry, another is refused."""
    if member not in allowed:
        raise EncryptionError(f"an {what} of {member!r}, who is not waited for")
    if kept.setdefault(member, message) != message:
        raise EncryptionError(f"{member!r} sent a second, other {what}")
