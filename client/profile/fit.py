"""`fedmosaic probe`: fit the task profile's public map, once per federation, on public data.

The directions U, V are the leading eigenvectors of Σ δδᵀ and Σ xxᵀ over public tokens; centre, whitening and
clipping norm come from the rows that public examples give under the same reduction. Public data must not
overlap with any client's data: the guarantee assumes that the basis would be the same without each private
example.
"""

import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import scipy.linalg
import tyro
from transformers.utils.logging import disable_progress_bar

from fedmosaic.client.model.examples import IGNORED, EncodedExample, encode_examples, read_public_examples
from fedmosaic.client.model.load import load_model
from fedmosaic.client.profile.probe import Probe, gradient_factors, open_probe
from fedmosaic.client.settings import DeviceName, DtypeName, ModelSettings
from fedmosaic.privacy.federation.kits import BASIS, PROFILE
from fedmosaic.privacy.mechanism.noise import Float64Array
from fedmosaic.privacy.mechanism.profile import Float32Array, ProfileMechanism, Reduction
from fedmosaic.privacy.mechanism.projection import GradientFactors, Projection, PublicBasis
from fedmosaic.protos.errors import MechanismError

logger = logging.getLogger(__name__)
ROWS_AT_ONCE: Final = 256
ROWS_PER_DIMENSION: Final = 2
"""Fewer public rows than this per dimension leave directions whose variance whitening can only guess."""
KEPT_BYTES: Final = 1 << 30
"""Public gradients up to this size stay in memory, so that the probe sees every example once."""
SHRINKAGE: Final = 0.1
"""Share of the mean eigenvalue that is added to every eigenvalue before whitening, so that directions which
public data hardly shows are not blown up."""
CLIPPING_QUANTILE: Final = 0.1
"""Of the public rows' norms, the clipping norm: a low one clips nearly every row, which then differ in
direction only."""


@dataclass(frozen=True)
class BasisSettings:
    """How a basis is fitted.

    `standardise` is what the mechanism will do with rows, `kronecker_shape` numbers of directions of δ and of
    x.
    """

    standardise: Literal["none", "centre", "whiten"] = "whiten"
    kronecker_shape: tuple[int, int] = (4, 32)


@dataclass(frozen=True, eq=False)
class FittedBasis:
    """A basis, and the clipping norm C that belongs to it in the unit of the standardised rows."""

    basis: PublicBasis
    clipping_norm: float
    examples: int


def fit_basis(
    factors: Callable[[], Iterable[GradientFactors]], reduction: Reduction, settings: BasisSettings
) -> FittedBasis:
    """Fit a basis to public gradients, which `factors` gives from the start each time that it is called."""
    _check_settings(reduction, settings)
    sides = PublicBasis()
    if reduction.kind == "kronecker":
        left, right = _leading_directions(factors(), reduction, settings.kronecker_shape)
        sides = PublicBasis(left=left, right=right)
    projection = Projection(reduction, sides)
    parts = [projection.rows(part) for part in _in_parts(factors())]
    rows = np.concatenate(parts) if parts else np.zeros((0, reduction.dimensions))
    return standardise_rows(rows, sides, settings)


def standardise_rows(rows: Float64Array, sides: PublicBasis, settings: BasisSettings) -> FittedBasis:
    """Find centre, whitening and clipping norm from (n, k) public rows, beside the sides of a basis."""
    rows = rows[np.isfinite(rows).all(axis=1)]
    if len(rows) < 2:
        raise MechanismError(f"{len(rows)} usable public gradients are too few for a basis; give hundreds")
    if settings.standardise == "whiten" and len(rows) < ROWS_PER_DIMENSION * rows.shape[1]:
        words = (
            "%d public gradients are few to whiten %d dimensions with; give %d or more, or fewer dimensions"
        )
        logger.warning(words, len(rows), rows.shape[1], ROWS_PER_DIMENSION * rows.shape[1])
    centre = whitening = None
    if settings.standardise != "none":
        centre = rows.mean(axis=0).astype(np.float32)
        rows = rows - centre
    if settings.standardise == "whiten":
        whitening = _whitening(rows)
        rows = rows @ whitening.T
    clipping_norm = float(np.quantile(np.linalg.norm(rows, axis=1), CLIPPING_QUANTILE))
    if not clipping_norm > 0.0:
        raise MechanismError("the public gradients are zero, so no clipping norm follows; give other data")
    return FittedBasis(PublicBasis(sides.left, sides.right, centre, whitening), clipping_norm, len(rows))


