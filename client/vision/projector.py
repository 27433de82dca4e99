"""Vectors of images: through LLaVA's projector, two layers, or a vision-language model's own tower.

Both are frozen. A tower gives an image the same vectors in every step, so they are computed when an image is
first met and kept while there is room: what the model's own forward would put in the places of its tokens.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoImageProcessor

from fedmosaic.client.vision.features import open_image
from fedmosaic.privacy.configuration import parse_json
from fedmosaic.privacy.files import write_atomically
from fedmosaic.protos.errors import ConfigurationError, ModelError

_WEIGHTS: Final = "projector.safetensors"
_RECORD: Final = "projector.json"


class Projector(nn.Module):
    """Features of a place in an image to a vector beside the words' (Liu et al. 2024, arXiv 2310.03744)."""

    def __init__(self, channels: int, width: int, scale: float = 1.0) -> None:
        """Start at random, with vectors of a root mean square of `scale`, that of the words' vectors."""
        super().__init__()
        self.norm = nn.LayerNorm(channels, elementwise_affine=False)
        self.wide = nn.Linear(channels, width)
        self.narrow = nn.Linear(width, width)
        with torch.no_grad():
            # GELU of a unit normal has a mean square of about 0.43.
            for layer, square in ((self.wide, 1.0), (self.narrow, 0.43)):
                gain = scale if layer is self.narrow else 1.0
                layer.weight.normal_(0.0, gain / math.sqrt(square * layer.in_features))
                layer.bias.zero_()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(…, C) features to (…, D) vectors."""
        projected: torch.Tensor = self.narrow(nn.functional.gelu(self.wide(self.norm(features))))
        return projected


class ProjectedFeatures(nn.Module):
    """Images whose features are in memory, projected when they are asked for."""

    def __init__(self, features: torch.Tensor, projector: Projector) -> None:
        """Hold features (n, K, C), float16 or float32, and their projector from C to the model's width."""
        super().__init__()
        self.features: torch.Tensor
        self.register_buffer("features", features, persistent=False)
        self.projector = projector

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """See `fedmosaic.client.vision.inputs.ImageSource`."""
        projected: torch.Tensor = self.projector(self.features[numbers].float())
        return projected


@dataclass(frozen=True)
class ProjectorRecord:
    """What a projector was trained for: model, channels, width, pixels, places, data, steps and losses."""

    model_sha256: str
    channels: int
    width: int
    size: int
    grid: int
    data: str
    steps: int
    seconds: float
    first_loss: float
    last_loss: float


def save_projector(projector: Projector, record: ProjectorRecord, folder: Path) -> None:
    """Write a projector and its record into a folder, made if absent."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in projector.state_dict().items()}
    save_file(tensors, folder / _WEIGHTS)
    write_atomically(folder / _RECORD, json.dumps(asdict(record), indent=2).encode())


def load_projector(folder: Path) -> tuple[Projector, ProjectorRecord]:
    """Read a projector, frozen; ConfigurationError if missing or damaged, ModelError if it misfits."""
    try:
        record = ProjectorRecord(**parse_json((folder / _RECORD).read_bytes()))
        tensors = load_file(folder / _WEIGHTS)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        words = f"{folder} holds no projector that can be read ({error})"
        raise ConfigurationError(f"{words}; `fedmosaic tasks projector` trains one") from None
    projector = Projector(record.channels, record.width)
    try:
        projector.load_state_dict(tensors)
    except RuntimeError as error:
        words = f"the projector in {folder} is of another shape than its record says: {error}"
        raise ModelError(words) from None
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise ModelError(f"the projector in {folder} has values that are not finite; train it again")
    return projector.eval().requires_grad_(False), record


_TYPES: Final = ("llava",)
"""Types whose images are as many tokens each, at positions like any words', under causal attention."""
_KEPT: Final = 64


def has_tower(model: nn.Module) -> bool:
    """Whether a model has a vision tower of its own."""
    return callable(getattr(model, "get_image_features", None))


class TowerImages:
    """Vectors of images from a model's own tower, `each` tokens of an image."""

    def __init__(self, model: nn.Module, source: str, paths: Sequence[Path]) -> None:
        """Find out how many tokens an image has; images are known by their place in `paths`.

        The model is of transformers, without PEFT's wrapper, its tower not adapted; its image processor is
        loaded from `source`. ModelError if the model's type is not known here, or there is no processor;
        ConfigurationError if an image cannot be read.
        """
        kind = getattr(getattr(model, "config", None), "model_type", "")
        if kind not in _TYPES:
            raise ModelError(f"{source} is of type {kind!r}, whose images are not handled; use {_TYPES[0]}")
        try:
            load: Any = AutoImageProcessor.from_pretrained
            here = Path(source).is_dir()
            self._processor: Any = load(source, local_files_only=here, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(f"the image processor of {source} cannot be loaded: {error}") from error
        # An image that cannot be read has to be found before privacy is spent on a step that would read it.
        for path in paths:
            open_image(path)
        self._model: Any = model
        self._paths = tuple(paths)
        self._vectors = lru_cache(_KEPT)(self._compute)
        self.each = len(self._vectors(0))

    def __call__(self, numbers: torch.Tensor) -> torch.Tensor:
        """See `fedmosaic.client.vision.inputs.ImageSource`."""
        return torch.stack([self._vectors(int(number)) for number in numbers]).to(numbers.device)

    def _compute(self, number: int) -> torch.Tensor:
        """(K, D) vectors of one image."""
        pixels = self._processor(open_image(self._paths[number]), return_tensors="pt")["pixel_values"]
        table = self._model.get_input_embeddings().weight
        # Always in the model's own precision: what an image becomes must not depend on whether it was met in
        # training or before, and so on which other images were drawn.
        with torch.no_grad(), torch.autocast(table.device.type, enabled=False):
            output = self._model.get_image_features(
                pixel_values=pixels.to(table.device, table.dtype), return_dict=True
            )
        vectors: torch.Tensor = output.pooler_output[0].detach()
        return vectors
