"""Bases in closed form: invariants, exact recoveries, and optimality."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmosaic.alignment.activations import METHODS, Method
from fedmosaic.alignment.moments import Moments, MomentSums
from fedmosaic.alignment.subspace import (
    align_inputs,
    align_outputs,
    nearest_orthonormal_rows,
    prediction_share,
    shared_rotation,
    sharing,
)
from fedmosaic.client.colora.linear import draw_orthonormal, orthonormality_error
from fedmosaic.protos.errors import ModelError

RANK = 4


def moments_of(u: torch.Tensor, v: torch.Tensor, *, centred: bool = False) -> Moments:
    sums = MomentSums()
    for start in range(0, len(u), 97):
        sums.update(u[start : start + 97], v[start : start + 97])
    found = sums.finish()
    return found.centred() if centred else found


def correlated(
    seed: int, rows: int = 600, width: int = 10, other: int = 14
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of coordinates of the same hidden causes, with noise of their own."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(rows, 8, generator=generator, dtype=torch.float64)
    mix_u = torch.randn(8, width, generator=generator, dtype=torch.float64)
    mix_v = torch.randn(8, other, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, width + other, generator=generator, dtype=torch.float64) * 0.3
    return causes @ mix_u + noise[:, :width], causes @ mix_v + noise[:, width:]


def basis(width: int, seed: int = 0) -> torch.Tensor:
    """(r, width) orthonormal rows."""
    return draw_orthonormal(width, RANK, seed).T.double()


def aligned_rows(moments: Moments, anchor: torch.Tensor, **options: float) -> torch.Tensor:
    return nearest_orthonormal_rows(align_inputs(moments, anchor, **options))


def aligned_columns(moments: Moments, anchor: torch.Tensor, method: Method, **options: float) -> torch.Tensor:
    return nearest_orthonormal_rows(align_outputs(moments, anchor, method, **options).T).T


def test_moments_are_those_of_all_rows_whatever_the_batches() -> None:
    u, v = correlated(0)
    raw, centred = moments_of(u, v), moments_of(u, v, centred=True)
    assert raw.count == len(u)
    torch.testing.assert_close(raw.cross_DE, u.T @ v / len(u), rtol=1e-5, atol=1e-5)
    both = torch.cov(torch.cat([u, v], dim=1).T, correction=0)
    torch.testing.assert_close(centred.anchor_DD, both[:10, :10], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(centred.cross_DE, both[:10, 10:], rtol=1e-5, atol=1e-5)


def test_moments_keep_small_variance_beside_a_huge_mean_sum() -> None:
    # In a float32 sum of a million rows the small products would drown; float64 keeps them.
    sums = MomentSums()
    for _ in range(300):
        sums.update(torch.full((64, 1), 1000.0), torch.full((64, 1), 1e-3))
    found = sums.finish()
    assert float(found.model_EE) == pytest.approx(1e-6, rel=1e-6)
    assert float(found.cross_DE) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_moments_refuse_what_is_not_finite(bad: float) -> None:
    with pytest.raises(ModelError, match="not finite"):
        MomentSums().update(torch.full((3, 2), bad), torch.ones(3, 2))


def test_moments_refuse_too_little_or_unpaired_rows() -> None:
    with pytest.raises(ModelError, match="Only 0 positions"):
        MomentSums().finish()
    with pytest.raises(ModelError, match="differ"):
        MomentSums().update(torch.ones(3, 2), torch.ones(2, 2))
    sums = MomentSums()
    sums.update(torch.ones(0, 2), torch.ones(0, 2))
    assert sums.count == 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_polar_factor_is_the_nearest_orthonormal_matrix(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(RANK, 9, generator=generator, dtype=torch.float64)
    nearest = nearest_orthonormal_rows(matrix)
    assert orthonormality_error(nearest.T) < 1e-10
    rival = draw_orthonormal(9, RANK, seed).T.double()
    close_rival = nearest_orthonormal_rows(nearest + 0.01 * rival)
    for other in (rival, close_rival):
        assert (matrix - nearest).norm() <= (matrix - other).norm() + 1e-12


@pytest.mark.parametrize(
    "matrix", [torch.zeros(3, 5), torch.ones(3, 5), torch.randn(5, 3), torch.full((2, 4), float("nan"))]
)
def test_a_matrix_without_full_rank_has_no_nearest_one(matrix: torch.Tensor) -> None:
    with pytest.raises(ModelError):
        nearest_orthonormal_rows(matrix.double())


@pytest.mark.parametrize("scale", [1.0, 7.0, 0.02])
def test_a_rotated_and_scaled_model_is_aligned_exactly(scale: float) -> None:
    u, _ = correlated(2)
    rotation = draw_orthonormal(10, 10, 5).double()
    moments = moments_of(u, scale * u @ rotation.T)
    a = basis(10)
    found = aligned_rows(moments, a, ridge=1e-10)
    torch.testing.assert_close(found, a @ rotation.T, atol=2e-3, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_outputs_of_a_rotated_model_are_aligned_exactly(method: Method) -> None:
    u, _ = correlated(4)
    rotation = draw_orthonormal(10, 10, 6).double()
    b = basis(10).T
    found = aligned_columns(moments_of(u, 3.0 * u @ rotation.T, centred=True), b, method, ridge=1e-10)
    torch.testing.assert_close(found, rotation @ b, atol=2e-3, rtol=0)
    assert orthonormality_error(found.half()) < 1e-3
    wider = moments_of(*correlated(5), centred=True)
    assert orthonormality_error(aligned_columns(wider, b, method)) < 1e-9


def test_cca_of_noiseless_causes_maps_signal_to_signal() -> None:
    generator = torch.Generator().manual_seed(7)
    causes = torch.randn(900, RANK, generator=generator, dtype=torch.float64)
    into_u, into_v = draw_orthonormal(10, RANK, 1).double(), draw_orthonormal(14, RANK, 2).double()
    moments = moments_of(causes @ into_u.T, causes @ into_v.T, centred=True)
    found = aligned_columns(moments, into_u, "activations", ridge=1e-8)
    torch.testing.assert_close(found, into_v, atol=5e-2, rtol=0)


def test_a_dead_module_aligns_with_nothing() -> None:
    u, _ = correlated(9)
    moments = moments_of(u, torch.zeros(len(u), 14))
    with pytest.raises(ModelError, match="all zero"):
        aligned_rows(moments, basis(10))


def test_the_share_explained_is_a_squared_correlation() -> None:
    u, v = correlated(10)
    a, other = basis(10), basis(14, 3)
    found = prediction_share(moments_of(u, v, centred=True), a, other)
    for row in range(RANK):
        pair = torch.stack([u @ a[row], v @ other[row]])
        assert float(found[row]) == pytest.approx(float(torch.corrcoef(pair)[0, 1] ** 2), rel=1e-3)


def test_the_rotation_puts_what_is_shared_first() -> None:
    generator = torch.Generator().manual_seed(11)
    u = torch.randn(4000, 10, generator=generator, dtype=torch.float64)
    v = torch.randn(4000, 14, generator=generator, dtype=torch.float64)
    a = torch.eye(RANK, 10, dtype=torch.float64)
    # Only a mixture of the anchor's second and third directions is shared.
    v[:, 0] = 0.6 * u[:, 1] + 0.8 * u[:, 2]
    rotation = shared_rotation([sharing(moments_of(u, v), a)])
    assert orthonormality_error(rotation) < 1e-9
    leading = rotation[0] @ a
    assert abs(float(leading[1])) == pytest.approx(0.6, abs=0.03)
    assert abs(float(leading[2])) == pytest.approx(0.8, abs=0.03)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_rotating_the_anchor_rotates_the_model(seed: int) -> None:
    """So that the order of directions can be chosen after all models have been read."""
    moments = moments_of(*correlated(12))
    rotation = draw_orthonormal(RANK, RANK, seed).double()
    a, b = basis(10), basis(10, 2).T
    torch.testing.assert_close(aligned_rows(moments, rotation @ a), rotation @ aligned_rows(moments, a))
    for method in METHODS:
        torch.testing.assert_close(
            aligned_columns(moments, b @ rotation.T, method), aligned_columns(moments, b, method) @ rotation.T
        )


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_cores_keep_their_norm_and_span_all_of_rank_squared(seed: int) -> None:
    """‖BPA‖ = ‖P‖, and Theorem 1 of the paper: the span of {BPA} has dimension r²."""
    moments = moments_of(*correlated(seed))
    a, b = aligned_rows(moments, basis(10)), aligned_columns(moments, basis(10).T, "activations")
    generator = torch.Generator().manual_seed(seed)
    cores = torch.randn(RANK**2 + 5, RANK, RANK, generator=generator, dtype=torch.float64)
    maps = torch.stack([b @ core @ a for core in cores])
    torch.testing.assert_close(maps.flatten(1).norm(dim=1), cores.flatten(1).norm(dim=1))
    assert int(torch.linalg.matrix_rank(maps.flatten(1))) == RANK**2
