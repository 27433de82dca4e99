"""The anchor's own subspace: what A and B span decides what P and Q can learn.

Reference: arXiv 2506.11024 (random orthonormal); PiSSA, arXiv 2404.02948 (singular vectors of weights); EVA,
arXiv 2410.07170 (principal directions of activations); LoRA-GA, arXiv 2407.05000 (gradients).
"""

import torch

from fedmosaic.alignment.activations import ModuleKey, PairMoments, Side
from fedmosaic.client.colora.linear import derive_seed, draw_orthonormal
from fedmosaic.protos.errors import ModelError

BasisPair = tuple[torch.Tensor, torch.Tensor]
"""A (r, d_in), rows orthonormal, and B (d_out, r), columns orthonormal; float64."""


def random_basis(anchor: Side, rank: int, seed: int) -> dict[ModuleKey, BasisPair]:
    """Random A of every adapted module, and B the orthonormalised W · random.

    Such a B lies in the span of the outputs. What a Haar-distributed one has outside of it, where a module
    widens, says nothing on public text and could not be found again. `ModelError` as for `principal_basis`.
    """
    bases = {}
    for key, (inputs, _) in _widths(anchor, rank).items():
        rows, columns = (
            draw_orthonormal(inputs, rank, derive_seed(seed, *key, side)).double() for side in "AB"
        )
        orthogonal, _ = torch.linalg.qr(anchor.linear(key).weight.detach().double() @ columns)
        bases[key] = (rows.T.contiguous(), orthogonal)
    return bases


def weight_basis(anchor: Side, rank: int) -> dict[ModuleKey, BasisPair]:
    """Leading singular vectors of W of every adapted module; `ModelError` as for `principal_basis`."""
    bases = {}
    for key in _widths(anchor, rank):
        weight = anchor.linear(key).weight.detach().double()
        left, _, right = torch.linalg.svd(weight, full_matrices=False)
        bases[key] = (right[:rank].contiguous(), left[:, :rank].contiguous())
    return bases


def principal_basis(
    anchor: Side, rank: int, moments: PairMoments, *, spare: int = 1
) -> dict[ModuleKey, BasisPair]:
    """Principal directions of every adapted module's inputs, and of what B is aligned on.

    The moments are those of the anchor with itself. There are `spare` times as many directions as the rank,
    as far as a module is wide, for a choice among them. `ModelError` if one is narrower than the rank.
    """
    bases = {}
    for key, widths in _widths(anchor, rank).items():
        wanted = min(rank * spare, *widths)
        # Centred inputs: what is constant over text needs no direction of A, Q stands for it.
        rows = _principal(moments.inputs[key].centred().anchor_DD, wanted).T
        bases[key] = (rows, _principal(moments.effects[key].anchor_DD, wanted))
    return bases


def _widths(anchor: Side, rank: int) -> dict[ModuleKey, tuple[int, int]]:
    """Inputs and outputs of every adapted module; `ModelError` if one is narrower than the rank."""
    found = {}
    for key, name in anchor.names.items():
        linear = anchor.linear(key)
        found[key] = (linear.in_features, linear.out_features)
        if rank > min(found[key]):
            raise ModelError(
                f"Rank {rank} is above the width of {name} ({linear.in_features} → {linear.out_features}). "
                "Lower the rank, or leave that module out of --target-modules."
            )
    return found


def _principal(moment: torch.Tensor, rank: int) -> torch.Tensor:
    """Leading eigenvectors as columns, largest first."""
    _, vectors = torch.linalg.eigh(moment)
    leading: torch.Tensor = vectors[:, -rank:].flip(1).contiguous()
    return leading
