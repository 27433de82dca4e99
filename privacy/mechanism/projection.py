"""Public maps: from the factors of a per-example gradient to the few coordinates that are clipped.

A per-example gradient comes as its factors: G = Σ_t δ_t x_tᵀ, and no map here ever forms G. Everything random
in a map comes from SHAKE-256 over a label and the public seed, read as little-endian 64-bit words, so any
platform and any library version rebuilds the same map from the mechanism alone.

The guarantee does not rest on these maps: rows are clipped after them, whatever they are.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save_file

from fedmosaic.privacy.mechanism.noise import Float64Array, IntArray
from fedmosaic.privacy.mechanism.profile import Float32Array, ProfileMechanism, Reduction
from fedmosaic.protos.errors import MechanismError

MAXIMUM_BASIS_BYTES: Final = 256 * 2**20


@dataclass(frozen=True, eq=False)
class GradientFactors:
    """One example's gradient, G = Σ_t delta[t] ⊗ inputs[t], of (T, hidden) and (T, intermediate) float32.

    With T = 0 no gradient is defined. `delta` is at the output of the layer, mean over tokens included.
    """

    delta: Float32Array
    inputs: Float32Array


@dataclass(frozen=True, eq=False)
class PublicBasis:
    """What a map takes from public data rather than from a seed; absent parts are None.

    `left` (hidden_size, r1) and `right` (intermediate_size, r2) are directions of δ and x; `centre` (k,) is
    the mean of the public rows; `whitening` (k, k) is applied to centred rows from the left. All float32.
    """

    left: Float32Array | None = None
    right: Float32Array | None = None
    centre: Float32Array | None = None
    whitening: Float32Array | None = None

    @property
    def sha256(self) -> str:
        """Hash (hexadecimal) over the names, shapes and little-endian contents of the arrays."""
        digest = hashlib.sha256(b"fedmosaic public basis 1\n")
        for name, array in sorted(self._arrays().items()):
            digest.update(json.dumps([name, list(array.shape)]).encode() + b"\n")
            digest.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write as safetensors."""
        save_file({name: np.ascontiguousarray(array) for name, array in self._arrays().items()}, path)

    @classmethod
    def load(cls, path: Path) -> "PublicBasis":
        """Read a basis of finite float32; whether it is the agreed one, `PublicMap` says by its hash."""
        try:
            if path.stat().st_size > MAXIMUM_BASIS_BYTES:
                raise MechanismError(f"{path} has over {MAXIMUM_BASIS_BYTES} bytes; it is no public basis")
            arrays = load_safetensors(path.read_bytes())
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise MechanismError(
                f"{path} is no readable public basis ({type(error).__name__}); get it from the consortium"
            ) from error
        unknown = sorted(set(arrays) - {field.name for field in fields(cls)})
        if unknown:
            raise MechanismError(f"{path} holds unknown arrays {unknown}; a public basis has none such")
        for name, array in arrays.items():
            if array.dtype != np.float32 or not np.isfinite(array).all():
                raise MechanismError(f"{path}: {name} must hold finite float32 numbers")
        return cls(**arrays)

    def _arrays(self) -> dict[str, Float32Array]:
        present = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: array for name, array in present.items() if array is not None}


def check_basis(mechanism: ProfileMechanism, basis: Path | None) -> None:
    """Refuse another public basis than the one that the terms name by its hash, None if there is none."""
    agreed = mechanism.basis_sha256
    if agreed is None:
        if basis is not None:
            raise MechanismError(f"the terms' task profile uses no public basis; leave {basis} out")
        return
    if basis is None:
        raise MechanismError(
            f"terms.profile.basis_sha256 names the public basis {agreed[:16]}…, but no file is given: pass "
            "the one that `fedmosaic probe` wrote with --basis"
        )
    found = PublicBasis.load(basis).sha256
    if found != agreed:
        raise MechanismError(
            f"{basis} is the public basis {found[:16]}…, terms.profile.basis_sha256 says {agreed[:16]}…: "
            "both must be of the same run of `fedmosaic probe`, so give its basis or copy the tables it "
            "printed anew"
        )


