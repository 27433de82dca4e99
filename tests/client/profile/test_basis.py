"""The public basis: leading directions, whitening and clipping norm as their definitions say."""

import logging
from typing import Any

import numpy as np
import pytest
import torch

from fedmosaic.client.model.examples import EncodedExample
from fedmosaic.client.profile import fit as public_basis
from fedmosaic.client.profile.fit import BasisSettings, fit_basis, fit_mechanism, standardise_rows
from fedmosaic.client.profile.probe import Probe, open_probe
from fedmosaic.privacy.mechanism.profile import Reduction
from fedmosaic.privacy.mechanism.projection import GradientFactors, Projection, PublicBasis, PublicMap
from fedmosaic.protos.errors import MechanismError
from tiny import tiny_llama

HIDDEN, INNER = 8, 12


def reduction(kind: str = "kronecker", dimensions: int = 6, **changes: object) -> Reduction:
    shape = {"hidden_size": HIDDEN, "intermediate_size": INNER, "projection_dimensions": dimensions}
    return Reduction.model_validate({"kind": kind} | shape | changes)


def public_gradients(count: int = 300) -> list[GradientFactors]:
    """Gradients whose δ mostly lie in three known directions and x in two."""
    generator = np.random.default_rng(0)
    scales_left = np.array([9.0, 5.0, 3.0] + [0.1] * (HIDDEN - 3))
    scales_right = np.array([8.0, 4.0] + [0.1] * (INNER - 2))
    return [
        GradientFactors(
            (generator.standard_normal((4, HIDDEN)) * scales_left).astype(np.float32),
            (generator.standard_normal((4, INNER)) * scales_right).astype(np.float32),
        )
        for _ in range(count)
    ]


def test_sides_are_the_leading_directions() -> None:
    gradients = public_gradients()
    fitted = fit_basis(lambda: gradients, reduction(), BasisSettings(kronecker_shape=(3, 2)))
    for side, count in ((fitted.basis.left, 3), (fitted.basis.right, 2)):
        assert side is not None
        np.testing.assert_allclose(side.T @ side, np.eye(count), atol=1e-5)
        # Directions come in order of their strength and are the coordinate axes of the construction.
        np.testing.assert_allclose(np.abs(side[:count, :count]), np.eye(count), atol=0.1)
    assert fitted.examples == 300


def test_whitened_public_rows_have_zero_mean_and_nearly_unit_covariance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gradients = public_gradients(2000)
    monkeypatch.setattr(public_basis, "SHRINKAGE", 1e-6)
    settings = BasisSettings(kronecker_shape=(3, 2))
    fitted = fit_basis(lambda: gradients, reduction(normalise=False), settings)
    rows = Projection(reduction(normalise=False), fitted.basis).rows(gradients)
    assert fitted.basis.centre is not None
    assert fitted.basis.whitening is not None
    white = (rows - fitted.basis.centre) @ fitted.basis.whitening.T
    np.testing.assert_allclose(white.mean(0), 0.0, atol=1e-4)
    np.testing.assert_allclose(np.cov(white.T), np.eye(6), atol=0.01)
    assert np.mean(np.linalg.norm(white, axis=1) <= fitted.clipping_norm) == pytest.approx(0.1, abs=0.002)


def test_shrinkage_bounds_how_far_a_silent_direction_is_blown_up() -> None:
    rows = np.random.default_rng(1).standard_normal((500, 4)) * [1.0, 1.0, 1.0, 1e-9]
    fitted = standardise_rows(rows, PublicBasis(), BasisSettings())
    assert fitted.basis.whitening is not None
    gains = np.linalg.svd(fitted.basis.whitening, compute_uv=False)
    mean = np.linalg.eigvalsh(np.cov(rows.T, bias=True)).mean()
    assert gains.max() == pytest.approx(1 / np.sqrt(0.1 * mean), rel=1e-4)


