"""How models are aligned: sizes and methods, checked before any model is loaded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedmosaic.alignment.activations import METHODS, Method
from fedmosaic.alignment.blocks import PAIR_RULES
from fedmosaic.alignment.pairing import Reading
from fedmosaic.client.colora import CoLoraConfig
from fedmosaic.client.colora.placement import LAYER_RULES
from fedmosaic.protos.errors import ConfigurationError


@dataclass(frozen=True)
class AlignmentSettings:
    """How models are aligned."""

    rank: int = 16
    """r of the shared adapter."""
    alpha: float = 32.0
    """α of the scale s = α/r."""
    blocks: int = 4
    """Number of relative-depth blocks, one shared layer each."""
    layer_rule: str = "relative_depth"
    """Which layers: relative_depth, authors (the released floor rule), cka (most similar), late (last)."""
    target_modules: tuple[str, ...] = ()
    """Linear modules within a decoder layer, all by default."""
    method: Method = "activations"
    """Which directions: those of activations, or of cotangents, what comes back, that the models share best;
    random (the paper); singular vectors of the anchor's weights."""
    max_length: int = 96
    """Most tokens of a public text that are read."""
    batch_size: int = 16
    """Public texts per forward pass."""
    seed: int = 0
    """Seed of synthetic text, and of what a client draws at random."""

    def check(self) -> None:
        """`ConfigurationError` for sizes and names that make no sense, before any model is loaded."""
        for name, least in (("rank", 1), ("blocks", 1), ("max_length", 8), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; give at least {least}.")
        if not 0.0 < self.alpha < math.inf:
            raise ConfigurationError(f"alpha is {self.alpha}; give a finite number above 0.")
        for name, known in (("layer_rule", PAIR_RULES), ("method", METHODS)):
            if getattr(self, name) not in known:
                raise ConfigurationError(f"{name} is {getattr(self, name)!r}; choose {', '.join(known)}.")

    def reading(self) -> Reading:
        """How public text is read."""
        return Reading(max_length=self.max_length, batch_size=self.batch_size)

    def adapter(self, layers: Sequence[int], rule: str) -> CoLoraConfig:
        """Configuration of a checkpoint's adapter."""
        return CoLoraConfig(
            r=self.rank,
            alpha=self.alpha,
            blocks=self.blocks,
            layer_rule=rule if rule in LAYER_RULES else "relative_depth",
            shared_layers=list(layers),
            other_layers="none",
            basis_seed=self.seed,
            target_modules=list(self.target_modules) or None,
        )
