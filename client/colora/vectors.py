"""Adapters as flat vectors: what is uploaded, received and copied between branches.

Shared vector: blocks in order, within a block modules sorted by name, for each module P (r × r, row-major)
and then Q (r). Its length blocks · modules · (r² + r) does not depend on the model's width or depth, so
clients of any architecture can be averaged.

Family vector: the other layers in order, within a layer modules sorted by name, for each module A (r × d_in,
row-major) and then B (d_out × r, row-major); empty where these have no LoRA. It fits clients of one
architecture only.

A branch is `local`, `global` or `personal` of the one active adapter.
"""

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedmosaic.client.colora.state import (
    adapted_layers,
    check_not_merged,
    find_adapter,
    shared_modules,
)
from fedmosaic.protos.errors import ModelError

Vector = np.ndarray[tuple[int], np.dtype[np.float32]]


@dataclass(frozen=True)
class SharedLayout:
    """What the numbers of a shared vector mean; equal layouts may be averaged.

    Rank r, α of the scale α/r, number of relative-depth blocks, module names within a layer, sorted, and the
    name of the frozen basis.
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
        specification = {
            "format": "fedmosaic/shared-adapter/1",
            "rank": self.rank,
            "alpha": self.alpha,
            "blocks": self.blocks,
            "modules": list(self.modules),
            "basis": self.basis_label,
        }
        canonical = json.dumps(specification, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


def shared_layout(model: nn.Module) -> SharedLayout:
    """Describe the shared vector of a model."""
    name = find_adapter(model)
    settings = [layer.settings[name] for layer in shared_modules(model)]
    return SharedLayout(
        rank=settings[0].rank,
        alpha=float(settings[0].alpha),
        blocks=len({setting.placement.block for setting in settings}),
        modules=tuple(sorted({setting.placement.module for setting in settings})),
        basis_label=settings[0].basis_label,
    )


def branch_tensors(model: nn.Module, branch: str, layers: str) -> list[torch.Tensor]:
    """The parameters of a branch themselves, in the order of the vector; ModelError if there is no such."""
    name = find_adapter(model)
    tensors: list[torch.Tensor] = []
    for layer in adapted_layers(model, layers):
        if branch not in layer.settings[name].branches:
            existing = ", ".join(layer.settings[name].branches)
            raise ModelError(f"There is no branch {branch!r} in this adapter; it has {existing}.")
        tensors += layer.branch_tensors(name, branch)
    return tensors


def read_shared(model: nn.Module, branch: str = "local") -> Vector:
    """A copy (d,) of a branch of the Co-LoRA layers; see `branch_tensors` for the errors."""
    return _read(branch_tensors(model, branch, "shared"))


def write_shared(model: nn.Module, vector: np.ndarray, branch: str = "global") -> None:
    """Write a branch of the Co-LoRA layers from (d,) floating point numbers, finite in float32.

    Raises:
        ModelError: Wrong shape or type, values that are not finite, a missing branch, or a merged adapter.
            Nothing was changed then.
    """
    _write(model, vector, branch, "shared")


def read_family(model: nn.Module, branch: str = "local") -> Vector:
    """A copy (d,) of a branch of the family layers."""
    return _read(branch_tensors(model, branch, "family"))


def write_family(model: nn.Module, vector: np.ndarray, branch: str = "global") -> None:
    """Write a branch of the family layers; errors as in `write_shared`."""
    _write(model, vector, branch, "family")


def _read(tensors: list[torch.Tensor]) -> Vector:
    if not tensors:
        return np.zeros(0, dtype=np.float32)
    flat = torch.cat([tensor.detach().to("cpu", torch.float32).reshape(-1) for tensor in tensors])
    return flat.numpy()


@torch.no_grad()
def _write(model: nn.Module, vector: np.ndarray, branch: str, layers: str) -> None:
    tensors = branch_tensors(model, branch, layers)
    check_not_merged(adapted_layers(model))
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
    parts = torch.split(torch.from_numpy(single), [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def copy_branch(
    model: nn.Module, source: str, target: str, *, share: float = 1.0, layers: str = "all"
) -> None:
    """Copy one branch over another on the spot, or move the other towards it by `share` in [0, 1]."""
    read, written = (branch_tensors(model, branch, layers) for branch in (source, target))
    check_not_merged(adapted_layers(model))
    for tensor, value in zip(written, read, strict=True):
        tensor.lerp_(value, share)