def test_without_standardisation_nothing_but_the_clipping_norm_is_fitted() -> None:
    gradients = public_gradients()
    fitted = fit_basis(lambda: gradients, reduction("tensor_sketch"), BasisSettings(standardise="none"))
    assert fitted.basis == PublicBasis() or fitted.basis.sha256 == PublicBasis().sha256
    assert fitted.clipping_norm == pytest.approx(1.0)


def test_gradients_that_are_not_finite_are_left_out_of_the_whitening() -> None:
    rows = np.random.default_rng(1).standard_normal((50, 4))
    hostile = np.vstack([rows, [[np.nan, 0, 0, 0]], [[np.inf, 0, 0, 0]]])
    found = standardise_rows(hostile, PublicBasis(), BasisSettings())
    assert found.basis.sha256 == standardise_rows(rows, PublicBasis(), BasisSettings()).basis.sha256
    assert found.examples == 50


def test_too_few_public_gradients_for_whitening_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    rows = np.random.default_rng(1).standard_normal((8, 4))
    with caplog.at_level(logging.WARNING):
        standardise_rows(rows, PublicBasis(), BasisSettings())
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        standardise_rows(rows[1:], PublicBasis(), BasisSettings())
    assert "7 public gradients are few to whiten 4 dimensions" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message", "dimensions"),
    [
        (BasisSettings(kronecker_shape=(3, 3)), "product equal", 6),
        (BasisSettings(kronecker_shape=(3, 2)), "too few", 6),
        (BasisSettings(kronecker_shape=(9, 2)), "does not fit a gradient", 18),
    ],
)
def test_contradictions_are_refused(settings: BasisSettings, message: str, dimensions: int) -> None:
    with pytest.raises(MechanismError, match=message):
        fit_basis(list, reduction(dimensions=dimensions), settings)


def test_equal_public_gradients_cannot_whiten() -> None:
    with pytest.raises(MechanismError, match="all equal"):
        standardise_rows(np.ones((9, 3)), PublicBasis(), BasisSettings())
    with pytest.raises(MechanismError, match="zero"):
        standardise_rows(np.ones((9, 3)), PublicBasis(), BasisSettings(standardise="centre"))


@pytest.mark.parametrize(
    ("kind", "standardise", "has_basis"),
    [("kronecker", "whiten", True), ("kronecker", "none", True), ("coordinates", "none", False)],
)
def test_a_fitted_mechanism_is_complete(kind: str, standardise: str, has_basis: bool) -> None:
    probe, examples = tiny_probe()
    settings = BasisSettings(standardise, (2, 3))  # type: ignore[arg-type]  # one of the literals above
    mechanism, basis = fit_mechanism(probe, "tiny", examples, reduction(kind), settings, 8.0)
    assert (basis is not None) == has_basis
    assert mechanism.probe_sha256 == probe.sha256
    assert mechanism.noise_multiplier == 8.0
    PublicMap(mechanism, basis)


def tiny_probe() -> tuple[Probe, list[EncodedExample]]:
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 2}
    probe = open_probe(tiny_llama(num_hidden_layers=1, initializer_range=0.3, vocab_size=30, **sizes))
    ids = torch.randint(0, 30, (40, 7))
    examples = [EncodedExample(str(index), row, row) for index, row in enumerate(ids)]
    return probe, examples


def test_the_probe_sees_an_example_once_if_gradients_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    probe, examples = tiny_probe()
    settings = BasisSettings(kronecker_shape=(2, 3))
    passes: list[int] = []
    hook = probe.norm.register_forward_pre_hook(lambda *_: passes.append(1))
    kept = fit_mechanism(probe, "tiny", examples, reduction(), settings, 8.0)
    once = len(passes)
    monkeypatch.setattr(public_basis, "KEPT_BYTES", 0)
    streamed = fit_mechanism(probe, "tiny", examples, reduction(), settings, 8.0)
    hook.remove()
    assert len(passes) == 3 * once
    assert kept[0] == streamed[0]
