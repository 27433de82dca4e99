"""What every member of a group must agree on before it masks a vector for one sum."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from fedmosaic.privacy.groupkey.messages import sha256
from fedmosaic.protos.errors import EncryptionError


@dataclass(frozen=True)
class SumTerms:
    """One sum of one group in one round; equal at all its members, and bound into every mask.

    `context` is a hash of all else that members must agree on: federation, run, round, roster and the whole
    partition into groups. Members are in ascending order. At least `minimum` contribute, of whom t may
    collude with the server. Vectors of D integers are added modulo 2**bits. EncryptionError if no safe sum is
    possible.
    """

    context: bytes
    members: tuple[str, ...]
    identity_keys: Mapping[str, bytes]
    minimum: int
    colluders: int
    dimensions: int
    bits: int = 32

    def __post_init__(self) -> None:
        if list(self.members) != sorted(set(self.members)):
            raise EncryptionError("the members of a group must be named once each, in ascending order")
        missing = sorted(set(self.members) - set(self.identity_keys))
        if missing:
            raise EncryptionError(f"no identity key is pinned for {', '.join(missing)}")
        if not 1 <= self.colluders < self.minimum <= len(self.members):
            raise EncryptionError(
                f"a group of {len(self.members)} with at least {self.minimum} contributors and "
                f"{self.colluders} colluders; there must be 1 colluder or more, and more contributors"
            )
        if len(self.context) != 32 or not 8 <= self.bits <= 62 or self.dimensions < 1:
            raise EncryptionError(
                f"a context of {len(self.context)} bytes, {self.dimensions} dimensions of {self.bits} bits; "
                "expected 32 bytes, 1 dimension or more, 8 to 62 bits"
            )

    def threshold(self, opened: int) -> int:
        """Shares k that open one secret where `opened` members take part.

        2k > opened + t: two sets of k members share an honest one, who signs only one list of survivors and
        gives only one kind of share of any member (Bonawitz et al. 2017, theorem 6.5). opened − k may vanish.
        """
        return (opened + self.colluders) // 2 + 1

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of all of it."""
        numbers = (self.minimum, self.colluders, self.dimensions, self.bits)
        parts = [self.context, *(number.to_bytes(8, "little") for number in numbers)]
        for member in self.members:
            parts += [member.encode(), self.identity_keys[member]]
        return sha256(b"secure-sum/terms", *parts)
