"""Adapters as flat vectors: what is uploaded, received and copied between branches.

Shared vector: blocks in order, within a block modules sorted by name, for each module P (r × r,
row-major) and then Q (r). Its length blocks · modules · (r² + r) does not depend on the model's width
or depth, so clients of any architecture can be averaged.

Family vector: the other layers in order, within a layer modules sorted by name, for each module A
(r × d_in, row-major) and then B (d_out × r, row-major). It fits clients of one architecture only.

A branch is `local`, `global` or `personal`; without `adapter_name` the only active adapter is meant.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedmosaic.client.colora.layer import CoLoraLayer
from fedmosaic.client.colora.linear import BranchedLoraLinear, CoLoraLinear
from fedmosaic.client.colora.state import (
    adapted_layers,
    check_not_merged,
    family_modules,
    find_adapter,
    shared_modules,
)
from fedmosaic.protos.errors import ModelError

Vector = np.ndarray[tuple[int], np.dtype[np.float32]]


@dataclass(frozen=True)
class SharedLayout:
    """What the numbers of a shared vector mean; equal layouts may be averaged.

    Attributes:
        rank: Rank r.
        alpha: α of the scale s = α/r.
        blocks: Number of relative-depth blocks.
        modules: Module names within a layer, sorted.
        basis_label: Name of the frozen basis.
    """

    rank: int
    alpha: float
    blocks: int
    modules: tuple[str, ...]
    basis_label: str

    @property
    def size(self) -> int:
        """Length of the vector."""
        return self.blocks * len(self.modules) * (self.rank**2 + self.rank)

    @property
    def spec_hash(self) -> str:
        """SHA-256 (64 hexadecimal digits) of the layout; differs wherever averaging would be meaningless."""
        return _digest(
            {
                "format": "fedmosaic/shared-adapter/1",
                "rank": self.rank,
                "alpha": self.alpha,
                "blocks": self.blocks,
                "modules": list(self.modules),
                "basis": self.basis_label,
            }
        )


@dataclass(frozen=True)
class FamilyLayout:
    """What the numbers of a family vector mean; equal only for clients of one architecture.

    The layout knows shapes, not pretrained weights: name the base model beside it where families are formed.

    Attributes:
        rank: Rank r.
        alpha: α of the scale s = α/r.
        entries: For each module in order its decoder layer, name within the layer, d_in and d_out.
    """

    rank: int
    alpha: float
    entries: tuple[tuple[int, str, int, int], ...]

    @property
    def size(self) -> int:
        """Length of the vector; 0 with `other_layers="none"`."""
        return sum(self.rank * (d_in + d_out) for _, _, d_in, d_out in self.entries)

    @property
    def spec_hash(self) -> str:
        """SHA-256 (64 hexadecimal digits) of the layout."""
        return _digest(
            {
                "format": "fedmosaic/family-adapter/1",
                "rank": self.rank,
                "alpha": self.alpha,
                "entries": [list(entry) for entry in self.entries],
            }
        )


def _digest(specification: dict[str, object]) -> str:
    canonical = json.dumps(specification, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def shared_layout(model: nn.Module, adapter_name: str | None = None) -> SharedLayout:
    """Describe the shared vector of a model."""
    name = find_adapter(model, adapter_name)
    settings = [layer.settings[name] for layer in shared_modules(model, name)]
    return SharedLayout(
        rank=settings[0].rank,
        alpha=float(settings[0].alpha),
        blocks=len({setting.placement.block for setting in settings}),
        modules=tuple(sorted({setting.placement.module for setting in settings})),
        basis_label=settings[0].basis_label,
    )


def family_layout(model: nn.Module, adapter_name: str | None = None) -> FamilyLayout:
    """Describe the family vector of a model; without entries where the other layers have no LoRA."""
    name = find_adapter(model, adapter_name)
    settings = adapted_layers(model, "all", name)[0].settings[name]
    placed = [(layer.settings[name].placement, layer) for layer in family_modules(model, name)]
    entries = tuple((at.layer, at.module, each.in_features, each.out_features) for at, each in placed)
    return FamilyLayout(settings.rank, float(settings.alpha), entries)


def branch_tensors(
    model: nn.Module, branch: str, layers: str, adapter_name: str | None = None
) -> list[torch.Tensor]:
    """The parameters of a branch themselves, not copies, in the order of the vector.

    Raises:
        ModelError: The branch does not exist in this adapter.
    """
    name = find_adapter(model, adapter_name)
    return [
        tensor for layer in adapted_layers(model, layers, name) for tensor in _tensors_of(layer, branch, name)
    ]


def _tensors_of(layer: CoLoraLayer, branch: str, name: str) -> Iterable[torch.Tensor]:
    if branch not in layer.settings[name].branches:
        existing = ", ".join(layer.settings[name].branches)
        raise ModelError(f"There is no branch {branch!r} in this adapter; it has {existing}.")
    if isinstance(layer, CoLoraLinear):
        core = layer.core(name, branch)
        return core.weight, core.bias
    if isinstance(layer, BranchedLoraLinear):
        return tuple(part.weight for part in layer.pair(name, branch))
    raise ModelError(f"A {type(layer).__name__} has no branches.")


def read_shared(model: nn.Module, branch: str = "local", *, adapter_name: str | None = None) -> Vector:
    """A copy (d,) of a branch of the Co-LoRA layers; see `branch_tensors` for the errors."""
    return _read(branch_tensors(model, branch, "shared", adapter_name))


def write_shared(
    model: nn.Module, vector: np.ndarray, branch: str = "global", *, adapter_name: str | None = None
) -> None:
    """Write a branch of the Co-LoRA layers.

    `vector`: Array (d,), floating point, finite in float32.

    Raises:
        ModelError: Wrong shape or type, values that are not finite, a missing branch, or a merged adapter.
            Nothing was changed then.
    """
    _write(model, vector, branch, "shared", adapter_name)


def read_family(model: nn.Module, branch: str = "local", *, adapter_name: str | None = None) -> Vector:
    """Read a branch of the family layers; arguments as in `read_shared`, empty where there are none."""
    return _read(branch_tensors(model, branch, "family", adapter_name))


def write_family(
    model: nn.Module, vector: np.ndarray, branch: str = "global", *, adapter_name: str | None = None
) -> None:
    """Write a branch of the family layers; arguments and errors as in `write_shared`."""
    _write(model, vector, branch, "family", adapter_name)


def _read(tensors: list[torch.Tensor]) -> Vector:
    if not tensors:
        return np.zeros(0, dtype=np.float32)
    flat = torch.cat([tensor.detach().to("cpu", torch.float32).reshape(-1) for tensor in tensors])
    return flat.numpy()


@torch.no_grad()
def _write(model: nn.Module, vector: np.ndarray, branch: str, layers: str, adapter_name: str | None) -> None:
    tensors = branch_tensors(model, branch, layers, adapter_name)
    check_not_merged(adapted_layers(model, "all", adapter_name))
    size = sum(tensor.numel() for tensor in tensors)
    vector = np.asarray(vector)
    if vector.shape != (size,) or not np.issubdtype(vector.dtype, np.floating):
        raise ModelError(
            f"The {layers} vector has shape {vector.shape} and type {vector.dtype}; this model needs "
            f"({size},) floating point. Compare the layout's spec_hash on both sides."
        )
    with np.errstate(over="ignore"):
        single = vector.astype(np.float32)
    if not np.isfinite(single).all():
        bad = int((~np.isfinite(single)).sum())
        raise ModelError(f"The {layers} vector has {bad} of {size} values that are not finite in float32.")
    start = 0
    for tensor in tensors:
        part = single[start : start + tensor.numel()]
        tensor.copy_(torch.from_numpy(part).view_as(tensor))
        start += tensor.numel()


@torch.no_grad()
def copy_branch(
    model: nn.Module,
    source: str,
    target: str,
    *,
    share: float = 1.0,
    layers: str = "all",
    adapter_name: str | None = None,
) -> None:
    """Copy one branch over another on the spot, or move the other towards it.

    `source`: Branch to read.
    `target`: Branch to overwrite.
    `share`: Of the source in the result, in [0, 1]; the rest is what the target held.
    `layers`: `shared`, `family` or `all`.

    Raises:
        ModelError: A branch does not exist in this adapter, or the adapter is merged.
    """
    read = branch_tensors(model, source, layers, adapter_name)
    written = branch_tensors(model, target, layers, adapter_name)
    check_not_merged(adapted_layers(model, "all", adapter_name))
    for tensor, value in zip(written, read, strict=True):
        tensor.lerp_(value, share)
