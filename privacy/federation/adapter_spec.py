"""What the numbers of a shared adapter vector mean, as one hash that client and server compare."""

import hashlib
from collections.abc import Sequence

from fedmosaic.privacy.configuration import canonical_json


def shared_spec_hash(rank: int, alpha: float, blocks: int, modules: Sequence[str], basis: str) -> bytes:
    """Hash of a shared adapter's layout; it differs wherever averaging would be meaningless.

    Args:
        rank: r; P is (r, r), Q is (r,).
        alpha: α of the scale s = α/r.
        blocks: number of relative-depth blocks.
        modules: names of the adapted modules within a decoder layer, in any order.
        basis: name of the frozen basis A, B.

    Returns:
        SHA-256, 32 bytes.
    """
    return digest(
        {
            "format": "fedmosaic/shared-adapter/1",
            "rank": rank,
            "alpha": float(alpha),
            "blocks": blocks,
            "modules": sorted(modules),
            "basis": basis,
        }
    )


def digest(specification: dict[str, object]) -> bytes:
    """SHA-256 (32 bytes) over the canonical JSON of a specification."""
    return hashlib.sha256(canonical_json(specification).encode()).digest()
