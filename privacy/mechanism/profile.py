"""The task profile's mechanism: a frozen description, and the steps that touch private numbers.

Per-example gradients are reduced by a public map (`fedmosaic.privacy.mechanism.projection`), clipped, summed
over a Poisson sample and released with Gaussian noise (`fedmosaic.privacy.mechanism.gaussian`):

    z_i = standardise(normalise(reduce(G_i)))                  public map, fixed before any private data
    y   = Σ_{i in B} clip_C(z_i) + N(0, σ²C²)                  clipped last, on a grid of integers

The bound of one example holds whatever the map does, and cosine similarity is free of the sum's scale.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from fedmosaic.privacy.configuration import Frozen, Hex32, canonical_json
from fedmosaic.privacy.mechanism import gaussian
from fedmosaic.privacy.mechanism.gaussian import ClippedSum, FloatArray
from fedmosaic.privacy.mechanism.noise import Float64Array, NoiseSource
from fedmosaic.protos.errors import MechanismError

Float32Array = npt.NDArray[np.float32]


class Reduction(Frozen):
    """A public linear map from a gradient (hidden_size × intermediate_size) to a few coordinates.

    `coordinates` reads entries at random places. `tensor_sketch` is a random projection computed from
    the factors. `kronecker` projects both sides on directions found on public data. Random dimension
    sampling then keeps `coordinate_share` of the result, the same coordinates for all clients.
    """

    kind: Literal["coordinates", "tensor_sketch", "kronecker"] = "coordinates"
    """Kind of map; `fedmosaic probe` writes `kronecker` unless told otherwise."""
    hidden_size: int = Field(ge=1, le=2**20)
    """Rows of the probe's gradient."""
    intermediate_size: int = Field(ge=1, le=2**20)
    """Columns of the probe's gradient."""
    projection_dimensions: int = Field(default=1024, ge=1, le=2**20)
    """Number of coordinates before sampling; `fedmosaic probe` writes 128 unless told otherwise."""
    coordinate_share: float = Field(default=1.0, gt=0.0, le=1.0, allow_inf_nan=False)
    """Share of the coordinates that is kept."""
    normalise: bool = True
    """Whether every gradient is scaled to norm 1 first."""
    public_seed: int = Field(default=0, ge=0, le=2**63 - 1)
    """Seed of every random choice of the map."""

    @property
    def dimensions(self) -> int:
        """Number of coordinates k that are left after sampling."""
        return max(1, round(self.coordinate_share * self.projection_dimensions))

    @model_validator(mode="after")
    def _fits(self) -> "Reduction":
        entries = self.hidden_size * self.intermediate_size
        if self.projection_dimensions > entries:
            raise ValueError(f"projection_dimensions must not exceed the {entries} entries of the gradient")
        return self


