"""The frozen bases of a model from those of the anchor, in closed form on streamed moments.

Notation: x inputs and y = W x outputs of one adapted module; subscripts a anchor, m model; r rank.

    A (r, d_in), rows orthonormal:      A_m x_m should be close to A_a x_a on the same text,
    B (d_out, r), columns orthonormal:  B_m c should move model m as B_a c moves the anchor.

Reference: arXiv 2506.11024, "weight alignment" (L2 and orthogonality for A, canonical correlation analysis
for B). The released code's map for B never looks at the module's outputs and stays in the span of a random B.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from fedmosaic.alignment.activations import Method
from fedmosaic.alignment.moments import Moments
from fedmosaic.protos.errors import ConfigurationError, ModelError

RIDGE: Final = 1e-2
"""Ridge relative to the mean eigenvalue: directions far below the average are noise of a finite sample."""

_SMALLEST_SINGULAR_VALUE: Final = 1e-9


def nearest_orthonormal_rows(matrix: torch.Tensor) -> torch.Tensor:
    """The row-orthonormal matrix that is nearest to an (r, d) one in Frobenius norm: the polar factor U Vᵀ.

    `ModelError` if the matrix is not finite or its rank is below r, so that no nearest one is unique.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise ModelError("An aligned basis is not finite; the public text gave unusable activations.")
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    if matrix.shape[0] > matrix.shape[1] or float(values[-1]) <= _SMALLEST_SINGULAR_VALUE * float(values[0]):
        raise ModelError(
            f"An aligned basis of shape {tuple(matrix.shape)} has not full rank: the two models share fewer "
            f"than {matrix.shape[0]} directions on this public text. Give more text, or a lower rank."
        )
    nearest: torch.Tensor = left @ right
    return nearest


def align_inputs(moments: Moments, anchor_RD: torch.Tensor, *, ridge: float = RIDGE) -> torch.Tensor:
    """What a model reads for each of the anchor's k ≥ r directions, (k, E) float64: A_a x_a regressed on x_m.

    Linear in the anchor's directions, so which r of them are kept can be chosen afterwards; A is then the
    nearest row-orthonormal matrix.

    Args:
        moments: Moments of the inputs (x_a, x_m).
        anchor_RD: A of the anchor, rows orthonormal.
        ridge: Relative to the mean eigenvalue of the model's inputs; above 0.
    """
    wanted_RE = anchor_RD.double() @ moments.cross_DE
    return _regression(moments.model_EE, wanted_RE, ridge)


def align_outputs(
    moments: Moments, anchor_DR: torch.Tensor, method: Method, *, ridge: float = RIDGE
) -> torch.Tensor:
    """Where a model writes each of the anchor's k ≥ r directions, (E, k) float64, as `align_inputs` for A.

    Args:
        moments: Moments of the outputs (y_a, y_m); of the shared cotangents at them for `cotangents`.
        anchor_DR: B of the anchor, columns orthonormal.
        method: `cotangents`, the B_m for which B_mᵀ δ_m predicts B_aᵀ δ_a, where δ is what arrives at the
            outputs when the same contrasts of shared words are sent back through both models; any other,
            canonical correlations: whiten the anchor's outputs, rotate to canonical directions and colour as
            the model's.
        ridge: Relative to the mean eigenvalue; above 0.
    """
    basis_DR = anchor_DR.double()
    if method == "cotangents":
        return align_inputs(moments, basis_DR.T, ridge=ridge).T
    return _cca_map(moments.anchor_DD, moments.cross_DE, moments.model_EE, ridge) @ basis_DR


