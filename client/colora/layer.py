"""What every adapted linear module does: branches, gate, merging.

Co-LoRA modules (shared layers) and LoRA modules (family layers) of `linear.py` add to a frozen linear
module, per active adapter,

    Co-LoRA:  s · B [ (1−β̃)(P_L A x + Q_L) + β̃ (P_G A x + Q_G) + (P_p A x + Q_p) ]
    LoRA:     s · [ (1−β̃) B_L A_L x + β̃ B_G A_G x + B_p A_p x ]

with branches L `local` (trained and shared), G `global` (received, frozen by default) and p `personal`
(optional, never leaves). The gate β̃ = σ(β) weighs L against G; it acts only while both are active, a
branch that is alone has weight 1. β is one scalar per adapted linear module (the paper's "layer" with
weight W_p), so an attention projection may trust its peers more than the feed-forward does.
"""

import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from fedmosaic.client.colora.config import BRANCHES, CoLoraConfig
from fedmosaic.client.colora.placement import Placement
from fedmosaic.protos.errors import ModelError

GATE = "gate"
DEFAULT_TRAINABLE = frozenset({"local", "personal", GATE})


@dataclass
class AdapterSettings:
    """Facts and switches of one adapter on one module.

    Of the `branches` that exist those `active` take part in the forward pass, the others are not computed;
    `trainable` are those of them and `gate` that are trained while the adapter is active; `fixed_gate` is a
    constant in [0, 1] that replaces β̃. The scale is s = α/r.
    """

    placement: Placement
    rank: int
    alpha: float
    basis_label: str
    branches: tuple[str, ...]
    active: frozenset[str]
    trainable: frozenset[str] = frozenset()
    fixed_gate: float | None = None

    @property
    def scaling(self) -> float:
        """The scale s."""
        return self.alpha / self.rank

    @property
    def in_order(self) -> tuple[str, ...]:
        """The active branches in the order of `branches`, so that sums round alike in every process."""
        return tuple(branch for branch in self.branches if branch in self.active)


class MergeDelta(NamedTuple):
    """The affine map an adapter adds, in factors: ΔW = left @ right, Δb = bias; all float32."""

    left: torch.Tensor
    """(d_out, k)"""
    right: torch.Tensor
    """(k, d_in)"""
    bias: torch.Tensor | None
    """(d_out,), or None where the adapter adds no constant."""


