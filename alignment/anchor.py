"""The anchor's own subspace: what A and B span decides what P and Q can learn.

All choices are orthonormal; they differ in the subspace.

Reference: arXiv 2506.11024 (random orthonormal); PiSSA, arXiv 2404.02948 (singular vectors of weights); EVA,
arXiv 2410.07170 (principal directions of activations); LoRA-GA, arXiv 2407.05000 (gradients).
"""

from typing import Final, Literal, get_args

import torch

from fedmosaic.alignment.activations import ModuleKey, PairMoments, Side
from fedmosaic.client.colora.linear import derive_seed, draw_orthonormal
from fedmosaic.protos.errors import ConfigurationError, ModelError

AnchorBasis = Literal["random", "weights", "activations", "cotangents"]
ANCHOR_BASES: Final[tuple[str, ...]] = get_args(AnchorBasis)
WITHOUT_TEXT: Final = frozenset({"random", "weights"})
BasisPair = tuple[torch.Tensor, torch.Tensor]
"""A (r, d_in), rows orthonormal, and B (d_out, r), columns orthonormal; float64."""


def anchor_basis(
    anchor: Side, rank: int, kind: str, *, moments: PairMoments | None = None, seed: int = 0, spare: int = 1
) -> dict[ModuleKey, BasisPair]:
    """Choose A and B, of some rank, of every adapted module of the anchor.

    Args:
        anchor: The anchor.
        rank: r; `ModelError` if a module is narrower.
        kind: `random`, Haar-distributed (the paper); `weights`, the leading singular vectors of W;
            `activations`, A and B the principal directions of inputs x and of outputs y; `cotangents`, A
            those of the inputs, B those of what shared contrasts send back to the outputs.
        moments: Moments of the anchor with itself; needed but for `random` and `weights`.
        seed: Seed of `random`, which equals the adapter's `basis_seed`.
        spare: That many times as many directions, as far as the module is wide, for a choice among them.
    """
    if kind not in ANCHOR_BASES:
        raise ConfigurationError(f"The anchor's basis is {kind!r}; choose one of {', '.join(ANCHOR_BASES)}.")
    for key in anchor.names:
        linear = anchor.linear(key)
        if rank > min(linear.in_features, linear.out_features):
            raise ModelError(
                f"Rank {rank} is above the width of {anchor.names[key]} ({linear.in_features} → "
                f"{linear.out_features}). Lower the rank, or leave that module out of --target-modules."
            )
    if moments is None and kind not in WITHOUT_TEXT:
        raise ConfigurationError(
            f"The anchor's basis {kind!r} needs moments on public text; collect them first."
        )
    return {
        key: _basis(anchor, key, rank if kind == "random" else rank * spare, kind, moments, seed)
        for key in anchor.names
    }


def _basis(
    anchor: Side, key: ModuleKey, wanted: int, kind: str, moments: PairMoments | None, seed: int
) -> BasisPair:
    linear = anchor.linear(key)
    rank = min(wanted, linear.in_features, linear.out_features)
    if kind == "weights":
        left, _, right = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
        return right[:rank].contiguous(), left[:, :rank].contiguous()
    if kind == "random" or moments is None:
        return _random(anchor, key, rank, seed)
    written = moments.gradients[key] if kind == "cotangents" else moments.outputs[key].centred()
    # Centred inputs: what is constant over text needs no direction of A, Q stands for it.
    rows = _principal(moments.inputs[key].centred().anchor_DD, rank).T
    return rows, _principal(written.anchor_DD, rank)


def _random(side: Side, key: ModuleKey, rank: int, seed: int) -> BasisPair:
    linear = side.linear(key)
    rows = draw_orthonormal(linear.in_features, rank, derive_seed(seed, *key, "A")).T
    columns = draw_orthonormal(linear.out_features, rank, derive_seed(seed, *key, "B"))
    return rows.double(), columns.double()


def _principal(moment: torch.Tensor, rank: int) -> torch.Tensor:
    """Leading eigenvectors as columns, largest first."""
    _, vectors = torch.linalg.eigh(moment)
    leading: torch.Tensor = vectors[:, -rank:].flip(1).contiguous()
    return leading
