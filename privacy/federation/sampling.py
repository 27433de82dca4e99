"""Who takes part in which round of a federation that is larger than one: K of N members, by a public rule.

A member's ticket of a round is a hash of the run, the round and its name; the K smallest take part. Every
member can tell who that is, so it refuses a weight row that names anybody else. The draw is uniform over the
runs' random ids, and it is no secret: no amplification by subsampling is claimed for it, and whoever draws
many ids of a run can choose among its draws.
"""

import hashlib
import heapq
from functools import lru_cache


def taking_part(members: tuple[str, ...], sampled: int | None, run_id: str, number: int) -> frozenset[str]:
    """The members that take part in a round; `sampled` is K of the terms, None for everybody."""
    if sampled is None or sampled >= len(members):
        return frozenset(members)
    return _smallest(members, sampled, run_id, number)


@lru_cache(maxsize=64)
def _smallest(members: tuple[str, ...], sampled: int, run_id: str, number: int) -> frozenset[str]:
    prefix = f"fedmosaic/sample/v1\x00{run_id}/{number}/"
    return frozenset(
        heapq.nsmallest(sampled, members, lambda name: hashlib.sha256((prefix + name).encode()).digest())
    )