def fit_mechanism(
    probe: Probe,
    probe_name: str,
    public_examples: Sequence[EncodedExample],
    reduction: Reduction,
    settings: BasisSettings,
    noise_multiplier: float,
) -> tuple[ProfileMechanism, PublicBasis | None]:
    """Probe public examples, better a thousand than a hundred, for a mechanism and its basis if any."""
    fitted = fit_basis(_factors_of(probe, public_examples), reduction, settings)
    needed = reduction.kind == "kronecker" or settings.standardise != "none"
    mechanism = ProfileMechanism(
        probe=probe_name,
        probe_sha256=probe.sha256,
        reduction=reduction,
        standardise=settings.standardise,
        basis_sha256=fitted.basis.sha256 if needed else None,
        clipping_norm=fitted.clipping_norm,
        noise_multiplier=noise_multiplier,
    )
    return mechanism, fitted.basis if needed else None


def _factors_of(probe: Probe, public: Sequence[EncodedExample]) -> Callable[[], Iterable[GradientFactors]]:
    """Gradients to go through twice: kept if they fit into KEPT_BYTES, probed again otherwise."""
    tokens = sum(int((example.labels != IGNORED).sum()) for example in public)
    width = probe.hidden_size + probe.intermediate_size

    def factors() -> Iterator[GradientFactors]:
        return gradient_factors(probe, public)

    if 4 * tokens * width > KEPT_BYTES:
        return factors
    kept = list(factors())
    return lambda: kept


def _check_settings(reduction: Reduction, settings: BasisSettings) -> None:
    (rows, columns), sizes = settings.kronecker_shape, (reduction.hidden_size, reduction.intermediate_size)
    if reduction.kind == "kronecker" and rows * columns != reduction.projection_dimensions:
        raise MechanismError(
            f"a kronecker shape of {rows} × {columns} does not give the reduction's "
            f"{reduction.projection_dimensions} projection_dimensions; make the product equal"
        )
    if reduction.kind == "kronecker" and not (1 <= rows <= sizes[0] and 1 <= columns <= sizes[1]):
        raise MechanismError(
            f"a kronecker shape of {rows} × {columns} does not fit a gradient of shape {sizes}"
        )


def _in_parts(factors: Iterable[GradientFactors]) -> Iterator[list[GradientFactors]]:
    iterator = iter(factors)
    while part := list(itertools.islice(iterator, ROWS_AT_ONCE)):
        yield part


def _leading_directions(
    factors: Iterable[GradientFactors], reduction: Reduction, shape: tuple[int, int]
) -> tuple[Float32Array, Float32Array]:
    moments = [np.zeros((size, size)) for size in (reduction.hidden_size, reduction.intermediate_size)]
    for part in _in_parts(factors):
        for moment, side in zip(moments, ([f.delta for f in part], [f.inputs for f in part]), strict=True):
            tokens = np.concatenate(side)
            moment += tokens.T @ tokens
    left, right = (_leading(moment, count) for moment, count in zip(moments, shape, strict=True))
    return left, right


def _leading(moment: Float64Array, count: int) -> Float32Array:
    """The `count` leading eigenvectors of a symmetric matrix, as columns, largest first."""
    if not np.isfinite(moment).all():
        raise MechanismError("public gradients are not finite; leave out the examples that overflow")
    size = len(moment)
    _, vectors = scipy.linalg.eigh(moment, subset_by_index=(size - count, size - 1))
    return np.ascontiguousarray(vectors[:, ::-1], dtype=np.float32)


