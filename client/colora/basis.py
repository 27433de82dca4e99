"""The frozen bases A and B: drawn from a public seed, or set from an alignment."""

import hashlib
import json

import torch

from fedmosaic.protos.errors import ModelError


def derive_seed(basis_seed: int, *labels: str | int) -> int:
    """Derive an independent seed in [0, 2**63) for each tensor, named by labels, from one public seed."""
    digest = hashlib.sha256(json.dumps([basis_seed, *labels]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def draw_orthonormal(dimension: int, rank: int, seed: int) -> torch.Tensor:
    """Draw (dimension, rank) float32 orthonormal columns uniformly (Haar measure) from a seed.

    Reference:
        F. Mezzadri, "How to generate random matrices from the classical compact groups", 2007, §5: the
        QR factor is Haar distributed, and unique, once the diagonal of R is made positive.
    """
    if rank > dimension:
        raise ModelError(
            f"Rank {rank} is above the width {dimension} of a module to adapt, so no orthonormal basis "
            f"exists. Lower r to at most {dimension}, or leave that module out of target_modules."
        )
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(dimension, rank, generator=generator, dtype=torch.float64)
    factors: tuple[torch.Tensor, torch.Tensor] = torch.linalg.qr(gaussian)
    orthonormal, triangular = factors
    return (orthonormal * torch.sign(torch.diagonal(triangular))).to(torch.float32).contiguous()


def orthonormality_error(vectors: torch.Tensor) -> float:
    """Return the largest absolute entry of VᵀV − I for V (dimension, rank), one vector per column."""
    wide = vectors.to(torch.float64)
    identity = torch.eye(wide.shape[1], dtype=torch.float64, device=wide.device)
    return float((wide.T @ wide - identity).abs().max())
