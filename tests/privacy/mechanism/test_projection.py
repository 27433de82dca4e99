"""Public maps equal their definitions on the whole matrix, and come out the same everywhere."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from builders import tiny_mechanism
from fedmosaic.privacy.mechanism.profile import Float32Array, ProfileMechanism, Reduction
from fedmosaic.privacy.mechanism.projection import GradientFactors, Projection, PublicBasis, PublicMap
from fedmosaic.protos.errors import MechanismError

HIDDEN, INNER = 6, 10


def reduction(kind: str = "coordinates", dimensions: int = 12, **changes: object) -> Reduction:
    fields: dict[str, object] = {
        "kind": kind,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "projection_dimensions": dimensions,
        "normalise": False,
    }
    return Reduction.model_validate(fields | changes)


def gradients(count: int = 5, seed: int = 0) -> list[GradientFactors]:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 6, count)
    return [
        GradientFactors(
            generator.standard_normal((length, HIDDEN)).astype(np.float32),
            generator.standard_normal((length, INNER)).astype(np.float32),
        )
        for length in lengths
    ]


def matrix(factors: GradientFactors) -> Float32Array:
    return factors.delta.T @ factors.inputs


def orthonormal(rows: int, columns: int) -> Float32Array:
    return np.linalg.qr(np.random.default_rng(rows).standard_normal((rows, columns)))[0].astype(np.float32)


def linear_map(projection: Projection) -> np.ndarray:
    """The map's own matrix (k, HIDDEN · INNER), read off its action on the entries."""
    columns = []
    for row in range(HIDDEN):
        for column in range(INNER):
            delta, inputs = np.zeros((1, HIDDEN), np.float32), np.zeros((1, INNER), np.float32)
            delta[0, row] = inputs[0, column] = 1.0
            columns.append(projection.rows([GradientFactors(delta, inputs)])[0])
    return np.array(columns).T


@pytest.mark.parametrize("kind", ["coordinates", "tensor_sketch", "kronecker"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_rows_are_a_fixed_linear_map_of_the_whole_gradient(kind: str, share: float) -> None:
    basis = PublicBasis(left=orthonormal(HIDDEN, 3), right=orthonormal(INNER, 4))
    projection = Projection(reduction(kind, coordinate_share=share), basis)
    factors = gradients()
    expected = np.array([linear_map(projection) @ matrix(factor).ravel() for factor in factors])
    assert expected.shape == (5, 12 if share == 1.0 else 6)
    np.testing.assert_allclose(projection.rows(factors), expected, rtol=1e-4, atol=1e-5)


def test_coordinates_read_distinct_entries() -> None:
    rows = linear_map(Projection(reduction(dimensions=40)))
    assert np.array_equal(rows.sum(axis=1), np.ones(40))
    assert np.count_nonzero(rows.sum(axis=0)) == 40


def test_kronecker_is_the_two_sided_product() -> None:
    left, right = orthonormal(HIDDEN, 3), orthonormal(INNER, 4)
    projection = Projection(reduction("kronecker"), PublicBasis(left=left, right=right))
    factor = gradients()[0]
    expected = (left.T @ matrix(factor) @ right).ravel()
    np.testing.assert_allclose(projection.rows([factor])[0], expected, rtol=1e-4, atol=1e-6)


def test_tensor_sketch_is_an_isometry_on_average() -> None:
    """Pham and Pagh 2013, lemma 3: E⟨Sa, Sb⟩ = ⟨a, b⟩ for the sketch of a tensor product."""
    first, second = gradients(2)
    expected = float(np.sum(matrix(first) * matrix(second)))
    found = []
    for seed in range(600):
        rows = Projection(reduction("tensor_sketch", 16, public_seed=seed)).rows([first, second])
        found.append(float(rows[0] @ rows[1]))
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - expected) < 5 * error
    scale = float(np.linalg.norm(matrix(first)) * np.linalg.norm(matrix(second)))
    assert error < scale / np.sqrt(16) / 8


def test_normalised_rows_have_unit_norm_or_are_zero() -> None:
    huge, none = gradients(2)
    huge = GradientFactors(huge.delta * np.float32(1e18), huge.inputs * np.float32(1e18))
    none = GradientFactors(np.zeros_like(none.delta), none.inputs)
    rows = Projection(reduction(normalise=True)).rows([*gradients(), huge, none])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), [1, 1, 1, 1, 1, 1, 0], rtol=1e-6)


def test_seeds_make_different_maps_and_purposes_too() -> None:
    factors = gradients(1)
    rows = [Projection(reduction("tensor_sketch", public_seed=seed)).rows(factors)[0] for seed in (0, 0, 1)]
    assert np.array_equal(rows[0], rows[1])
    assert not np.allclose(rows[0], rows[2])


def test_maps_are_the_same_on_every_platform() -> None:
    """Golden: SHAKE-256 of the documented label, read as little-endian words."""
    label = b'["fedmosaic public map 1", "entries", 7]'
    words = np.frombuffer(hashlib.shake_256(label).digest(8 * 8), dtype="<u8")
    first_places = [int(word) % 60 for word in words]
    assert len(set(first_places[:4])) == 4
    rows = linear_map(Projection(reduction(dimensions=4, public_seed=7)))
    assert [int(np.flatnonzero(row)[0]) for row in rows] == first_places[:4]
    assert first_places[:4] == [56, 48, 34, 36]