class CoLoraLayer(nn.Module, BaseTunerLayer):
    """What both kinds of adapted linear module share: gate, switches, merging."""

    # For each trainable group, the attributes that hold its tensors by adapter name.
    group_containers: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    buffer_containers: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: CoLoraConfig, placement: Placement
    ) -> None:
        """Adapt a linear module, possibly wrapped by another tuner, with a first adapter."""
        super().__init__()
        self.base_layer = base_layer
        linear = self.linear
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.settings: dict[str, AdapterSettings] = {}
        self.frozen_peft_weight_names = {}
        self.merged_adapters = []
        self._merge_deltas: dict[str, MergeDelta] = {}
        self._bias_was_added = False
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.colora_gate = nn.ParameterDict()
        for group, names in self.group_containers.items():
            for name in names if group != GATE else ():
                setattr(self, name, nn.ModuleDict())
        for name in self.buffer_containers:
            setattr(self, name, BufferDict(persistent=True))
        self.update_layer(adapter_name, config, placement)

    @property
    def linear(self) -> nn.Linear:
        """The frozen linear module under all adapters."""
        linear = self.get_base_layer()
        if not isinstance(linear, nn.Linear):
            raise ModelError(
                f"Co-LoRA adapts only torch.nn.Linear, not {type(linear).__name__}. "
                "Leave it out of target_modules."
            )
        return linear

    def update_layer(self, adapter_name: str, config: CoLoraConfig, placement: Placement) -> None:
        """Add an adapter to this module."""
        branches = BRANCHES if config.personal_branch else BRANCHES[:2]
        self.settings[adapter_name] = AdapterSettings(
            placement=placement,
            rank=config.r,
            alpha=config.alpha,
            basis_label=config.basis_label or f"seed:{config.basis_seed}",
            branches=branches,
            active=frozenset((config.active_branches or {}).get(placement.kind, branches)) & {*branches},
            fixed_gate=(config.fixed_gate or {}).get(placement.kind),
        )
        self._create_tensors(adapter_name, config, placement)
        self.colora_gate[adapter_name] = nn.Parameter(torch.zeros(1))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_trainable_groups(adapter_name, DEFAULT_TRAINABLE & {*branches, GATE})
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _create_tensors(self, adapter_name: str, config: CoLoraConfig, placement: Placement) -> None:
        raise NotImplementedError

    def branch_tensors(self, adapter_name: str, branch: str) -> tuple[torch.Tensor, ...]:
        """The parameters of a branch in the order of all vectors: P, Q, or LoRA's A, B."""
        raise NotImplementedError

    def _delta(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor | None:
        raise NotImplementedError

    def merge_delta(self, adapter_name: str) -> MergeDelta:
        """What merging the adapter adds to the base module."""
        raise NotImplementedError

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT would also cast to the base module's dtype. The adapter stays in float32: gradients that
        # are clipped and noised need it, and bfloat16 would spoil the bases' orthonormality.
        target = device if device is not None else self.linear.weight.device
        for name in (*self.adapter_layer_names, *self.buffer_containers):
            container = getattr(self, name)
            if adapter_name not in container or any(tensor.is_meta for tensor in container.parameters()):
                continue
            container[adapter_name] = container[adapter_name].to(target)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off; never touches what is trainable, unlike PEFT's own."""
        self._disable_adapters = not enabled

    def set_trainable_groups(self, adapter_name: str, groups: Iterable[str]) -> None:
        """Choose what is trained while the adapter is active: any of its branches and `gate`."""
        chosen = self.settings[adapter_name].trainable = frozenset(groups)
        # PEFT re-applies this declaration whenever it switches adapters or gradients.
        self.frozen_peft_weight_names[adapter_name] = tuple(
            name for group, names in self.group_containers.items() if group not in chosen for name in names
        )
        self.set_requires_grad(adapter_name, requires_grad=False)
        if adapter_name in self.active_adapters:
            self.set_requires_grad(adapter_name, requires_grad=True)

    def _gate(self, adapter_name: str) -> torch.Tensor | float:
        """β̃: a float if it is fixed, which reads no parameter; else (1,)."""
        fixed = self.settings[adapter_name].fixed_gate
        return torch.sigmoid(self.colora_gate[adapter_name]) if fixed is None else fixed

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' affine maps to the base module; Q needs a bias, which is made where absent.

        A ModelError says that the base weights are quantised, or with `safe_merge` that the result is not
        finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.settings:
                delta = self.merge_delta(name)
                self._add_to_base(delta, sign=1.0, safe=safe_merge)
                self._merge_deltas[name] = delta
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take all merged maps out of the base module again, up to rounding of its dtype."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            # The maps as they were when merged, for the cores may have changed since.
            self._add_to_base(self._merge_deltas.pop(self.merged_adapters.pop()), sign=-1.0, safe=False)
        if self._bias_was_added:
            self.linear.register_parameter("bias", None)
            self._bias_was_added = False

    def check_mergeable(self) -> None:
        """ModelError if the base weights are quantised, so that nothing small can be added to them."""
        if not self.linear.weight.is_floating_point():
            raise ModelError(
                f"The base weights are quantised ({self.linear.weight.dtype}), so an adapter cannot be "
                "merged into them: a change smaller than a step of their grid would be lost. Load the model "
                "without quantization, in float32 or bfloat16, to merge."
            )

    @torch.no_grad()
    def _add_to_base(self, delta: MergeDelta, *, sign: float, safe: bool) -> None:
        self.check_mergeable()
        base = self.linear
        wide = torch.promote_types(base.weight.dtype, torch.float32)
        weight = base.weight.to(wide) + sign * (delta.left @ delta.right).to(wide)
        bias: torch.Tensor | None = None if base.bias is None else base.bias.to(wide)
        if delta.bias is not None:
            bias = sign * delta.bias.to(wide) if bias is None else bias + sign * delta.bias.to(wide)
        if safe and not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
            raise ModelError(
                "The merged weights are not finite; the adapter is broken. Nothing was merged here."
            )
        base.weight.data = weight.to(base.weight.dtype)
        if bias is not None and base.bias is None:
            base.bias = nn.Parameter(bias.to(base.weight.dtype), requires_grad=False)
            self._bias_was_added = True
        elif bias is not None:
            base.bias.data = bias.to(base.bias.dtype)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base module's (..., positions, d_out) in its dtype, and what the active adapters add to it."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        # Autocast would run the cores in bfloat16; their gradients must be exact to float32.
        kind = x.device.type
        exact = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
        with exact:
            for name in self.active_adapters:
                delta = self._delta(x, name) if name in self.settings else None
                if delta is not None:
                    # Widened first: one sum over two types is several times slower on a processor.
                    result = (result.to(delta.dtype) + delta).to(result.dtype)
        return result

    def __repr__(self) -> str:
        return "colora." + super().__repr__()
