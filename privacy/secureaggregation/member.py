"""A member's part in one sum.

    1. open()              fresh keys, signed
    2. share(openings)     check all signatures; shares of both secrets, sealed for each other member
    3. accept(envelopes)   the others' shares, as far as they are what was announced
       mask(x)             x + own mask ± a mask with every other member, modulo 2**bits
    4. agree(survivors)    sign whose vectors came
    5. unmask(signatures)  k signatures on one list; then one share per member: of the self-mask of a
                           survivor, of the mask key of one who vanished, and never both; or that its
                           envelope held none

The server and t members learn the sum over one list of at least m_min contributors, and nothing else; a
vector that comes late stays hidden by its self-mask. Members may vanish between any two steps: as long as k
are left the sum is formed.

Reference: Bonawitz et al., "Practical secure aggregation for privacy-preserving machine learning", CCS 2017,
figure 4 with the consistency check for an active server.
"""

import enum
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedmosaic.privacy.secureaggregation import messages
from fedmosaic.privacy.secureaggregation.masks import (
    Masks,
    agree,
    pack,
    pair_mask_key,
    private_key,
    self_mask_key,
    to_words,
)
from fedmosaic.privacy.secureaggregation.shamir import RandomBytes, draw_element, share
from fedmosaic.privacy.secureaggregation.terms import SumTerms
from fedmosaic.protos.errors import EncryptionError


class _Step(enum.Enum):
    OPEN = "open"
    SHARE = "share"
    ACCEPT = "accept"
    MASK = "mask"
    AGREE = "agree"
    UNMASK = "unmask"
    OVER = "another sum"