def test_shapes_that_do_not_fit_are_refused() -> None:
    projection = Projection(reduction())
    good = gradients(1)[0]
    for bad in (
        GradientFactors(good.delta[:, :-1], good.inputs),
        GradientFactors(good.delta, good.inputs[:, :-1]),
        GradientFactors(np.repeat(good.delta, 2, axis=0), good.inputs),
    ):
        with pytest.raises(MechanismError, match="probe model"):
            projection.rows([bad])
    assert projection.rows([]).shape == (0, 12)


def test_overflow_on_the_way_becomes_a_row_that_clipping_rejects() -> None:
    good = gradients(1)[0]
    overflowing = GradientFactors(good.delta * np.float32(1e30), good.inputs * np.float32(1e30))
    for kind in ("coordinates", "tensor_sketch"):
        row = Projection(reduction(kind, normalise=True)).rows([overflowing])[0]
        assert not np.isfinite(row).all()


# --- the basis and the complete map


def mechanism(basis: PublicBasis | None, standardise: str, kind: str = "tensor_sketch") -> ProfileMechanism:
    return tiny_mechanism(
        reduction=reduction(kind, normalise=True),
        standardise=standardise,
        basis_sha256=None if basis is None else basis.sha256,
    )


def full_basis() -> PublicBasis:
    generator = np.random.default_rng(3)
    return PublicBasis(
        centre=generator.standard_normal(12).astype(np.float32),
        whitening=generator.standard_normal((12, 12)).astype(np.float32),
    )


def test_centre_and_whitening_are_applied_after_normalisation() -> None:
    basis = full_basis()
    assert basis.centre is not None
    assert basis.whitening is not None
    plain = Projection(reduction("tensor_sketch", normalise=True)).rows(gradients())
    for standardise, expected in (
        ("centre", plain - basis.centre),
        ("whiten", (plain - basis.centre) @ basis.whitening.T),
    ):
        public_map = PublicMap(mechanism(basis, standardise), basis)
        np.testing.assert_allclose(public_map.rows(gradients()), expected, rtol=1e-6)
    np.testing.assert_allclose(PublicMap(mechanism(None, "none")).rows(gradients()), plain)


def test_basis_survives_the_disk(tmp_path: Path) -> None:
    basis = full_basis()
    basis.save(tmp_path / "basis.safetensors")
    loaded = PublicBasis.load(tmp_path / "basis.safetensors")
    assert loaded.sha256 == basis.sha256
    assert loaded.left is None


def test_basis_hash_covers_every_number_and_name() -> None:
    basis = full_basis()
    assert basis.centre is not None
    touched = basis.centre.copy()
    touched[3] = np.nextafter(touched[3], np.float32(9))
    other_place = PublicBasis(left=basis.whitening, centre=basis.centre)
    hashes = {b.sha256 for b in (basis, PublicBasis(centre=touched, whitening=basis.whitening), other_place)}
    assert len(hashes) == 3


def test_another_basis_than_the_agreed_one_is_refused() -> None:
    basis = full_basis()
    described = mechanism(basis, "whiten")
    for wrong in (None, PublicBasis(centre=basis.centre)):
        with pytest.raises(MechanismError, match="belongs to the roster"):
            PublicMap(described, wrong)


def test_a_basis_that_does_not_fit_is_refused() -> None:
    short = PublicBasis(centre=np.zeros(5, np.float32))
    with pytest.raises(MechanismError, match=r"centre of shape \(12,\)"):
        PublicMap(mechanism(short, "centre"), short)
    flat = PublicBasis(centre=np.zeros(12, np.float32))
    with pytest.raises(MechanismError, match=r"whitening of shape \(12, 12\)"):
        PublicMap(mechanism(flat, "whiten"), flat)
    with pytest.raises(MechanismError, match="both sides"):
        Projection(reduction("kronecker"), flat)
    wide = PublicBasis(left=orthonormal(HIDDEN, 4), right=orthonormal(INNER, 4))
    with pytest.raises(MechanismError, match="do not fit a kronecker"):
        Projection(reduction("kronecker"), wide)


def test_damaged_or_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "basis.safetensors"
    with pytest.raises(MechanismError, match="FileNotFoundError"):
        PublicBasis.load(path)
    for content in (b"", b"\x00" * 40, b"\xff" * 200, b"\x80\x04K\x01."):
        path.write_bytes(content)
        with pytest.raises(MechanismError, match="public basis"):
            PublicBasis.load(path)
    foreign: list[tuple[dict[str, np.ndarray], str]] = [
        ({"secret": np.zeros(3, np.float32)}, "unknown arrays"),
        ({"centre": np.zeros(3, np.float64)}, "finite float32"),
        ({"centre": np.array([1, np.nan], np.float32)}, "finite float32"),
    ]
    for arrays, message in foreign:
        save_file(arrays, path)
        with pytest.raises(MechanismError, match=message):
            PublicBasis.load(path)
