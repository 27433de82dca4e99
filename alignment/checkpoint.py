"""Aligned bases on disk: PEFT checkpoints that clients load, and a manifest of what is finished."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from fedmosaic.alignment.activations import ModuleKey, Side
from fedmosaic.alignment.anchor import BasisPair
from fedmosaic.client.colora import CoLoraConfig, set_basis
from fedmosaic.client.model.load import adapt, save_adapter
from fedmosaic.privacy.configuration import Frozen
from fedmosaic.protos.errors import ConfigurationError, StateError

MANIFEST: Final = "manifest.json"
_CHECKPOINT_FILES: Final = frozenset({"adapter_config.json", "adapter_model.safetensors", "README.md"})

Bases = Mapping[ModuleKey, BasisPair]


class Finished(Frozen):
    """One finished checkpoint.

    Attributes:
        model: Path or hub id as given, with its cut.
        folder: Folder below the manifest's.
        digest: SHA-256 of everything the checkpoint depends on.
        layers: Shared layers, one per block.
        report: Figures of this model's alignment; empty for the anchor.
    """

    model: str
    folder: str
    digest: str
    layers: tuple[int, ...]
    report: dict[str, Any] = Field(default_factory=dict)


class Manifest(Frozen):
    """What an output directory holds.

    Attributes:
        version: Of this format.
        settings: Settings of the run.
        label: Name of the basis, hashed into the layout of every client that uses it.
        anchor: The anchor's checkpoint.
        models: The other checkpoints.
    """

    version: int = 1
    settings: dict[str, Any]
    label: str
    anchor: Finished
    models: tuple[Finished, ...] = ()

    def of(self, name: str) -> Finished:
        """The checkpoint of a model by the name of its folder; `ConfigurationError` if there is none."""
        known = {entry.folder: entry for entry in (self.anchor, *self.models)}
        if name not in known:
            raise ConfigurationError(f"There is no aligned model {name!r}; there are {', '.join(known)}.")
        return known[name]


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of an output directory, None where there is none; `StateError` if it is damaged."""
    path = directory / MANIFEST
    if not path.exists():
        return None
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StateError(
            f"{path} is not a manifest of this version ({type(error).__name__}); choose another --out, or "
            "remove the directory to start again."
        ) from None


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Replace the manifest in one step."""
    fresh = directory / f"{MANIFEST}.new"
    fresh.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    fresh.replace(directory / MANIFEST)


def model_digest(model: PreTrainedModel) -> str:
    """SHA-256 over all weights of a model, so that a changed model is never taken for a finished one."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of(*parts: object) -> str:
    """SHA-256 over the JSON of some values, in hexadecimal."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def basis_label(bases: Bases) -> str:
    """Name of a basis: equal for all clients aligned to the same anchor tensors."""
    digest = hashlib.sha256()
    for key, pair in sorted(bases.items()):
        digest.update(repr(key).encode())
        for tensor in pair:
            digest.update(tensor.float().contiguous().numpy().tobytes())
    return f"aligned:{digest.hexdigest()[:32]}"


def check_replaceable(folder: Path) -> None:
    """`StateError` where anything but an earlier checkpoint of this command lies, such as a base model."""
    if not folder.exists():
        return
    foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in _CHECKPOINT_FILES)
    if foreign:
        raise StateError(
            f"{folder} should become a checkpoint but holds {foreign[0]}; choose another --out, or write "
            "NAME=MODEL to give the checkpoint another name."
        )


def write_checkpoint(folder: Path, side: Side, bases: Bases, config: CoLoraConfig, label: str) -> None:
    """Write a PEFT checkpoint with aligned bases and P = Q = 0, so that it changes nothing yet.

    It replaces one that is there; the model is left without adapter.
    """
    adapted = adapt(side.model, config)
    named = {side.names[key]: (a.float(), b.float()) for key, (a, b) in bases.items()}
    set_basis(adapted, named, label=label)
    check_replaceable(folder)
    shutil.rmtree(folder, ignore_errors=True)
    save_adapter(adapted, folder)
    adapted.unload()


def read_checkpoint(folder: Path, side: Side, config: CoLoraConfig) -> dict[ModuleKey, BasisPair]:
    """Bases that `write_checkpoint` wrote; `StateError` if files are missing, damaged or of another shape."""
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise StateError(
            f"{folder}: the checkpoint cannot be read ({type(error).__name__}); align again."
        ) from None
    bases: dict[ModuleKey, BasisPair] = {}
    for key, name in side.names.items():
        a, b = (_tensor(tensors, name, part, folder) for part in ("colora_A", "colora_B"))
        linear = side.linear(key)
        if (a.shape, b.shape) != ((config.r, linear.in_features), (linear.out_features, config.r)):
            raise StateError(f"{folder}: the bases of {name} have another shape; align again.")
        bases[key] = (a.double(), b.double())
    return bases


def _tensor(tensors: Mapping[str, torch.Tensor], module: str, part: str, folder: Path) -> torch.Tensor:
    found = [tensor for name, tensor in tensors.items() if f".{module}.{part}" in f".{name}"]
    if len(found) != 1:
        raise StateError(
            f"{folder}: the checkpoint has {len(found)} tensors {part} of {module}; align again."
        )
    return found[0]
