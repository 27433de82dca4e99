"""Who adds up with whom, what came of every round, and the hash that binds both into the next sum's masks."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field, ValidationError

from fedmosaic.privacy.configuration import Frozen, canonical_json
from fedmosaic.privacy.federation.roster import Roster, taking_part
from fedmosaic.privacy.federation.terms import GroupSumTerms
from fedmosaic.privacy.groupkey.messages import sha256
from fedmosaic.privacy.secureaggregation.terms import SumTerms
from fedmosaic.protos import bounds
from fedmosaic.protos.errors import PolicyError, WireError

NO_ROUND = bytes(32)
"""Chain before the first sum."""


class Partition(Frozen):
    """Disjoint groups, and how every member mixes their sums; from the server, equal for all members."""

    groups: tuple[tuple[bounds.Identifier, ...], ...] = Field(min_length=1)
    """Names in ascending order."""
    mixing: dict[bounds.Identifier, tuple[Annotated[float, Field(allow_inf_nan=False)], ...]]
    """Member → one weight per group, not negative."""

    @property
    def digest(self) -> bytes:
        """SHA-256 of its canonical JSON."""
        return hashlib.sha256(self.encoded()).digest()

    def encoded(self) -> bytes:
        """Canonical JSON."""
        return canonical_json(self.model_dump(mode="json")).encode()

    @classmethod
    def decoded(cls, data: bytes) -> "Partition":
        """Read what the server sent; WireError if it is no partition."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise WireError(f"the groups cannot be read: {error.errors()[0]['msg']}") from None

    def drawn(self, roster: Roster, run_id: str, number: int) -> "Partition":
        """The same with those alone who add up in a round: of every group its share of K, who take turns.

        The share is rounded down, so that no group's members have more turns than those of the whole roster,
        which is what noise is planned for.
        """
        schedule, members = roster.terms.schedule, len(roster.members)
        if schedule.sampled_clients is None:
            return self
        drawn = (taking_part(g, schedule.share(len(g), members), run_id, number) for g in self.groups)
        return self.model_copy(update={"groups": tuple(tuple(sorted(names)) for names in drawn)})

    def terms(
        self, context: bytes, identity_keys: Mapping[str, bytes], sums: GroupSumTerms, dimensions: int
    ) -> tuple[SumTerms, ...]:
        """What the members of every group agree on for one round; alike at them and at the server."""
        least, colluders, bits = sums.minimum_contributors, sums.colluders, sums.bits
        keys = [{name: identity_keys[name] for name in group} for group in self.groups]
        return tuple(
            SumTerms(context, group, known, least, colluders, dimensions, bits)
            for group, known in zip(self.groups, keys, strict=True)
        )

    def group_of(self, member: str) -> int:
        """Index of a member's group."""
        return next(index for index, group in enumerate(self.groups) if member in group)

    def check(self, member: str, families: Mapping[str, str], minimum: int, most: int) -> None:
        """PolicyError unless a member may take part in these groups of at least `minimum`, at most `most`.

        `families` has every member of the roster, with the family within which alone it may share.
        """
        everybody = [name for group in self.groups for name in group]
        strangers = sorted(set(everybody) - set(families))
        if strangers:
            raise PolicyError(f"the server's groups name {', '.join(strangers)}, who are not on the roster")
        if len(everybody) != len(set(everybody)):
            raise PolicyError("the server's groups overlap: two sums with one apart give that one away")
        if any(list(group) != sorted(group) for group in self.groups):
            raise PolicyError("the server's groups are not in ascending order")
        if member not in everybody:
            raise PolicyError(f"the server's groups leave {member!r} out")
        smallest = min(map(len, self.groups))
        if smallest < minimum:
            raise PolicyError(f"the server made a group of {smallest}, the terms say at least {minimum}")
        if len(self.groups) > most:
            raise PolicyError(f"the server made {len(self.groups)} groups, the terms say at most {most}")
        weights = np.array(self.mixing.get(member, ()))
        if weights.shape != (len(self.groups),) or (weights < 0.0).any():
            raise PolicyError(f"the server gave {member!r} no mixing weights for {len(self.groups)} groups")
        for group, weight in zip(self.groups, weights, strict=True):
            others = sorted(name for name in group if families[name] != families[member])
            if others and (member in group or weight > 0.0):
                named = ", ".join(others)
                raise PolicyError(f"the server lets {member!r} share sums with other families: {named}")


@dataclass(frozen=True)
class RoundTotals:
    """What came of one round's sums: contributors and packed words by group, empty where none was formed."""

    round: int
    contributors: tuple[tuple[str, ...], ...]
    vectors: tuple[bytes, ...]

    def follow(self, chain: bytes) -> bytes:
        """The chain after this round: 32 bytes over all sums so far."""
        parts = [chain, self.round.to_bytes(8, "little")]
        for names, vector in zip(self.contributors, self.vectors, strict=True):
            parts += [sha256(b"secure-sum/contributors", *(name.encode() for name in names)), vector]
        return sha256(b"secure-sum/chain", *parts)

    def messages(self) -> dict[str, bytes]:
        """As messages of the relay, by group."""
        return {
            f"group-{index}": b"\n".join([",".join(names).encode(), vector])
            for index, (names, vector) in enumerate(zip(self.contributors, self.vectors, strict=True))
        }

    @classmethod
    def from_messages(cls, round_number: int, messages: Mapping[str, bytes], groups: int) -> "RoundTotals":
        """What `messages` was made from; WireError if a group is missing or lists no contributors."""
        contributors, vectors = [], []
        for index in range(groups):
            names, separator, vector = messages.get(f"group-{index}", b"").partition(b"\n")
            if not separator:
                raise WireError(f"the server sent no sum of group {index} in round {round_number}")
            contributors.append(tuple(names.decode("ascii", "replace").split(",")) if names else ())
            vectors.append(vector)
        return cls(round_number, tuple(contributors), tuple(vectors))


def sum_context(
    federation: str, run_id: str, round_number: int, roster_hash: bytes, partition: Partition, chain: bytes
) -> bytes:
    """32 bytes over all that the members of a round must see alike: different views give noise, not sums."""
    return sha256(
        b"secure-sum/context",
        federation.encode(),
        run_id.encode(),
        round_number.to_bytes(8, "little"),
        roster_hash,
        partition.digest,
        chain,
    )


def chain_of(totals: Sequence[RoundTotals]) -> bytes:
    """The chain over rounds in order."""
    chain = NO_ROUND
    for total in totals:
        chain = total.follow(chain)
    return chain
