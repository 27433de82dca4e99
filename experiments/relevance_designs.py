"""The profile designs that the relevance study compares, and the rows they give for texts."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fedmosaic.client.examples import (
    IGNORED,
    EncodedExample,
    Example,
    answer_tokens,
    cut_prompt,
    prompt_tokens,
)
from fedmosaic.client.probe import Probe, gradient_factors
from fedmosaic.client.public_basis import BasisSettings, fit_basis, standardise_rows
from fedmosaic.privacy.mechanism import Float64Array, ProfileMechanism, Reduction
from fedmosaic.privacy.projection import GradientFactors, Projection, PublicBasis, PublicMap

Rows = dict[str, Float64Array]


@dataclass(frozen=True)
class Design:
    """One way to make a profile.

    Attributes:
        kind: the reduction.
        dimensions: its output.
        normalise: whether every example's row gets unit norm.
        standardise: what follows.
        coordinate_share: share that random dimension sampling keeps.
    """

    kind: Literal["coordinates", "tensor_sketch", "kronecker"]
    dimensions: int
    normalise: bool = True
    standardise: Literal["none", "centre", "whiten"] = "none"
    coordinate_share: float = 1.0

    def reduction(self, probe: Probe) -> Reduction:
        """The reduction for a probe's gradient."""
        return Reduction(
            kind=self.kind,
            hidden_size=probe.hidden_size,
            intermediate_size=probe.intermediate_size,
            projection_dimensions=self.dimensions,
            coordinate_share=self.coordinate_share,
            normalise=self.normalise,
        )

    @property
    def rows_name(self) -> str:
        """Name of the rows before standardisation, which several designs may share."""
        return f"{self.kind}-{self.dimensions}-{self.coordinate_share}-{self.normalise}"


DESIGNS: Final[Mapping[str, Design]] = {
    "1,024 sampled coordinates": Design("coordinates", 1024, normalise=False),
    "1,024 sampled coordinates, unit norm": Design("coordinates", 1024),
    "tensor sketch 256, unit norm": Design("tensor_sketch", 256),
    "tensor sketch 256, centred": Design("tensor_sketch", 256, standardise="centre"),
    "tensor sketch 1,024, centred": Design("tensor_sketch", 1024, standardise="centre"),
    "kronecker 16 × 16, centred": Design("kronecker", 256, standardise="centre"),
    "kronecker 16 × 16, whitened": Design("kronecker", 256, standardise="whiten"),
    "kronecker 16 × 16, half sampled, whitened": Design(
        "kronecker", 256, standardise="whiten", coordinate_share=0.5
    ),
}
KRONECKER_SHAPE: Final = (16, 16)


def encode(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int
) -> list[EncodedExample]:
    """Encode as the product does, but cut answers to half of `max_length` instead of refusing long ones."""
    end = int(tokenizer.eos_token_id)
    encoded = []
    for example in examples:
        supervised = [*answer_tokens(tokenizer, example.answer), end][: max_length // 2]
        prompt = prompt_tokens(tokenizer, example.prompt)
        context = cut_prompt(tokenizer, prompt, max_length - len(supervised))
        encoded.append(
            EncodedExample(
                example.id,
                torch.tensor([*context, *supervised], dtype=torch.int64),
                torch.tensor([IGNORED] * len(context) + supervised, dtype=torch.int64),
            )
        )
    return encoded


def public_rows(
    probe: Probe, public: Sequence[EncodedExample], designs: Iterable[Design], cache: Path
) -> tuple[PublicBasis, Rows]:
    """Fit the two sides of the Kronecker reduction on public examples, and reduce these.

    Args:
        probe: the probe.
        public: encoded public examples.
        designs: which rows are needed.
        cache: folder where sides and rows are kept for the next run.

    Returns:
        The sides, and the rows as `reduced_rows` gives them.
    """
    path = cache / f"{_key(probe, public, PublicBasis(), ['sides', str(KRONECKER_SHAPE)])}.safetensors"
    if path.exists():
        sides = PublicBasis.load(path)
        return sides, reduced_rows(probe, public, sides, designs, cache)
    # A thousand short examples fit into memory, and probing takes longer than all the rest.
    factors = list(gradient_factors(probe, public))
    reduction = Design("kronecker", KRONECKER_SHAPE[0] * KRONECKER_SHAPE[1]).reduction(probe)
    settings = BasisSettings(standardise="none", kronecker_shape=KRONECKER_SHAPE)
    sides = fit_basis(lambda: [gradient for _, gradient in factors], reduction, settings).basis
    cache.mkdir(parents=True, exist_ok=True)
    sides.save(path)
    return sides, reduced_rows(probe, public, sides, designs, cache, factors)


def reduced_rows(
    probe: Probe,
    examples: Sequence[EncodedExample],
    sides: PublicBasis,
    designs: Iterable[Design],
    cache: Path,
    factors: Iterable[tuple[int, GradientFactors]] | None = None,
) -> Rows:
    """Reduce examples once for all designs.

    Args:
        probe: the probe.
        examples: encoded examples.
        sides: directions of the Kronecker reduction.
        designs: which rows are needed.
        cache: folder where the rows are kept for the next run; keyed by everything that they depend on.
        factors: the examples' indexed gradients, if they are at hand.

    Returns:
        Rows before standardisation, by `Design.rows_name`; row i belongs to `examples[i]`.
    """
    projections = {
        design.rows_name: Projection(design.reduction(probe), sides if design.kind == "kronecker" else None)
        for design in designs
    }
    path = cache / f"{_key(probe, examples, sides, sorted(projections))}.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name].astype(np.float64) for name in projections}
    rows = {
        name: np.full((len(examples), projection.reduction.dimensions), np.nan, dtype=np.float32)
        for name, projection in projections.items()
    }
    for index, gradient in gradient_factors(probe, examples) if factors is None else factors:
        for name, projection in projections.items():
            rows[name][index] = projection.rows([gradient])[0]
    cache.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, allow_pickle=False, **rows)
    partial.rename(path)
    return {name: values.astype(np.float64) for name, values in rows.items()}


def complete_map(
    design: Design, probe: Probe, probe_name: str, sides: PublicBasis, public_rows: Float64Array
) -> PublicMap:
    """The mechanism of a design without noise, its basis and clipping norm fitted on public rows."""
    own_sides = sides if design.kind == "kronecker" else PublicBasis()
    settings = BasisSettings(standardise=design.standardise, kronecker_shape=KRONECKER_SHAPE)
    fitted = standardise_rows(public_rows, own_sides, settings)
    bare = design.kind != "kronecker" and design.standardise == "none"
    mechanism = ProfileMechanism(
        probe=probe_name,
        probe_sha256=probe.sha256,
        reduction=design.reduction(probe),
        standardise=design.standardise,
        basis_sha256=None if bare else fitted.basis.sha256,
        clipping_norm=fitted.clipping_norm,
        noise_multiplier=0.0,
    )
    return PublicMap(mechanism, None if bare else fitted.basis)


def _key(probe: Probe, examples: Sequence[EncodedExample], sides: PublicBasis, names: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps([probe.sha256, str(_dtype(probe)), sides.sha256, *names]).encode())
    for example in examples:
        for tensor in (example.input_ids, example.labels):
            digest.update(tensor.numpy().astype("<i8").tobytes())
            digest.update(b"|")
    return digest.hexdigest()[:32]


def _dtype(probe: Probe) -> object:
    return next(probe.base.parameters()).dtype
