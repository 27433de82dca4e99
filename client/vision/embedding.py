"""The input embedding of a model that reads images: words from the vocabulary, images from a source."""

from typing import Protocol, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from fedmosaic.client.vision.projector import Projector
from fedmosaic.protos.errors import ModelError


class ImageSource(Protocol):
    """Gives the vectors of images; a module, so that it moves with the model."""

    def __call__(self, numbers: torch.Tensor) -> torch.Tensor:
        """(M,) int64 numbers of images, all different, to (M, K, D) vectors in the width of the embedding."""
        ...


class ProjectedFeatures(nn.Module):
    """Images whose features are in memory, projected when they are asked for."""

    def __init__(self, features: torch.Tensor, projector: Projector) -> None:
        """Hold features (n, K, C), float16 or float32, and their projector from C to the model's width."""
        super().__init__()
        self.features: torch.Tensor
        self.register_buffer("features", features, persistent=False)
        self.projector = projector

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """See `ImageSource`."""
        projected: torch.Tensor = self.projector(self.features[numbers].float())
        return projected


class ImageEmbedding(nn.Module):
    """Looks up ids of the vocabulary in the model's own table and all higher ones in an image source.

    Attributes:
        images_above_rows: says that ids above the rows are right; `acceptance.check_ids` asks for it.
    """

    images_above_rows = True

    def __init__(self, words: nn.Embedding, source: ImageSource, each: int) -> None:
        super().__init__()
        self.words, self.source, self._each = words, source, each

    @property
    def weight(self) -> torch.Tensor:
        """The words' table (V, D), which an output head may share."""
        return self.words.weight

    @property
    def num_embeddings(self) -> int:
        """Rows of the words' table."""
        return self.words.num_embeddings

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(…,) int64 ids to (…, D) vectors."""
        is_image = ids >= self.num_embeddings
        embedded: torch.Tensor = self.words(ids.masked_fill(is_image, 0))
        if not bool(is_image.any()):
            return embedded
        places = ids[is_image] - self.num_embeddings
        numbers, inverse = torch.unique(places // self._each, return_inverse=True)
        vectors = self.source(numbers)[inverse, places % self._each]
        return embedded.masked_scatter(is_image.unsqueeze(-1), vectors.to(embedded.dtype))


def put_images(model: nn.Module, source: ImageSource, each: int) -> None:
    """Let a model read images; changes its input embedding in place.

    Args:
        model: of transformers, bare or wrapped by PEFT.
        source: of the images.
        each: ids per image; see `fedmosaic.client.vision.words.ImageIds`.

    Raises:
        ModelError: the model has no table of words to extend.
    """
    wrapped = getattr(model, "get_base_model", None)
    base = cast(PreTrainedModel, wrapped() if callable(wrapped) else model)
    words = base.get_input_embeddings()
    if isinstance(words, ImageEmbedding):
        words = words.words
    if type(words) is not nn.Embedding:
        raise ModelError(f"{type(base).__name__} embeds words with {type(words).__name__}; a table is needed")
    base.set_input_embeddings(ImageEmbedding(words, source, each).to(words.weight.device))