class ProfileMechanism(Frozen):
    """How task profiles are made. `fedmosaic probe` prints this table and the one below.

    All of it is public, chosen before any private data is seen, the same for all clients and constant over
    rounds.

    Attributes:
        version: version of this table.
        probe: name of the frozen probe model.
        probe_sha256: fingerprint of its weights (`fedmosaic.client.profile.probe.fingerprint`).
        reduction: the public map.
        standardise: `centre` subtracts the public mean, `whiten` also scales by the public covariance.
        basis_sha256: content hash of the public basis, if `reduction` or `standardise` needs one.
        clipping_norm: bound C on the L2 norm of one example, in the unit of the standardised rows.
        noise_multiplier: σ, the noise's standard deviation over C. 0 is refused except in test runs.
        sampling_rate: probability that an example takes part in a release; 1 uses all.
        expected_batch_size: public estimate of the sample's size; no computation uses it.
        minimum_examples: a data set smaller than this releases nothing.
        warn_below: a data set smaller than this gives a profile that is mostly noise.
    """

    version: Literal[1] = 1
    probe: str = Field(min_length=1, max_length=200)
    probe_sha256: Hex32
    reduction: Reduction
    standardise: Literal["none", "centre", "whiten"] = "none"
    basis_sha256: Hex32 | None = None
    clipping_norm: float = Field(default=1.0, gt=1e-6, le=1e6, allow_inf_nan=False)
    noise_multiplier: float = Field(default=8.0, ge=0.0, le=1e6, allow_inf_nan=False)
    sampling_rate: float = Field(default=1.0, gt=0.0, le=1.0, allow_inf_nan=False)
    expected_batch_size: int | None = Field(default=None, ge=1)
    minimum_examples: int = Field(default=50, ge=1)
    warn_below: int = Field(default=300, ge=1)

    @model_validator(mode="after")
    def _basis_named_when_needed(self) -> "ProfileMechanism":
        needed = self.reduction.kind == "kronecker" or self.standardise != "none"
        if needed and self.basis_sha256 is None:
            raise ValueError(
                f"reduction {self.reduction.kind!r} with standardise {self.standardise!r} needs "
                "basis_sha256: fit a public basis, or take another reduction with standardise 'none'"
            )
        if not needed and self.basis_sha256 is not None:
            raise ValueError("basis_sha256 is given, but nothing in this mechanism uses a basis; remove it")
        return self

    @property
    def dimensions(self) -> int:
        """Length k of a release."""
        return self.reduction.dimensions

    @property
    def noise_standard_deviation(self) -> float:
        """Standard deviation σC of the noise on each coordinate."""
        return self.noise_multiplier * self.clipping_norm

    @property
    def noise_variance(self) -> float:
        """Variance σ²C² of the noise on each coordinate."""
        return self.noise_standard_deviation**2

    @property
    def sha256(self) -> str:
        """Hash (hexadecimal) over the canonical JSON of this description."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json")).encode()).hexdigest()


def clipped_sum(rows: FloatArray, mechanism: ProfileMechanism) -> ClippedSum:
    """Clip and sum rows as `PublicMap.rows` gives them; MechanismError unless they are (n, k)."""
    if rows.ndim != 2 or rows.shape[1] != mechanism.dimensions:
        raise MechanismError(f"rows of shape {rows.shape} do not fit (n, {mechanism.dimensions})")
    return gaussian.clipped_sum(rows, mechanism.clipping_norm)


def release(total: ClippedSum, mechanism: ProfileMechanism, noise: NoiseSource) -> Float32Array:
    """Turn a private sum into (k,) float32 that may leave the client; MechanismError for another length."""
    if total.units.shape != (mechanism.dimensions,):
        raise MechanismError(f"a sum of shape {total.units.shape} does not fit ({mechanism.dimensions},)")
    noisy = gaussian.noisy_sum(total, mechanism.clipping_norm, mechanism.noise_multiplier, noise)
    return noisy.astype(np.float32)


@dataclass(frozen=True, eq=False)
class ReleasedProfile:
    """A moving average of releases, (k,) float64: post-processing, free of further privacy cost.

    The digest of the newest release tells when one is sent again, which is not averaged twice.
    """

    vector: Float64Array
    noise_variance: float
    releases: int
    last_release_sha256: str


def update_average(
    previous: ReleasedProfile | None, released: Float32Array, mechanism: ProfileMechanism, decay: float
) -> ReleasedProfile:
    """Average a new release into the profile: decay · previous + (1 - decay) · released.

    Noise is drawn on every fresh release and never on the average, whose neighbouring values would otherwise
    each depend on all examples so far. The first release, (k,) float32, is taken as it is, and one that the
    average already ends with changes nothing.

    Reference:
        Co-LoRA (arXiv 2506.11024), the exponential moving average of sanitised gradients.
    """
    if not 0.0 <= decay < 1.0:
        raise MechanismError(f"the decay of the profile's average is {decay!r}; it must be in [0, 1)")
    if released.shape != (mechanism.dimensions,) or not np.isfinite(released).all():
        raise MechanismError(f"a release holds {mechanism.dimensions} finite numbers, not {released.shape}")
    digest = hashlib.sha256(np.ascontiguousarray(released, dtype="<f4").tobytes()).hexdigest()
    if previous is None:
        return ReleasedProfile(released.astype(np.float64), mechanism.noise_variance, 1, digest)
    if previous.vector.shape != released.shape:
        raise MechanismError(
            f"the average has shape {previous.vector.shape}, the release {released.shape}; "
            "a changed mechanism needs a new average"
        )
    if previous.last_release_sha256 == digest:
        return previous
    fresh = 1.0 - decay
    return ReleasedProfile(
        decay * previous.vector + fresh * released.astype(np.float64),
        math.fsum((decay**2 * previous.noise_variance, fresh**2 * mechanism.noise_variance)),
        previous.releases + 1,
        digest,
    )
