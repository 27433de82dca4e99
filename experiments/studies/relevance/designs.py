"""The profile designs that the relevance study compares, and the rows they give for texts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fedmosaic.client.model import examples as texts
from fedmosaic.client.profile.fit import BasisSettings, fit_basis, standardise_rows
from fedmosaic.client.profile.probe import Probe
from fedmosaic.privacy.mechanism.noise import Float64Array
from fedmosaic.privacy.mechanism.profile import ProfileMechanism, Reduction
from fedmosaic.privacy.mechanism.projection import GradientFactors, Projection, PublicBasis, PublicMap

Rows = dict[str, Float64Array]


@dataclass(frozen=True)
class Design:
    """One way to make a profile; `left` is how many directions of δ a Kronecker reduction has."""

    kind: Literal["coordinates", "tensor_sketch", "kronecker"]
    dimensions: int
    normalise: bool = True
    standardise: Literal["none", "centre", "whiten"] = "none"
    coordinate_share: float = 1.0
    left: int = 16

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
        return f"{self.kind}-{self.dimensions}-{self.left}-{self.coordinate_share}-{self.normalise}"

    def own_sides(self, sides: PublicBasis) -> PublicBasis:
        """The leading directions that this design uses; none unless it is a Kronecker reduction."""
        if self.kind != "kronecker" or sides.left is None or sides.right is None:
            return PublicBasis()
        right = self.dimensions // self.left
        return PublicBasis(
            left=np.ascontiguousarray(sides.left[:, : self.left]),
            right=np.ascontiguousarray(sides.right[:, :right]),
        )


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
    "kronecker 4 × 32, whitened": Design("kronecker", 128, standardise="whiten", left=4),
}
SIDES: Final = (16, 32)
"""Directions of δ and of x that suffice for every design."""


def encode(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[texts.Example], max_length: int
) -> list[texts.EncodedExample]:
    """Encode as the product does, but cut answers to half of `max_length` instead of refusing long ones."""
    end = int(tokenizer.eos_token_id)
    encoded = []
    for example in examples:
        supervised = [*texts.answer_tokens(tokenizer, example.answer), end][: max_length // 2]
        prompt = texts.prompt_tokens(tokenizer, example.prompt)
        context = texts.cut_prompt(tokenizer, prompt, max_length - len(supervised))
        encoded.append(
            texts.EncodedExample(
                example.id,
                torch.tensor([*context, *supervised], dtype=torch.int64),
                torch.tensor([texts.IGNORED] * len(context) + supervised, dtype=torch.int64),
            )
        )
    return encoded


def fit_sides(probe: Probe, public: Sequence[GradientFactors], shape: tuple[int, int]) -> PublicBasis:
    """Fit the two sides of a Kronecker reduction on public gradients."""
    reduction = Design("kronecker", shape[0] * shape[1]).reduction(probe)
    settings = BasisSettings(standardise="none", kronecker_shape=shape)
    return fit_basis(lambda: public, reduction, settings).basis


def reduced_rows(
    probe: Probe, factors: Sequence[GradientFactors], designs: Iterable[Design], sides: PublicBasis
) -> Rows:
    """(n, k) rows of n gradients before standardisation, for every design by its `rows_name`.

    There have to be enough directions of δ and x for the largest Kronecker design, strongest first.
    """
    projections = {
        design.rows_name: Projection(design.reduction(probe), design.own_sides(sides)) for design in designs
    }
    return {name: projection.rows(factors) for name, projection in projections.items()}


def complete_map(
    design: Design, probe: Probe, probe_name: str, sides: PublicBasis, public_rows: Float64Array
) -> PublicMap:
    """The mechanism of a design without noise, its basis and clipping norm fitted on public rows."""
    settings = BasisSettings(standardise=design.standardise)
    fitted = standardise_rows(public_rows, design.own_sides(sides), settings)
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
