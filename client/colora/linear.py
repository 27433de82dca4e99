"""The two kinds of adapted linear module: Co-LoRA on shared layers, branched LoRA on family layers.

The frozen bases A and B of Co-LoRA are drawn here from a public seed; `set_basis` puts others in their place.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import nn
from torch.nn import functional

from fedmosaic.client.colora.config import BRANCHES, CoLoraConfig
from fedmosaic.client.colora.layer import GATE, CoLoraLayer, MergeDelta
from fedmosaic.client.colora.placement import Placement
from fedmosaic.protos.errors import ModelError


def derive_seed(basis_seed: int, *labels: str | int) -> int:
    """Derive an independent seed in [0, 2**63) for each tensor, named by labels, from one public seed."""
    digest = hashlib.sha256(json.dumps([basis_seed, *labels]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def draw_orthonormal(dimension: int, rank: int, seed: int) -> torch.Tensor:
    """Draw (dimension, rank) float32 orthonormal columns uniformly (Haar measure) from a seed.

    Reference:
        F. Mezzadri, "How to generate random matrices from the classical compact groups", 2007, §5: the
        QR factor is Haar distributed, and unique, once the diagonal of R is made positive.
    """
    if rank > dimension:
        raise ModelError(
            f"Rank {rank} is above the width {dimension} of a module to adapt, so no orthonormal basis "
            f"exists. Lower r to at most {dimension}, or leave that module out of target_modules."
        )
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(dimension, rank, generator=generator, dtype=torch.float64)
    factors: tuple[torch.Tensor, torch.Tensor] = torch.linalg.qr(gaussian)
    orthonormal, triangular = factors
    return (orthonormal * torch.sign(torch.diagonal(triangular))).to(torch.float32).contiguous()


def orthonormality_error(vectors: torch.Tensor) -> float:
    """Return the largest absolute entry of VᵀV − I for V (dimension, rank), one vector per column."""
    wide = vectors.to(torch.float64)
    identity = torch.eye(wide.shape[1], dtype=torch.float64, device=wide.device)
    return float((wide.T @ wide - identity).abs().max())


class CoLoraLinear(CoLoraLayer):
    """A linear module of a shared layer: frozen A and B, trained cores P and Q."""

    group_containers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **{branch: (f"colora_core_{branch}",) for branch in BRANCHES},
        GATE: ("colora_gate",),
    }
    adapter_layer_names = tuple(name for names in group_containers.values() for name in names)
    buffer_containers: ClassVar[tuple[str, ...]] = ("colora_A", "colora_B")
    other_param_names = ("settings", *buffer_containers)
    colora_A: BufferDict
    colora_B: BufferDict

    def _create_tensors(self, adapter_name: str, config: CoLoraConfig, placement: Placement) -> None:
        where = (placement.block or 0, placement.module)
        rows = draw_orthonormal(self.in_features, config.r, derive_seed(config.basis_seed, *where, "A"))
        self.colora_A[adapter_name] = rows.T.contiguous()
        self.colora_B[adapter_name] = draw_orthonormal(
            self.out_features, config.r, derive_seed(config.basis_seed, *where, "B")
        )
        for branch in self.settings[adapter_name].branches:
            core = nn.Linear(config.r, config.r, bias=True)
            nn.init.zeros_(core.weight)
            nn.init.zeros_(core.bias)
            getattr(self, f"colora_core_{branch}")[adapter_name] = core

    def core(self, adapter_name: str, branch: str) -> nn.Linear:
        """Return a branch's core: weight P (r, r), bias Q (r,)."""
        core: nn.Linear = getattr(self, f"colora_core_{branch}")[adapter_name]
        return core

    def branch_tensors(self, adapter_name: str, branch: str) -> tuple[torch.Tensor, ...]:
        """P (r, r) and Q (r,)."""
        core = self.core(adapter_name, branch)
        return core.weight, core.bias

    def _delta(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor | None:
        settings = self.settings[adapter_name]
        if not settings.active:
            return None
        basis_in, basis_out = self.colora_A[adapter_name], self.colora_B[adapter_name]
        reduced = functional.linear(x.to(basis_in.dtype), basis_in)
        cores = {branch: self.core(adapter_name, branch) for branch in settings.in_order}
        if any(core._forward_hooks or core._forward_pre_hooks for core in cores.values()):
            # Whoever hooks a core, as Opacus does for gradients of single examples, is to see it called.
            mixed = self._mixed(adapter_name, {branch: core(reduced) for branch, core in cores.items()})
        else:
            mixed = functional.linear(reduced, *self._combined(adapter_name))
        return functional.linear(settings.scaling * mixed, basis_out)

    def _combined(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """P̄ (r, r) and Q̄ (r,) over active branches: as many products as entries of P, not as positions."""
        cores = {b: self.core(adapter_name, b) for b in self.settings[adapter_name].in_order}
        weight = self._mixed(adapter_name, {branch: core.weight for branch, core in cores.items()})
        return weight, self._mixed(adapter_name, {branch: core.bias for branch, core in cores.items()})

    def _mixed(self, adapter_name: str, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """Sum of the branches' tensors, local and global weighed by the gate."""
        if "local" in parts and "global" in parts:
            parts["local"] = torch.lerp(parts["local"], parts.pop("global"), self._gate(adapter_name))
        total, *others = parts.values()
        for other in others:
            total = total + other
        return total

    @torch.no_grad()
    def merge_delta(self, adapter_name: str) -> MergeDelta:
        """The factors s·B·P̄ and A, and s·B·Q̄."""
        basis_in, basis_out = self.colora_A[adapter_name].clone(), self.colora_B[adapter_name]
        settings = self.settings[adapter_name]
        if not settings.active:
            return MergeDelta(left=basis_out[:, :0], right=basis_in[:0], bias=None)
        core_weight, core_bias = self._combined(adapter_name)
        bias = basis_out @ (settings.scaling * core_bias) if core_bias.any() else None
        return MergeDelta(left=basis_out @ (settings.scaling * core_weight), right=basis_in, bias=bias)


class BranchedLoraLinear(CoLoraLayer):
    """A linear module of a family layer: one ordinary LoRA per branch."""

    group_containers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **{branch: (f"colora_lora_A_{branch}", f"colora_lora_B_{branch}") for branch in BRANCHES},
        GATE: ("colora_gate",),
    }
    adapter_layer_names = tuple(name for names in group_containers.values() for name in names)
    other_param_names = ("settings",)

    def _create_tensors(self, adapter_name: str, config: CoLoraConfig, placement: Placement) -> None:
        for branch in self.settings[adapter_name].branches:
            down = nn.Linear(self.in_features, config.r, bias=False)
            up = nn.Linear(config.r, self.out_features, bias=False)
            # Local and global start from the same A, as all clients of an architecture do: averages of A
            # and of B, taken apart, then stay close to the average of B·A.
            role = "personal" if branch == "personal" else "family"
            seed = derive_seed(config.basis_seed, placement.layer, placement.module, role)
            generator = torch.Generator().manual_seed(seed)
            bound = 1.0 / math.sqrt(self.in_features)
            start = torch.rand(config.r, self.in_features, generator=generator) * (2 * bound) - bound
            with torch.no_grad():
                down.weight.copy_(start)
                up.weight.zero_()
            getattr(self, f"colora_lora_A_{branch}")[adapter_name] = down
            getattr(self, f"colora_lora_B_{branch}")[adapter_name] = up

    def branch_tensors(self, adapter_name: str, branch: str) -> tuple[torch.Tensor, ...]:
        """A (r, d_in) and B (d_out, r)."""
        return tuple(getattr(self, f"colora_lora_{side}_{branch}")[adapter_name].weight for side in "AB")

    def _factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """s·[w_b B_b]_b (d_out, k) and [A_b]_b (k, d_in), over active branches b with weights w_b."""
        settings = self.settings[adapter_name]
        weights: dict[str, torch.Tensor | float] = dict.fromkeys(settings.in_order, settings.scaling)
        if "local" in weights and "global" in weights:
            gate = self._gate(adapter_name)
            weights["local"] = settings.scaling * (1.0 - gate)
            weights["global"] = settings.scaling * gate
        none = self.colora_gate[adapter_name]
        lefts, rights = [none.new_zeros(self.out_features, 0)], [none.new_zeros(0, self.in_features)]
        for branch, weight in weights.items():
            down, up = self.branch_tensors(adapter_name, branch)
            lefts.append(weight * up)
            rights.append(down)
        return torch.cat(lefts, dim=1), torch.cat(rights)

    def _delta(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor | None:
        if not self.settings[adapter_name].active:
            return None
        # All branches in one product: wide sums over one product each would take as long as these.
        left, right = self._factors(adapter_name)
        return functional.linear(functional.linear(x.to(right.dtype), right), left)

    @torch.no_grad()
    def merge_delta(self, adapter_name: str) -> MergeDelta:
        """The factors of s·Σ w_b B_b A_b, stacked along the rank."""
        return MergeDelta(*self._factors(adapter_name), bias=None)