class Projection:
    """The reduction of a mechanism, ready to use: project, sample dimensions, normalise."""

    def __init__(self, reduction: Reduction, basis: PublicBasis | None = None) -> None:
        self.reduction = reduction
        self._basis = basis
        hidden, inner = reduction.hidden_size, reduction.intermediate_size
        if reduction.kind == "coordinates":
            places = _distinct(reduction, "entries", hidden * inner, reduction.projection_dimensions)
            self._entry_rows, self._entry_columns = np.divmod(places, inner)
        elif reduction.kind == "tensor_sketch":
            sides = ("delta", hidden), ("inputs", inner)
            self._sketches = [_count_sketch(reduction, side, size) for side, size in sides]
        else:
            left, right = _kronecker_sides(reduction, basis)
            self._left, self._right = np.ascontiguousarray(left.T), np.ascontiguousarray(right.T)
        self._kept = np.sort(
            _distinct(reduction, "kept dimensions", reduction.projection_dimensions, reduction.dimensions)
        )

    def rows(self, factors: Iterable[GradientFactors]) -> Float64Array:
        """Reduce n gradients to (n, k) float64 rows, of unit L2 norm (or zero) if the reduction normalises.

        A gradient without tokens gives a row of NaN, which clipping rejects.
        """
        reduced = [self._project(gradient)[self._kept] for gradient in factors]
        if not reduced:
            return np.zeros((0, self.reduction.dimensions))
        rows = np.stack(reduced).astype(np.float64)
        return _unit(rows) if self.reduction.normalise else rows

    def _project(self, factors: GradientFactors) -> Float32Array:
        delta, inputs = factors.delta, factors.inputs
        expected = (self.reduction.hidden_size, self.reduction.intermediate_size)
        if (delta.shape[1], inputs.shape[1]) != expected or delta.shape[0] != inputs.shape[0]:
            raise MechanismError(
                f"factors of shapes {delta.shape} and {inputs.shape} do not fit a reduction of a gradient of "
                f"shape {expected}; is this the probe model of the mechanism?"
            )
        if delta.shape[0] == 0:
            return np.full(self.reduction.projection_dimensions, np.nan, dtype=np.float32)
        # A gradient that overflows is rejected by the clipping; it needs no warning on the way there.
        with np.errstate(over="ignore", invalid="ignore"):
            if self.reduction.kind == "coordinates":
                entries = delta[:, self._entry_rows] * inputs[:, self._entry_columns]
                return np.asarray(entries.sum(axis=0))
            if self.reduction.kind == "kronecker":
                return np.asarray((_along(delta, self._left).T @ _along(inputs, self._right)).ravel())
            return self._tensor_sketch(delta, inputs)

    def _tensor_sketch(self, delta: Float32Array, inputs: Float32Array) -> Float32Array:
        """Sum over tokens of the circular convolution of two count sketches.

        Reference:
            Pham and Pagh 2013, "Fast and scalable polynomial kernels via explicit feature maps".
        """
        spectra = [
            np.fft.rfft(side @ sketch, axis=1)
            for side, sketch in zip((delta, inputs), self._sketches, strict=True)
        ]
        # The transform is linear, so tokens are added before it is inverted.
        spectrum = (spectra[0] * spectra[1]).sum(axis=0)
        return np.fft.irfft(spectrum, n=self.reduction.projection_dimensions).astype(np.float32)


class PublicMap:
    """The whole public part of a mechanism: projection, normalisation, centre and whitening."""

    def __init__(self, mechanism: ProfileMechanism, basis: PublicBasis | None = None) -> None:
        found = None if basis is None else basis.sha256
        if found != mechanism.basis_sha256:
            raise MechanismError(
                f"the public basis has hash {found}, the mechanism names {mechanism.basis_sha256}; take what "
                "belongs to the roster"
            )
        self.mechanism = mechanism
        self.projection = Projection(mechanism.reduction, basis)
        self._centre, self._whitening = _standardisation(mechanism, basis)

    def rows(self, factors: Iterable[GradientFactors]) -> Float64Array:
        """Reduce, normalise and standardise n gradients to (n, k) float64, ready for `clipped_sum`."""
        return self.standardise(self.projection.rows(factors))

    def standardise(self, rows: Float64Array) -> Float64Array:
        """Centre and whiten (n, k) rows of `projection.rows` as the mechanism says."""
        if self._centre is None:
            return rows
        centred = rows - self._centre
        if self._whitening is None:
            return centred
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(centred @ self._whitening.T)


