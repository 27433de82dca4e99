"""Adapters as flat vectors: what is uploaded, received and copied between branches, at any rank.

Shared vector: blocks in order, within a block modules sorted by name, for each module P (r × r, row-major)
and then Q (r). Its length blocks · modules · (r² + r) does not depend on the model's width or depth, so
clients of any architecture can be averaged.

Family vector: the other layers in order, within a layer modules sorted by name, for each module A (r × d_in,
row-major) and then B (d_out × r, row-major); empty where these have no LoRA. It fits clients of one
architecture only.

An aligned basis has its best shared dimensions first. A client of rank r' < r takes the leading r' rows of A
and columns of B, shares its P in the leading block of the federation's vector with zeros around it, the very
same map B P A, and keeps the leading block of what it receives: averages of clients of any ranks are averages
of maps, and the layout's hash, the wire and the server know nothing of ranks.

A branch is `local`, `global` or `personal` of the one active adapter.
"""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fedmosaic.client.colora.config import CoLoraConfig
from fedmosaic.client.colora.state import (
    adapted_layers,
    check_not_merged,
    find_adapter,
    get_basis,
    set_basis,
    shared_modules,
)
from fedmosaic.protos.errors import ConfigurationError, ModelError

Vector = np.ndarray[tuple[int], np.dtype[np.float32]]


@dataclass(frozen=True)
class SharedLayout:
    """What the numbers of a shared vector mean; those of equal layouts may be averaged."""

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
        about: dict[str, object]
        about = {"format": "fedmosaic/shared-adapter/1", "rank": self.rank, "alpha": self.alpha}
        about |= {"blocks": self.blocks, "modules": list(self.modules), "basis": self.basis_label}
        canonical = json.dumps(about, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
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
    """Write a branch from (d,) finite floats; ModelError, nothing changed, if they do not fit it."""
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


_CONFIG: Final = "adapter_config.json"
_TENSORS: Final = "adapter_model.safetensors"
_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")


def basis_name(folder: str | Path) -> str:
    """Name of the basis that an aligned checkpoint carries, as it goes into the layout's hash."""
    return str(_checkpoint(folder)[1].basis_label)


def aligned_config(folder: str | Path, *, rank: int | None = None, **changes: Any) -> CoLoraConfig:
    """The configuration of an aligned checkpoint, to give to `get_peft_model`; then call `load_basis`.

    `folder` is what `fedmosaic align` wrote for this client's model, or the id of its copy on a hub; `rank`
    is at most the checkpoint's, the default, at the same scale α/r; `changes` are other fields to set.
    """
    _, config = _checkpoint(folder)
    chosen = config.r if rank is None else rank
    if not 1 <= chosen <= config.r:
        raise ModelError(f"The rank is {chosen}; {folder} has rank {config.r}, choose 1 to that")
    names = "blocks layer_rule shared_layers basis_seed target_modules model_depth task_type".split()
    kept = {name: getattr(config, name) for name in names}
    return CoLoraConfig(r=chosen, **(kept | {"alpha": config.alpha * chosen / config.r} | changes))


def load_basis(model: nn.Module, folder: str | Path) -> None:
    """Set the frozen bases of a model made from `aligned_config`; ModelError if they do not fit it."""
    place, config = _checkpoint(folder)
    try:
        tensors = load_file(place / _TENSORS)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"The aligned checkpoint {folder} cannot be read ({type(error).__name__}); copy it there again"
        ) from None
    bases = {}
    for name, (a, _) in get_basis(model).items():
        rows, columns = (_tensor(tensors, f"{name}.colora_{side}", folder) for side in "AB")
        bases[name] = (rows[: a.shape[0]], columns[:, : a.shape[0]])
    set_basis(model, bases, label=config.basis_label or "aligned")


def embedded_layout(layout: SharedLayout, rank: int) -> SharedLayout:
    """The layout of a federation's rank that a client's vector is embedded in; ModelError if it is lower."""
    if rank < layout.rank:
        raise ModelError(f"The client's rank is {layout.rank}, the federation's {rank}; take at most that.")
    return replace(layout, rank=rank, alpha=layout.alpha * rank / layout.rank)


def read_embedded(model: nn.Module, rank: int, branch: str = "local") -> Vector:
    """A branch as a vector (d,) of the federation's rank, zero outside the client's leading block."""
    layout = shared_layout(model)
    embedded_layout(layout, rank)
    return _resized(read_shared(model, branch), layout, rank)


def write_embedded(model: nn.Module, vector: np.ndarray, rank: int, branch: str = "global") -> None:
    """Write the leading block of a vector (d,) of the federation's rank into a branch."""
    layout = shared_layout(model)
    wide = embedded_layout(layout, rank)
    vector = np.asarray(vector)
    if vector.shape != (wide.size,):
        raise ModelError(f"The shared vector has shape {vector.shape}; rank {rank} needs ({wide.size},).")
    write_shared(model, _resized(vector, wide, layout.rank), branch)


def _resized(vector: np.ndarray, layout: SharedLayout, rank: int) -> Vector:
    """A layout's vector at another rank: of every P (r, r) and Q (r,) the leading block, or zeros around."""
    count, size, kept = layout.blocks * len(layout.modules), layout.rank, min(layout.rank, rank)
    rows = vector.reshape(count, size**2 + size)
    cores = np.zeros((count, rank, rank), vector.dtype)
    biases = np.zeros((count, rank), vector.dtype)
    cores[:, :kept, :kept] = rows[:, : size**2].reshape(count, size, size)[:, :kept, :kept]
    biases[:, :kept] = rows[:, size**2 :][:, :kept]
    resized: Vector = np.concatenate([cores.reshape(count, -1), biases], axis=1).reshape(-1)
    return resized


def _checkpoint(source: str | Path) -> tuple[Path, CoLoraConfig]:
    folder = _local(source)
    if not (folder / _CONFIG).is_file():
        raise ModelError(f"{folder} holds no aligned checkpoint; give a folder that `fedmosaic align` wrote.")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError, RecursionError, ConfigurationError) as error:
        raise ModelError(f"{folder}: the checkpoint's configuration cannot be read ({error}).") from None
    if not isinstance(config, CoLoraConfig) or not (config.basis_label or "").startswith("aligned:"):
        raise ModelError(f"The checkpoint in {folder} was not aligned; run `fedmosaic align` on its model.")
    return folder, config


def _local(source: str | Path) -> Path:
    """The folder itself, or that of a hub's copy."""
    if Path(source).exists() or not _HUB_ID.fullmatch(str(source)):
        return Path(source)
    try:
        return Path(snapshot_download(str(source), allow_patterns=[_CONFIG, _TENSORS]))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{source} is neither a folder that `fedmosaic align` wrote nor a checkpoint on a hub that can "
            f"be reached from here ({type(error).__name__})."
        ) from None


def _tensor(tensors: dict[str, torch.Tensor], suffix: str, folder: str | Path) -> torch.Tensor:
    found = [tensor for name, tensor in tensors.items() if f".{name}".endswith(f".{suffix}")]
    if len(found) != 1:
        raise ModelError(f"{folder} has {len(found)} tensors {suffix}; it is of another model")
    return found[0]
