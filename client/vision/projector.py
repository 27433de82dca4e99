"""The projector between image features and a language model: LLaVA's, two layers."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fedmosaic.privacy.configuration import parse_json
from fedmosaic.privacy.files import write_atomically
from fedmosaic.protos.errors import ConfigurationError, ModelError

_WEIGHTS: Final = "projector.safetensors"
_RECORD: Final = "projector.json"


class Projector(nn.Module):
    """Features of a place in an image to a vector beside the words'.

    Reference: Liu et al. (2024), "Improved Baselines with Visual Instruction Tuning", arXiv 2310.03744.
    """

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
        """See `fedmosaic.client.vision.words.ImageSource`."""
        projected: torch.Tensor = self.projector(self.features[numbers].float())
        return projected


@dataclass(frozen=True)
class ProjectorRecord:
    """What a projector was trained for and how.

    The fingerprint and width of the language model; channels of the features, places of a side that they are
    averaged to and pixels of a side of images; its data, optimizer steps, seconds without the encoder, and
    mean loss of the first and last steps in nats per token.
    """

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
    """Read what `save_projector` wrote; frozen.

    Raises:
        ConfigurationError: there is no projector, or its files are damaged.
        ModelError: its weights are of another shape than its record says, or not finite.
    """
    try:
        record = ProjectorRecord(**parse_json((folder / _RECORD).read_bytes()))
        tensors = load_file(folder / _WEIGHTS)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ConfigurationError(
            f"{folder} holds no projector that can be read ({error}); `fedmosaic tasks projector` trains one"
        ) from None
    projector = Projector(record.channels, record.width)
    try:
        projector.load_state_dict(tensors)
    except RuntimeError as error:
        raise ModelError(
            f"the projector in {folder} is of another shape than its record says: {error}"
        ) from None
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise ModelError(f"the projector in {folder} has values that are not finite; train it again")
    return projector.eval().requires_grad_(False), record
