"""Configuration of Co-LoRA as a PEFT method."""

import math
from dataclasses import dataclass, field

from peft import PeftConfig

from fedmosaic.client.colora.placement import LAYER_RULES
from fedmosaic.protos.errors import ConfigurationError

PEFT_TYPE = "COLORA"


@dataclass
class CoLoraConfig(PeftConfig):
    """How Co-LoRA adapts a model; used like any PEFT configuration.

    Clients that exchange shared adapters must agree on `r`, `alpha`, `blocks`, `target_modules` and the
    basis; the layout's hash guards that (`fedmosaic.client.colora.shared_layout`).

    Raises:
        ConfigurationError: A value lies outside its range.
    """

    r: int = field(default=16, metadata={"help": "Rank: P is (r, r), Q is (r,). At least 1."})
    alpha: float = field(
        default=32.0, metadata={"help": "The adapter's output is scaled by s = alpha / r. Above 0."}
    )
    blocks: int = field(
        default=4, metadata={"help": "Number of relative-depth blocks N_B = number of Co-LoRA layers."}
    )
    layer_rule: str = field(
        default="relative_depth",
        metadata={
            "help": "relative_depth (nearest layer to k/N_B of the depth) or authors (the released code's)."
        },
    )
    shared_layers: list[int] | None = field(
        default=None,
        metadata={
            "help": "0-based Co-LoRA layers, one per block; overrides layer_rule. Filled in on injection."
        },
    )
    other_layers: str = field(
        default="lora",
        metadata={"help": "lora: ordinary two-branch LoRA on all other layers; none: leave them alone."},
    )
    gate: str = field(
        default="scalar",
        metadata={
            "help": "scalar: one learnable β per adapted linear module (the paper). pooled: a vector per "
            "module, its logits averaged over the sequence's positions (the authors' code); cannot be merged."
        },
    )
    gate_noise_std: float = field(
        default=0.0,
        metadata={
            "help": "pooled gate only: std of Gaussian noise on each token's logit in training; 0 is off."
        },
    )
    personal_branch: bool = field(
        default=False,
        metadata={"help": "Add a third, ungated branch to every adapted module; it never leaves the client."},
    )
    basis_seed: int = field(
        default=0, metadata={"help": "Seed of the frozen A and B, and of LoRA's initial A."}
    )
    basis_label: str | None = field(
        default=None,
        metadata={
            "help": "Name of the basis, hashed into the layout; seed:<basis_seed> unless set_basis names it."
        },
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Linear modules of a decoder layer, such as q_proj; None for all. Filled in on injection."
        },
    )
    model_depth: int | None = field(
        default=None,
        metadata={"help": "Number of decoder layers of the adapted model. Filled in on injection."},
    )

    def __post_init__(self) -> None:
        """Check every value and name the PEFT method."""
        super().__post_init__()  # type: ignore[no-untyped-call]  # PEFT leaves it untyped
        # PEFT's enum of methods is closed; its tables of methods are keyed by plain strings as well.
        self.peft_type = PEFT_TYPE
        if isinstance(self.target_modules, (set, tuple)):
            self.target_modules = sorted(self.target_modules)
        _require(_is_whole(self.r) and self.r >= 1, "r", self.r, "a whole number of at least 1")
        _require(_is_finite(self.alpha) and self.alpha > 0, "alpha", self.alpha, "a finite number above 0")
        _require(
            _is_whole(self.blocks) and self.blocks >= 1, "blocks", self.blocks, "a whole number of at least 1"
        )
        _require(
            self.layer_rule in LAYER_RULES, "layer_rule", self.layer_rule, f"one of {', '.join(LAYER_RULES)}"
        )
        _require(self.other_layers in {"lora", "none"}, "other_layers", self.other_layers, "lora or none")
        _require(self.gate in {"scalar", "pooled"}, "gate", self.gate, "scalar or pooled")
        _require(
            _is_finite(self.gate_noise_std) and self.gate_noise_std >= 0,
            "gate_noise_std",
            self.gate_noise_std,
            "a finite number of at least 0",
        )
        _require(
            self.gate == "pooled" or self.gate_noise_std == 0,
            "gate_noise_std",
            self.gate_noise_std,
            "0 with the scalar gate, which has no noise",
        )
        _require(_is_whole(self.basis_seed), "basis_seed", self.basis_seed, "a whole number")
        _require(
            self.target_modules is None or isinstance(self.target_modules, list),
            "target_modules",
            self.target_modules,
            'a list of module names such as ["q_proj", "v_proj"], or None for all linear modules',
        )
        _require(
            self.shared_layers is None or len(self.shared_layers) == self.blocks,
            "shared_layers",
            self.shared_layers,
            f"a list with one layer for each of the {self.blocks} blocks",
        )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigurationError(f"CoLoraConfig: {name} is {value!r}; it should be {expected}.")
