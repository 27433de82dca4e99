"""Images through a vision-language model's own tower and projector, both frozen.

A frozen tower gives an image the same vectors in every step, so they are computed when an image is first met
and kept while there is room. What the language part then reads is what the model's own forward would put in
the places of its image tokens.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import AutoImageProcessor

from fedmosaic.client.vision.features import open_image
from fedmosaic.protos.errors import ModelError

_TYPES: Final = ("llava",)
"""Types whose images are as many tokens each, at positions like any words', under causal attention."""
_KEPT: Final = 64


def has_tower(model: nn.Module) -> bool:
    """Whether a model has a vision tower of its own."""
    return callable(getattr(model, "get_image_features", None))


class TowerImages:
    """Vectors of images from a model's own tower, `each` tokens of an image."""

    def __init__(self, model: nn.Module, source: str, paths: Sequence[Path]) -> None:
        """Find out how many tokens an image has.

        The model is of transformers, without PEFT's wrapper, its tower not adapted; its image processor is
        loaded from `source`. Images are known by their place in `paths`.

        Raises:
            ModelError: the model's type is not known here, or its image processor cannot be loaded.
            ConfigurationError: an image cannot be read.
        """
        kind = getattr(getattr(model, "config", None), "model_type", "")
        if kind not in _TYPES:
            raise ModelError(f"{source} is of type {kind!r}, whose images are not handled; use {_TYPES[0]}")
        try:
            load: Any = AutoImageProcessor.from_pretrained
            self._processor: Any = load(
                source, local_files_only=Path(source).is_dir(), trust_remote_code=False
            )
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
        """See `fedmosaic.client.vision.words.ImageSource`."""
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
