"""Aligned bases from a checkpoint, and clients of a lower rank than their federation's.

An alignment orders the basis so that leading dimensions are the best shared ones. A client of rank r' < r
takes the leading r' rows of A and columns of B. What it shares is the federation's vector with its P in the
leading block and zeros elsewhere, which is the very same map B P A; so averages of clients of any ranks are
averages of maps, and the layout's hash, the wire and the server know nothing of ranks. Of what it receives it
keeps the leading block.
"""

import re
from dataclasses import replace
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
from fedmosaic.client.colora.state import get_basis, set_basis
from fedmosaic.client.colora.vectors import SharedLayout, Vector, read_shared, shared_layout, write_shared
from fedmosaic.protos.errors import ConfigurationError, ModelError

_CONFIG: Final = "adapter_config.json"
_TENSORS: Final = "adapter_model.safetensors"
_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")


def basis_name(folder: str | Path) -> str:
    """Name of the basis that an aligned checkpoint carries, as it goes into the layout's hash."""
    return str(_checkpoint(folder)[1].basis_label)


def aligned_config(folder: str | Path, *, rank: int | None = None, **changes: Any) -> CoLoraConfig:
    """The configuration of an aligned checkpoint, to give to `get_peft_model`; then call `load_basis`.

    `folder` is what `fedmosaic align` wrote for this client's model, or the id of its copy on a hub; `rank`
    is at most the checkpoint's, which is the default, at the same scale α/r; `changes` are other fields to
    set.
    """
    _, config = _checkpoint(folder)
    chosen = config.r if rank is None else rank
    if not 1 <= chosen <= config.r:
        raise ModelError(
            f"The rank is {chosen}; the checkpoint {folder} has rank {config.r}, choose 1 to that."
        )
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
            f"The aligned checkpoint {folder} cannot be read ({type(error).__name__}); copy it again from "
            "where `fedmosaic align` wrote it."
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
        raise ModelError(
            f"The checkpoint in {folder} has {len(found)} tensors {suffix}; it is of another model."
        )
    return found[0]