def _whitening(centred: Float64Array) -> Float32Array:
    """Λ^(-1/2) Uᵀ of the covariance, its eigenvalues raised by a share of their mean."""
    values, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    values = np.clip(values, 0.0, None)
    values += SHRINKAGE * values.mean()
    if not values.mean() > 0.0:
        raise MechanismError("the public gradients are all equal, so they cannot whiten; give other data")
    return np.ascontiguousarray((vectors / np.sqrt(values)).T, dtype=np.float32)


@dataclass(frozen=True)
class Arguments:
    """Fit the public map of the task profile, and print the terms to put into federation.toml.

    The public examples must not overlap with any member's data: the guarantee assumes that the map would
    be the same without each private example.
    """

    probe: str
    """Folder or hub id of the small frozen model that all members probe with."""
    public: Path
    """Public examples, JSON lines of prompt and answer; hundreds at least."""
    out: Path
    """Directory to write the basis and the terms to."""
    kind: Literal["kronecker", "tensor_sketch", "coordinates"] = "kronecker"
    """The reduction. `coordinates` is the paper's random dimension sampling."""
    dimensions: int = 128
    """Numbers in a release."""
    left: int = 4
    """Directions of the output gradient that `kronecker` keeps; of the input it keeps dimensions / left."""
    noise_multiplier: float = 8.0
    """σ, the noise's standard deviation over the clipping norm. 8 costs ε = 0.43 at δ = 1e-5 by itself."""
    device: DeviceName = "auto"
    """Where the probe computes."""
    dtype: DtypeName = "float32"
    """Weights of the probe in memory."""
    keep_layers: int | None = None
    """Cut the probe to its first layers."""
    max_length: int = 96
    """Tokens of an example that are read."""
    minimum_examples: int = 50
    """A data set smaller than this releases nothing."""


def fit(arguments: Arguments) -> ProfileMechanism:
    """Fit the map and write it; see `Arguments`."""
    settings = ModelSettings(
        path=arguments.probe,
        device=arguments.device,
        dtype=arguments.dtype,
        keep_layers=arguments.keep_layers,
    )
    model, tokenizer = load_model(settings)
    probe = open_probe(model)
    mechanism, basis = fit_mechanism(
        probe,
        Path(arguments.probe).name,
        encode_examples(tokenizer, read_public_examples(arguments.public), arguments.max_length),
        Reduction(
            kind=arguments.kind,
            hidden_size=probe.hidden_size,
            intermediate_size=probe.intermediate_size,
            projection_dimensions=arguments.dimensions,
        ),
        BasisSettings(
            standardise="none" if arguments.kind == "coordinates" else "whiten",
            kronecker_shape=(arguments.left, arguments.dimensions // arguments.left),
        ),
        arguments.noise_multiplier,
    )
    mechanism = mechanism.model_copy(update={"minimum_examples": arguments.minimum_examples})
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / PROFILE).write_text(mechanism.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if basis is not None:
        basis.save(arguments.out / BASIS)
    return mechanism


def as_toml(mechanism: ProfileMechanism) -> str:
    """The mechanism as the `[terms.profile]` table of a federation.toml."""
    content = mechanism.model_dump(mode="json", exclude_none=True)
    # JSON's strings, numbers and booleans are TOML's.
    reduction, plain = (
        "\n".join(f"{key} = {json.dumps(value)}" for key, value in table.items())
        for table in (content.pop("reduction"), content)
    )
    return f"[terms.profile]\n{plain}\n\n[terms.profile.reduction]\n{reduction}"


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic probe` with its arguments."""
    parsed = tyro.cli(Arguments, args=list(arguments), prog="fedmosaic probe")
    disable_progress_bar()
    mechanism = fit(parsed)
    print(f"# Put this into federation.toml and pass --basis {parsed.out / BASIS} to `fedmosaic keys init`.")
    print(as_toml(mechanism))
    return 0
