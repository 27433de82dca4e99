"""The task profile's mechanism: a frozen description, and the steps that touch private numbers.

Per-example gradients are reduced by a public map (`fedmosaic.privacy.mechanism.projection`), clipped, summed
over a Poisson sample and released with Gaussian noise:

    z_i = standardise(normalise(reduce(G_i)))                  public map, fixed before any private data
    q_i = trunc(2^24 · z_i / max(‖z_i‖, C))                    clip last, on a grid of integers
    y   = C · 2^-24 · (Σ_{i in B} q_i + round(N(0, (2^24 σ)²)))

The unit of privacy is one example under add/remove. It changes the sum by at most C in the L2 norm,
whatever the map does and whatever the example is, so one release is a Gaussian mechanism of noise
multiplier σ. The sum is released, never a mean: how many examples there are, or were sampled, is
private under add/remove, and cosine similarity is free of scale.

Arithmetic. Truncation towards zero keeps every ‖q_i‖ within 2^24, and integers add exactly and in any
order, so the sensitivity does not grow by rounding (Casacuberta et al., "Widespread underestimation
of sensitivity in differentially private libraries and how to fix it", CCS 2022). For an integer S,
S + round(G) = round(S + G): the release is a function of the continuous Gaussian mechanism's output
and keeps its exact (ε, δ), and the set of values it may take does not depend on the data.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Annotated, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, StringConstraints, model_validator

from fedmosaic.privacy.configuration import Frozen
from fedmosaic.privacy.mechanism.noise import NoiseSource
from fedmosaic.protos.errors import MechanismError

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]

GRID: Final = 2**24
"""Steps of the integer grid per clipping norm."""

# Keeps a row that is clipped within the bound although its norm was computed in doubles: the error of a
# sum of k squares is below k · 2^-53, and k is at most 2^20.
_NORM_MARGIN: Final = 1.0 - 2.0**-32


class Reduction(Frozen):
    """A public linear map from a gradient (hidden_size × intermediate_size) to a few coordinates.

    `coordinates` reads entries at random places. `tensor_sketch` is a random projection computed from
    the factors. `kronecker` projects both sides on directions found on public data. Random dimension
    sampling then keeps `coordinate_share` of the result, the same coordinates for all clients.
    """

    kind: Literal["coordinates", "tensor_sketch", "kronecker"] = "coordinates"
    hidden_size: int = Field(ge=1, le=2**20)
    intermediate_size: int = Field(ge=1, le=2**20)
    projection_dimensions: int = Field(default=1024, ge=1, le=2**20)
    coordinate_share: float = Field(default=1.0, gt=0.0, le=1.0, allow_inf_nan=False)
    normalise: bool = True
    public_seed: int = Field(default=0, ge=0, le=2**63 - 1)

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
    """Everything that client, server and report must agree on about a task profile.

    All of it is public, chosen before any private data is seen, the same for all clients and constant
    over rounds. What it costs is for `fedmosaic.privacy.accounting.epsilon` to say.

    Attributes:
        probe: name of the frozen probe model.
        probe_sha256: fingerprint of its weights (`fedmosaic.client.profile.probe.fingerprint`).
        reduction: the public map.
        standardise: `centre` subtracts the public mean, `whiten` also scales by the public covariance.
        basis_sha256: content hash of the public basis, if `reduction` or `standardise` needs one.
        clipping_norm: bound C on the L2 norm of one example, in the unit of the standardised rows.
        noise_multiplier: σ, the noise's standard deviation over C. 0 releases without protection.
        sampling_rate: probability that an example takes part in a release; 1 uses all.
        expected_batch_size: public forecast of the sample's size for planning; no computation reads it.
        minimum_examples: a data set smaller than this releases nothing.
        warn_below: a data set smaller than this gives a profile that is mostly noise.
    """

    version: Literal[1] = 1
    probe: str = Field(min_length=1, max_length=200)
    probe_sha256: Sha256
    reduction: Reduction
    standardise: Literal["none", "centre", "whiten"] = "none"
    basis_sha256: Sha256 | None = None
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
        content = json.dumps(
            self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False
        )
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class ClippedSum:
    """A sum of clipped rows before noise: private, never to leave the process.

    Attributes:
        units: (k,) int64, the sum in units of C / 2**24.
        clipped: number of rows that the bound shortened.
        rejected: number of rows that were not finite and count as zero.
        rows: number of rows, rejected ones included.
    """

    units: IntArray
    clipped: int
    rejected: int
    rows: int

    def __add__(self, other: "ClippedSum") -> "ClippedSum":
        return ClippedSum(
            self.units + other.units,
            self.clipped + other.clipped,
            self.rejected + other.rejected,
            self.rows + other.rows,
        )

    @classmethod
    def empty(cls, dimensions: int) -> "ClippedSum":
        """The sum over no example, where every sum and an empty Poisson sample start."""
        return cls(np.zeros(dimensions, dtype=np.int64), 0, 0, 0)


def clip(rows: FloatArray, clipping_norm: float) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """Bring every row to the integer grid with an L2 norm of at most one clipping norm.

    Args:
        rows: (n, k) standardised rows, any values.
        clipping_norm: bound C > 0, in the unit of `rows`.

    Returns:
        (n, k) int64 in units of C / 2**24, every row's exact L2 norm at most 2**24; and (n,) bool, which
        rows the bound shortened. A row with a value that is not finite becomes zero.
    """
    finite = np.isfinite(rows).all(axis=1, keepdims=True)
    values = np.where(finite, rows, 0.0).astype(np.float64)
    # Divided by its largest entry first, a row of 1e200 has a norm that a double can hold.
    largest = np.abs(values).max(axis=1, initial=0.0)
    scaled = values / np.where(largest > 0.0, largest, 1.0)[:, None]
    scaled_norm = np.linalg.norm(scaled, axis=1)
    directions = scaled / np.where(scaled_norm > 0.0, scaled_norm, 1.0)[:, None]
    with np.errstate(over="ignore"):
        lengths = largest * scaled_norm / clipping_norm
    shortened = lengths > 1.0
    units = np.trunc(directions * (np.minimum(lengths, 1.0) * (GRID * _NORM_MARGIN))[:, None])
    return units.astype(np.int64), shortened


def clipped_sum(rows: FloatArray, mechanism: ProfileMechanism) -> ClippedSum:
    """Clip rows and add them up; sums of parts of the data may be added.

    Args:
        rows: (n, k) rows of the examples in the Poisson sample, as `PublicMap.rows` gives them.
        mechanism: for k and the bound.

    Returns:
        The private sum. Adding or removing any one row changes it by at most C in the L2 norm.

    Raises:
        MechanismError: if `rows` does not have k columns.
    """
    if rows.ndim != 2 or rows.shape[1] != mechanism.dimensions:
        raise MechanismError(
            f"rows of shape {rows.shape} do not fit the mechanism; it sums (n, {mechanism.dimensions})"
        )
    units, shortened = clip(rows, mechanism.clipping_norm)
    rejected = np.count_nonzero(~np.isfinite(rows).all(axis=1))
    return ClippedSum(units.sum(axis=0), int(np.count_nonzero(shortened)), int(rejected), rows.shape[0])


def release(total: ClippedSum, mechanism: ProfileMechanism, noise: NoiseSource) -> Float32Array:
    """Draw noise and turn a private sum into bytes that may leave the client.

    Every call is one more event for the accountant, to be charged before it is made.

    Args:
        total: the private sum.
        mechanism: for k, C and σ.
        noise: `SecureNoise()` in real runs.

    Returns:
        (k,) float32, the noisy sum in the unit of the standardised rows.

    Raises:
        MechanismError: if the sum has another length than k.
    """
    if total.units.shape != (mechanism.dimensions,):
        raise MechanismError(
            f"a sum of shape {total.units.shape} does not fit the mechanism; it has ({mechanism.dimensions},)"
        )
    draws = np.rint(noise.gaussian(mechanism.dimensions, mechanism.noise_multiplier * GRID)).astype(np.int64)
    return ((total.units + draws) * (mechanism.clipping_norm / GRID)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class ReleasedProfile:
    """A moving average of releases: post-processing, free of further privacy cost.

    Attributes:
        vector: (k,) float64, the average.
        noise_variance: exact variance of the noise on each coordinate of `vector`.
        releases: number of releases averaged so far, at least 1.
        last_release_sha256: digest of the newest one, so that a re-sent release is not averaged twice.
    """

    vector: Float64Array
    noise_variance: float
    releases: int
    last_release_sha256: str


def update_average(
    previous: ReleasedProfile | None, released: Float32Array, mechanism: ProfileMechanism, decay: float
) -> ReleasedProfile:
    """Average a new release into the profile: decay · previous + (1 - decay) · released.

    Noise is drawn on every fresh release and never on the average, whose neighbouring values would
    otherwise each depend on all examples so far.

    Args:
        previous: the average so far, None before the first release, which becomes the average as it is.
        released: (k,) float32, a noisy release with independent noise.
        mechanism: the mechanism of all these releases.
        decay: weight of the past, in [0, 1).

    Returns:
        The new average; `previous` itself if `released` is the release it already ends with.

    Raises:
        MechanismError: if `decay` or the shape of `released` is wrong, or it is not finite.

    Reference:
        Co-LoRA (arXiv 2506.11024), the exponential moving average of sanitised gradients.
    """
    if not 0.0 <= decay < 1.0:
        raise MechanismError(f"the decay of the profile's average is {decay!r}; it must be in [0, 1)")
    if released.shape != (mechanism.dimensions,) or not np.isfinite(released).all():
        raise MechanismError(
            f"a release must hold {mechanism.dimensions} finite numbers; got shape {released.shape}"
        )
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
