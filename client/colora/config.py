"""Configuration of Co-LoRA as a PEFT method."""

import math
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig

from fedmosaic.client.colora.placement import LAYER_RULES
from fedmosaic.protos.errors import ConfigurationError

PEFT_TYPE = "COLORA"
SPOKEN_TYPE = "COLORA, a method of the package fedmosaic: import fedmosaic.client.colora before loading"
"""The method's name in files: PEFT without this package raises KeyError with it, so it says what to do."""
BRANCHES = ("local", "global", "personal")


@dataclass
class CoLoraConfig(PeftConfig):
    """How Co-LoRA adapts a model; used like any PEFT configuration, and a ConfigurationError out of range.

    Clients that exchange shared adapters must agree on `r`, `alpha`, `blocks`, `target_modules` and the
    basis; the layout's hash guards that (`shared_layout`). P is (r, r), Q (r,), the output scaled by s =
    alpha / r; `blocks` is the number N_B of Co-LoRA layers, chosen by `layer_rule`
    (`placement.target_layers`) or 0-based in `shared_layers`; `other_layers` carry two-branch LoRA, or none.
    The gate is one β per adapted module; adapters saved with another `gate` or `gate_noise_std` are refused.
    `personal_branch` adds a third, ungated branch that never leaves the client. `basis_seed` draws A, B and
    LoRA's initial A; `basis_label` names the basis in the layout. `target_modules` are linear modules of a
    decoder layer; None for all. By `shared` and `family`, `active_branches` take part in the forward pass and
    `fixed_gate`, in [0, 1], stands in the gate's place. Layers, modules and `model_depth` are filled in on
    injection, branches and fixed gates when an adapter is saved.
    """

    r: int = 16
    alpha: float = 32.0
    blocks: int = 4
    layer_rule: str = "relative_depth"
    shared_layers: list[int] | None = None
    other_layers: str = "lora"
    gate: str = "scalar"
    gate_noise_std: float = 0.0
    personal_branch: bool = False
    basis_seed: int = 0
    basis_label: str | None = None
    target_modules: list[str] | None = None
    model_depth: int | None = None
    active_branches: dict[str, list[str]] | None = None
    fixed_gate: dict[str, float] | None = None

    def __post_init__(self) -> None:
        """Check every value and name the PEFT method."""
        super().__post_init__()  # type: ignore[no-untyped-call]  # PEFT leaves it untyped
        # PEFT's enum of methods is closed; its tables of methods are keyed by plain strings as well.
        self.peft_type = PEFT_TYPE
        if isinstance(self.target_modules, (set, tuple)):
            self.target_modules = sorted(self.target_modules)
        targets, layers = self.target_modules, self.shared_layers
        switches = _by_kind(self.active_branches, lambda v: isinstance(v, list) and {*v} <= {*BRANCHES})
        gates = _by_kind(self.fixed_gate, lambda value: _is_finite(value) and 0.0 <= value <= 1.0)
        for name, fits, expected in (
            ("r", _is_whole(self.r) and self.r >= 1, "a whole number of at least 1"),
            ("alpha", _is_finite(self.alpha) and self.alpha > 0, "a finite number above 0"),
            ("blocks", _is_whole(self.blocks) and self.blocks >= 1, "a whole number of at least 1"),
            ("layer_rule", self.layer_rule in LAYER_RULES, f"one of {', '.join(LAYER_RULES)}"),
            ("other_layers", self.other_layers in {"lora", "none"}, "lora or none"),
            ("gate", self.gate == "scalar", "scalar"),
            ("gate_noise_std", self.gate_noise_std == 0, "0"),
            ("basis_seed", _is_whole(self.basis_seed), "a whole number"),
            (
                "target_modules",
                targets is None or isinstance(targets, list),
                'a list of module names such as ["q_proj", "v_proj"], or None for all linear modules',
            ),
            (
                "shared_layers",
                layers is None or len(layers) == self.blocks,
                f"a list with one layer for each of the {self.blocks} blocks",
            ),
            ("active_branches", switches, f"lists of {', '.join(BRANCHES)} by shared and family, or None"),
            ("fixed_gate", gates, "numbers in [0, 1] by shared and family, or None"),
        ):
            if not fits:
                value = getattr(self, name)
                raise ConfigurationError(f"CoLoraConfig: {name} is {value!r}; it should be {expected}.")

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, with a name of the method that tells what to import."""
        content: dict[str, Any] = super().to_dict()
        return content | {"peft_type": SPOKEN_TYPE}


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _by_kind(value: Any, fits: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, dict) and {*value} <= {"shared", "family"} and all(map(fits, value.values()))
