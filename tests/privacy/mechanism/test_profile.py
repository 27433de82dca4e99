"""The mechanism's guarantee: one example moves the clipped sum by at most C, whatever it is."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from builders import tiny_mechanism
from fedmosaic.privacy.mechanism.gaussian import GRID, ClippedSum, clip
from fedmosaic.privacy.mechanism.noise import SecureNoise, SeededTestNoise
from fedmosaic.privacy.mechanism.profile import (
    Float32Array,
    ProfileMechanism,
    Reduction,
    ReleasedProfile,
    clipped_sum,
    release,
    update_average,
)
from fedmosaic.privacy.mechanism.projection import GradientFactors, Projection
from fedmosaic.protos.errors import MechanismError


def mechanism(dimensions: int = 4, *, seed: int = 0, **changes: Any) -> ProfileMechanism:
    reduction = Reduction(
        hidden_size=8, intermediate_size=16, projection_dimensions=dimensions, public_seed=seed
    )
    fields: dict[str, Any] = {"reduction": reduction, "noise_multiplier": 1.0}
    return tiny_mechanism(**(fields | changes))


def test_no_examples_give_a_zero_sum_and_still_noise() -> None:
    total = clipped_sum(np.zeros((0, 4)), mechanism())
    assert np.array_equal(total.units, np.zeros(4))
    assert np.all(release(total, mechanism(), SecureNoise()) != 0)


def test_the_release_is_a_sum_and_not_divided_by_a_count() -> None:
    row = np.array([[0.25, 0.0, 0.0, 0.0]])
    quiet = mechanism(noise_multiplier=0.0)
    once = release(clipped_sum(row, quiet), quiet, SeededTestNoise(0))
    often = release(clipped_sum(np.repeat(row, 400, axis=0), quiet), quiet, SeededTestNoise(0))
    np.testing.assert_allclose(often, 400 * once, rtol=1e-6)
    assert abs(once[0] - 0.25) < 1e-6


def test_clipping_before_the_reduction_would_break_the_bound() -> None:
    """Where a map stretches, a gradient clipped first grows again; clipping last holds regardless."""
    gradient = np.array([[1.0, 0.0, 0.0, 0.0]])
    stretch = 3.0 * np.eye(4)
    described = mechanism()
    last = clipped_sum(gradient @ stretch, described).units
    first = (clip(gradient, 1.0)[0] @ stretch)[0].astype(int)
    assert last @ last <= GRID**2 < first @ first


def test_shapes_are_checked() -> None:
    with pytest.raises(MechanismError, match=r"\(n, 4\)"):
        clipped_sum(np.zeros((3, 5)), mechanism())
    with pytest.raises(MechanismError, match=r"\(4,\)"):
        release(ClippedSum.empty(5), mechanism(), SecureNoise())


def test_description_is_frozen_and_hashed_over_every_field() -> None:
    described = mechanism()
    with pytest.raises(ValidationError):
        described.clipping_norm = 2.0  # type: ignore[misc]  # the point of the test
    changes: list[dict[str, object]] = [
        {"probe": "other"},
        {"probe_sha256": "1" * 64},
        {"clipping_norm": 2.0},
        {"noise_multiplier": 2.0},
        {"sampling_rate": 0.5},
        {"expected_batch_size": 10},
        {"minimum_examples": 51},
        {"warn_below": 301},
        {"reduction": mechanism(seed=1).reduction},
    ]
    hashes = {described.model_copy(update=change).sha256 for change in changes}
    assert len(hashes | {described.sha256}) == len(changes) + 1
    again = ProfileMechanism.model_validate_json(described.model_dump_json())
    assert again == described
    assert again.sha256 == described.sha256


def test_hash_is_the_same_everywhere() -> None:
    # Golden value: SHA-256 of the JSON text with sorted keys and no spaces.
    assert mechanism().sha256 == "60de6a6fbd868da4cfff5ddf2efeffcd34c454ef238b417dbfc20b4c4f79ebcc"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"standardise": "whiten"}, "needs basis_sha256"),
        ({"basis_sha256": "0" * 64}, "nothing in this mechanism uses a basis"),
        ({"clipping_norm": math.nan}, "clipping_norm"),
        ({"clipping_norm": 0.0}, "clipping_norm"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"noise_multiplier": math.inf}, "noise_multiplier"),
        ({"sampling_rate": 0.0}, "sampling_rate"),
        ({"probe_sha256": "xyz"}, "probe_sha256"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_wrong_descriptions_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ProfileMechanism.model_validate(mechanism().model_dump() | change)


def test_a_reduction_cannot_have_more_dimensions_than_the_gradient() -> None:
    with pytest.raises(ValidationError, match="128 entries"):
        Reduction(hidden_size=8, intermediate_size=16, projection_dimensions=129)


# --- the average over releases


def released(*values: float) -> Float32Array:
    return np.array(values, dtype=np.float32)


@given(decay=st.floats(0, 0.99), count=st.integers(1, 12))
def test_average_and_its_variance_in_closed_form(decay: float, count: int) -> None:
    described = mechanism(1, noise_multiplier=2.0)
    values = np.random.default_rng(count).standard_normal(count).astype(np.float32)
    profile: ReleasedProfile | None = None
    for value in values:
        profile = update_average(profile, released(float(value)), described, decay)
    weights = np.array([(1 - decay) * decay ** (count - 1 - index) for index in range(count)])
    weights[0] = decay ** (count - 1)
    assert math.isclose(weights.sum(), 1.0)
    assert profile is not None
    np.testing.assert_allclose(profile.vector[0], float(weights @ values), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(profile.noise_variance, 4.0 * (weights**2).sum(), rtol=1e-12)
    assert profile.releases == count


def test_resent_release_is_averaged_once() -> None:
    described = mechanism(2)
    first = update_average(None, released(1, 1), described, 0.5)
    second = update_average(first, released(3, 3), described, 0.5)
    assert update_average(second, released(3, 3), described, 0.5) is second


def test_average_refuses_foreign_or_broken_releases() -> None:
    described = mechanism(2)
    first = update_average(None, released(1, 1), described, 0.5)
    for bad in (released(1, 2, 3), released(math.nan, 1), released(math.inf, 1)):
        with pytest.raises(MechanismError, match="2 finite numbers"):
            update_average(first, bad, described, 0.5)
    for decay in (-0.1, 1.0, math.nan):
        with pytest.raises(MechanismError, match="decay"):
            update_average(first, released(1, 1), described, decay)
    with pytest.raises(MechanismError, match="changed mechanism"):
        update_average(first, released(1, 1, 1), mechanism(3), 0.5)


def test_a_gradient_without_tokens_is_rejected_by_the_clipping() -> None:
    described = mechanism()
    empty = GradientFactors(np.zeros((0, 8), np.float32), np.zeros((0, 16), np.float32))
    total = clipped_sum(Projection(described.reduction).rows([empty]), described)
    assert total.rejected == 1
    assert not total.units.any()
