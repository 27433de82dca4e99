"""The input embedding of a model that reads pictures: words from the vocabulary, pictures from a source."""

from typing import Protocol, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from fedmosaic.client.vision.projector import Projector
from fedmosaic.protos.errors import ModelError


class PictureSource(Protocol):
    """Gives the vectors of pictures; a module, so that it moves with the model."""

    def __call__(self, numbers: torch.Tensor) -> torch.Tensor:
        """Vectors of pictures.

        Args:
            numbers: (M,) int64, all different.

        Returns:
            (M, K, D) vectors in the width of the model's embedding.
        """
        ...


class ProjectedFeatures(nn.Module):
    """Pictures whose features are in memory, projected when they are asked for."""

    def __init__(self, features: torch.Tensor, projector: Projector) -> None:
        """Hold features.

        Args:
            features: (n, K, C), float16 or float32.
            projector: from C to the width of the model.
        """
        super().__init__()
        self.features: torch.Tensor
        self.register_buffer("features", features, persistent=False)
        self.projector = projector

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """See `PictureSource`."""
        projected: torch.Tensor = self.projector(self.features[numbers].float())
        return projected


class PictureEmbedding(nn.Module):
    """Looks up ids of the vocabulary in the model's own table and all higher ones in a picture source.

    Attributes:
        pictures_above_rows: says that ids above the rows are right; `acceptance.check_ids` asks for it.
    """

    pictures_above_rows = True

    def __init__(self, words: nn.Embedding, source: PictureSource, each: int) -> None:
        """Wrap an embedding.

        Args:
            words: of the vocabulary, V rows.
            source: of the pictures.
            each: ids per picture; see `fedmosaic.client.vision.words.PictureIds`.
        """
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
        """Embed.

        Args:
            ids: (…,) int64.

        Returns:
            (…, D) vectors.
        """
        pictured = ids >= self.num_embeddings
        embedded: torch.Tensor = self.words(ids.masked_fill(pictured, 0))
        if not bool(pictured.any()):
            return embedded
        places = ids[pictured] - self.num_embeddings
        numbers, inverse = torch.unique(places // self._each, return_inverse=True)
        vectors = self.source(numbers)[inverse, places % self._each]
        return embedded.masked_scatter(pictured.unsqueeze(-1), vectors.to(embedded.dtype))


def put_pictures(model: nn.Module, source: PictureSource, each: int) -> None:
    """Let a model read pictures; changes its input embedding in place.

    Args:
        model: of transformers, bare or wrapped by PEFT.
        source: of the pictures.
        each: ids per picture.

    Raises:
        ModelError: the model has no table of words to extend.
    """
    wrapped = getattr(model, "get_base_model", None)
    base = cast(PreTrainedModel, wrapped() if callable(wrapped) else model)
    words = base.get_input_embeddings()
    if isinstance(words, PictureEmbedding):
        words = words.words
    if type(words) is not nn.Embedding:
        raise ModelError(f"{type(base).__name__} embeds words with {type(words).__name__}; a table is needed")
    base.set_input_embeddings(PictureEmbedding(words, source, each).to(words.weight.device))