def _along(side: Float32Array, directions: Float32Array) -> Float32Array:
    """Scalar products of every token with every direction: (T, size) and (k, size) to (T, k).

    One by one, as the threads that BLAS starts for a product of this size cost many times the product where
    other processes use the cores.
    """
    return np.asarray(np.vecdot(side[:, None, :], directions[None, :, :]))


def _unit(rows: Float64Array) -> Float64Array:
    with np.errstate(invalid="ignore"):
        largest = np.abs(rows).max(axis=1, keepdims=True)
        scaled = rows / np.where(largest > 0.0, largest, 1.0)
    norms = np.linalg.norm(scaled, axis=1, keepdims=True)
    return np.asarray(scaled / np.where(norms > 0.0, norms, 1.0))


def _standardisation(
    mechanism: ProfileMechanism, basis: PublicBasis | None
) -> tuple[Float64Array | None, Float64Array | None]:
    if mechanism.standardise == "none":
        return None, None
    size = mechanism.dimensions
    centre = _part(basis, "centre", (size,))
    return centre, None if mechanism.standardise == "centre" else _part(basis, "whitening", (size, size))


def _part(basis: PublicBasis | None, name: str, shape: tuple[int, ...]) -> Float64Array:
    found: Float32Array | None = getattr(basis, name, None)
    if found is None or found.shape != shape:
        raise MechanismError(
            f"the mechanism's standardise needs a {name} of shape {shape} in the public basis; fit one for it"
        )
    return found.astype(np.float64)


def _kronecker_sides(reduction: Reduction, basis: PublicBasis | None) -> tuple[Float32Array, Float32Array]:
    if basis is None or basis.left is None or basis.right is None:
        raise MechanismError("a kronecker reduction needs a public basis with both sides; fit one")
    left, right, sizes = basis.left, basis.right, (reduction.hidden_size, reduction.intermediate_size)
    wanted = reduction.projection_dimensions
    fits = left.ndim == right.ndim == 2 and (left.shape[0], right.shape[0]) == sizes
    if not fits or left.shape[1] * right.shape[1] != wanted:
        raise MechanismError(
            f"directions of shapes {left.shape} and {right.shape} do not fit a kronecker reduction of a "
            f"{sizes} gradient to {wanted} dimensions"
        )
    return left, right


def _words(reduction: Reduction, purpose: str, count: int) -> npt.NDArray[np.uint64]:
    """The public random words of one purpose: SHAKE-256 (FIPS 202) over a label that no other map shares."""
    label = json.dumps(["fedmosaic public map 1", purpose, reduction.public_seed])
    stream = hashlib.shake_256(label.encode()).digest(8 * count)
    return np.frombuffer(stream, dtype="<u8").astype(np.uint64)


def _distinct(reduction: Reduction, purpose: str, population: int, count: int) -> IntArray:
    """`count` distinct numbers below `population`, in the order in which the words name them."""
    if count == population:
        return np.arange(population, dtype=np.int64)
    length = 2 * count + 64
    while True:
        values = (_words(reduction, purpose, length) % np.uint64(population)).astype(np.int64)
        chosen, first = np.unique(values, return_index=True)
        if chosen.size >= count:
            return np.asarray(chosen[np.argsort(first)][:count])
        length *= 2


def _count_sketch(reduction: Reduction, side: str, size: int) -> Float32Array:
    """A dense (size, m) count sketch: one signed one per row.

    Dense because a product with it then runs at matrix speed; it is smaller than the model's own head.
    """
    words = _words(reduction, f"sketch of {side}", size)
    signs = 1.0 - 2.0 * (words >> np.uint64(63)).astype(np.float32)
    buckets = (words % np.uint64(reduction.projection_dimensions)).astype(np.int64)
    sketch = np.zeros((size, reduction.projection_dimensions), dtype=np.float32)
    sketch[np.arange(size), buckets] = signs
    return sketch