class SumMember:
    """One member in one sum. Secrets stay in memory; after an error or a restart it is out of this sum.

    Whoever uses it must not let one vector, or two vectors of one round, enter two sums: the difference of
    two sums over unlike lists is the vector of a few. Another source of secrets than the operating system's
    is for tests.
    """

    def __init__(
        self,
        terms: SumTerms,
        member: str,
        identity: Ed25519PrivateKey,
        random_bytes: RandomBytes = os.urandom,
    ) -> None:
        if member not in terms.members:
            raise EncryptionError(f"{member!r} is not of this group")
        self._terms = terms
        self._member = member
        self._identity = identity
        self._random = random_bytes
        self._step = _Step.OPEN
        self._self_seed = draw_element(random_bytes)
        self._mask_seed = draw_element(random_bytes)
        self._mask_key = private_key(self._mask_seed, terms.digest)
        self._envelope_key = X25519PrivateKey.from_private_bytes(random_bytes(32))
        self._openings: dict[str, messages.Opening] = {}
        self._transcript = b""
        self._agreed: dict[str, bytes] = {}
        self._held: dict[str, tuple[int, int] | None] = {}
        self._survivors: tuple[str, ...] = ()

    def open(self) -> messages.Opening:
        """Step 1: the keys of this sum."""
        with self._only(_Step.OPEN, _Step.SHARE):
            content = (
                self._mask_key.public_key().public_bytes_raw(),
                self._envelope_key.public_key().public_bytes_raw(),
                messages.seed_check(self._terms.digest, self._member, self._self_seed),
            )
            return messages.sign_opening(self._terms, self._member, content, self._identity)

    def share(self, openings: Mapping[str, messages.Opening]) -> dict[str, bytes]:
        """Step 2: recipient → envelope of 64 bytes, this member among them, from everybody's openings."""
        with self._only(_Step.SHARE, _Step.ACCEPT):
            for member, opening in openings.items():
                messages.check_opening(self._terms, member, opening)
            digest = messages.transcript(self._terms, openings)
            own = openings.get(self._member)
            if own is None or own.envelope_key != self._envelope_key.public_key().public_bytes_raw():
                raise EncryptionError(f"the openings do not hold the one that {self._member!r} sent")
            self._openings, self._transcript = dict(openings), digest
            members = sorted(openings)
            threshold = self._terms.threshold(len(members))
            self_shares = share(self._self_seed, threshold, len(members), self._random)
            key_shares = share(self._mask_seed, threshold, len(members), self._random)
            self._agreed = {
                member: agree(self._envelope_key, openings[member].envelope_key) for member in members
            }
            return {
                member: messages.seal_shares(self._agreed[member], digest, self._member, member, pair)
                for member, pair in zip(members, zip(self_shares, key_shares, strict=True), strict=True)
            }

    def accept(self, envelopes: Mapping[str, bytes]) -> None:
        """Open the shares, by sender; whoever has to pay for a vector does so after this.

        An envelope that does not hold what its sender announced is set aside: its sender has a mask in common
        with this member all the same, whose keys the openings are, and others hold shares of it.
        EncryptionError if one is malformed or foreign, more are damaged than there are members who might lie,
        or too few members are left.
        """
        with self._only(_Step.ACCEPT, _Step.MASK):
            for sender, envelope in envelopes.items():
                if sender not in self._openings or len(envelope) != messages.ENVELOPE_BYTES:
                    raise EncryptionError(f"{len(envelope)} bytes are no envelope of {sender!r} in this sum")
                self._held[sender] = messages.open_shares(
                    self._agreed[sender], self._transcript, sender, self._member, envelope
                )
            damaged = sorted(sender for sender, shares in self._held.items() if shares is None)
            if len(damaged) > self._terms.colluders:
                raise EncryptionError(
                    f"the envelopes of {', '.join(damaged)} were altered, or are of another sum or for "
                    "another member: the server showed others other keys, or changed them"
                )
            if self._member not in self._held:
                raise EncryptionError(f"the envelopes of {self._member!r} did not reach the others in time")
            # With fewer than k, the server could pick masks of members that vanish, whose keys it is given,
            # for a vector that is to be alone. Any k have an honest member in common with those who sign the
            # contributors, and its mask stays.
            messages.check_left("shared their masks", self._held, self._terms, len(self._openings))

    def mask(self, vector: npt.NDArray[np.int64]) -> bytes:
        """Step 3: (D,) integers, whose sum over all fits b bits, as a masked vector of ⌈D·bits/8⌉ bytes."""
        with self._only(_Step.MASK, _Step.AGREE):
            if vector.shape != (self._terms.dimensions,) or vector.dtype != np.int64:
                raise EncryptionError(
                    f"a vector of {vector.shape} {vector.dtype}, expected ({self._terms.dimensions},) int64"
                )
            bits, masks = self._terms.bits, Masks(self._terms.dimensions, self._terms.bits)
            masked = to_words(vector, bits)
            masked += masks.of(self_mask_key(self._self_seed, self._terms.digest))
            for other in sorted(set(self._held) - {self._member}):
                pair = (self._member, other)
                key = pair_mask_key(self._mask_key, self._openings[other].mask_key, self._transcript, pair)
                change = np.add if self._member < other else np.subtract
                change(masked, masks.of(key), out=masked)
            return pack(masked, bits)

    def agree(self, survivors: Collection[str]) -> bytes:
        """Step 4: signature on the list of members whose vectors came, this one's among them."""
        with self._only(_Step.AGREE, _Step.UNMASK):
            survivors = frozenset(survivors)
            foreign = sorted(survivors - set(self._held))
            if foreign or self._member not in survivors:
                strange = f"contributors who did not share their masks: {', '.join(foreign)}"
                lacking = f"the contributors do not include {self._member!r}, whose vector was sent"
                raise EncryptionError(strange if foreign else lacking)
            messages.check_left("sent their vectors", survivors, self._terms, len(self._openings))
            self._survivors = tuple(sorted(survivors))
            return self._identity.sign(messages.survivors_digest(self._transcript, survivors))

    def unmask(self, signatures: Mapping[str, bytes]) -> messages.Unmasking:
        """Step 5: what the server needs for this one sum, once k signed the list that this member signed."""
        with self._only(_Step.UNMASK, _Step.OVER):
            needed = self._terms.threshold(len(self._openings))
            digest = messages.survivors_digest(self._transcript, self._survivors)
            messages.check_survivor_signatures(self._terms, digest, self._survivors, signatures, needed)
            kinds = {member: int(member not in self._survivors) for member in self._held}
            return messages.Unmasking({m: pair and pair[kinds[m]] for m, pair in self._held.items()})

    @contextmanager
    def _only(self, expected: _Step, following: _Step) -> Iterator[None]:
        """One step, once: it is over whatever happens in it, and after an error so is the sum."""
        if self._step is not expected:
            raise EncryptionError(f"step {expected.value!r} was asked for, the next is {self._step.value!r}")
        self._step = _Step.OVER
        yield
        self._step = following