def prediction_share(moments: Moments, anchor_RD: torch.Tensor, model_RE: torch.Tensor) -> torch.Tensor:
    """How much of each of r anchor directions the model's aligned direction explains.

    Returns:
        (r,) squared correlations in [0, 1]; 0 where a direction does not vary.
    """
    anchor, model = anchor_RD.double(), model_RE.double()
    own_R = ((anchor @ moments.anchor_DD) * anchor).sum(1)
    other_R = ((model @ moments.model_EE) * model).sum(1)
    joint_R = ((anchor @ moments.cross_DE) * model).sum(1)
    scale_R = own_R * other_R
    return torch.where(scale_R > 0, joint_R**2 / scale_R.clamp_min(1e-300), torch.zeros_like(joint_R))


def _regression(gram_EE: torch.Tensor, wanted_RE: torch.Tensor, ridge: float) -> torch.Tensor:
    """Wanted · (gram + ridge · mean eigenvalue · I)⁻¹."""
    size = len(gram_EE)
    penalty = ridge * float(torch.trace(gram_EE)) / size
    if not penalty > 0.0:
        raise ModelError(
            "A module's activations are all zero on the public text, so they align with nothing."
        )
    shifted_EE = gram_EE + penalty * torch.eye(size, dtype=torch.float64)
    coefficients_RE: torch.Tensor = torch.linalg.solve(shifted_EE, wanted_RE.T).T
    return coefficients_RE


def _cca_map(
    anchor_DD: torch.Tensor, cross_DE: torch.Tensor, model_EE: torch.Tensor, ridge: float
) -> torch.Tensor:
    """C_mm^½ U Vᵀ C_aa^-½ (E, D), with U Σ Vᵀ the whitened cross moments."""
    root_m, inverse_m = _roots(model_EE, ridge)
    _, inverse_a = _roots(anchor_DD, ridge)
    left, _, right = torch.linalg.svd(inverse_m @ cross_DE.T @ inverse_a, full_matrices=False)
    mapped: torch.Tensor = root_m @ (left @ (right @ inverse_a))
    return mapped


def _roots(gram: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    values, vectors = torch.linalg.eigh(gram)
    shift = ridge * float(values.mean())
    if not shift > 0.0:
        raise ModelError("A module's outputs are all zero on the public text, so they align with nothing.")
    values = values.clamp_min(0.0) + shift
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T


@dataclass(frozen=True, eq=False)
class Sharing:
    """What one model can say about the anchor's latent u = rows · u_a.

    Attributes:
        explained_RR: (r, r) float64, covariance of the part of u that the model's whole space predicts.
        latent_RR: (r, r) float64, covariance of u itself.
    """

    explained_RR: torch.Tensor
    latent_RR: torch.Tensor


def sharing(moments: Moments, rows_RD: torch.Tensor, *, ridge: float = RIDGE) -> Sharing:
    """How much of the latent of the anchor's (r, D) basis a model shares."""
    rows = rows_RD.double()
    wanted_RE = rows @ moments.cross_DE
    explained = wanted_RE @ _regression(moments.model_EE, wanted_RE, ridge).T
    return Sharing((explained + explained.T) / 2, rows @ moments.anchor_DD @ rows.T)


def shared_rotation(models: Sequence[Sharing], *, ridge: float = RIDGE) -> torch.Tensor:
    """Rotate an anchor's latent so that leading dimensions are those which the models share best.

    Per model the directions are the canonical ones between the latent and the model's whole space; the mean
    over models decides. Canonical directions are not orthogonal where the latent is not white;
    orthogonalising them in order keeps the span of every leading group.

    Returns:
        (r, r) float64 orthogonal; multiply the anchor's rows, and every model's, by it from the left.
    """
    if not models:
        raise ConfigurationError("There is no model to share with; give at least one besides the anchor.")
    explained = torch.stack([model.explained_RR for model in models]).mean(0)
    _, whitening = _roots(torch.stack([model.latent_RR for model in models]).mean(0), ridge)
    _, vectors = torch.linalg.eigh(whitening @ explained @ whitening)
    orthogonal, triangular = torch.linalg.qr(whitening @ vectors.flip(1))
    rotation: torch.Tensor = (orthogonal * torch.sign(torch.diagonal(triangular))).T
    return rotation.contiguous()
