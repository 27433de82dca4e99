"""Images as words: a prompt names images in place, and each becomes a few token ids of its own.

A prompt holds markers `<image:PATH>`. With n images of K tokens each, image i has the ids
V + iK … V + iK + K - 1, above the V ids of the vocabulary, so that examples, batches, scoring and generation
handle images like any other words. The model's input embedding knows what stands behind these ids.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedmosaic.client.model.examples import Example
from fedmosaic.client.model.fingerprint import base_model
from fedmosaic.protos.errors import ConfigurationError, ModelError

_MARKER: Final = re.compile(r"<image:([^<>\n]+)>")


def marker(path: str) -> str:
    """The marker of an image; ConfigurationError if the path cannot stand in one."""
    text = f"<image:{path}>"
    if _MARKER.fullmatch(text) is None:
        raise ConfigurationError(f"{path!r} cannot be named in a prompt: it holds <, > or a line break")
    return text


def images_in(text: str) -> list[str]:
    """Paths of the images that a text names, in order."""
    return _MARKER.findall(text)


def without_images(example: Example) -> Example:
    """The question alone; an example that names no image is given back as it is."""
    if not images_in(example.prompt):
        return example
    prompt, *turns = (
        _MARKER.sub(" ", text).strip() or "?"
        for text in (example.prompt, *(turn.content for turn in example.turns))
    )
    told = (replace(turn, content=text) for turn, text in zip(example.turns, turns, strict=True))
    return replace(example, prompt=prompt, turns=tuple(told))


@dataclass(frozen=True)
class ImageIds:
    """Number of each image by path, 0 to n - 1, the first id of image 0, and how many ids each has."""

    numbers: Mapping[str, int]
    first: int
    each: int

    def of(self, path: str) -> list[int]:
        """The ids of an image; ConfigurationError if there is no such image."""
        number = self.numbers.get(path)
        if number is None:
            raise ConfigurationError(f"a prompt names the image {path!r}, which was not read")
        start = self.first + number * self.each
        return list(range(start, start + self.each))


def number_images(examples: Iterable[Example], first: int, each: int) -> ImageIds:
    """Number the images that examples name, in the order of their paths."""
    paths = sorted({path for example in examples for path in images_in(example.prompt)})
    return ImageIds({path: number for number, path in enumerate(paths)}, first, each)


class ImageTokenizer:
    """A tokenizer that turns markers into the ids of their images; in all else the one it wraps."""

    def __init__(self, base: PreTrainedTokenizerBase, ids: ImageIds | None) -> None:
        self._base, self._ids = base, ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def __len__(self) -> int:
        return len(self._base)

    def __call__(self, text: str, *, add_special_tokens: bool = True, **options: Any) -> Any:
        """Ids of one text, `{"input_ids": …}`; without markers, all that the tokenizer wrapped gives."""
        if _MARKER.search(text) is None:
            encoded = self._base(text, add_special_tokens=add_special_tokens, **options)
            self._check_words(encoded["input_ids"])
            return encoded
        tokens = self._leading() if add_special_tokens else []
        # Texts and paths alternate.
        for place, part in enumerate(_MARKER.split(text)):
            if place % 2:
                tokens += self._ids.of(part) if self._ids is not None else []
            elif part.strip():
                words = cast(list[int], self._base(part, add_special_tokens=False)["input_ids"])
                self._check_words(words)
                tokens += words
        return {"input_ids": tokens}

    def _check_words(self, ids: list[int]) -> None:
        """Refuse a word whose id the model would take for an image's."""
        if self._ids is not None and ids and max(ids) >= self._ids.first:
            raise ModelError(
                f"a text has a token above the {self._ids.first} that the model embeds, where the ids of "
                "images begin; name a model and tokenizer that belong together, or take that token out of "
                "the text"
            )

    def _leading(self) -> list[int]:
        """Special tokens that begin a text; one that ends a text would end it before its answer."""
        special = list(cast(list[int], self._base("")["input_ids"]))
        if special and special[-1] == self._base.eos_token_id != self._base.bos_token_id:
            special.pop()
        return special


def tokenizer_with_images(base: PreTrainedTokenizerBase, ids: ImageIds | None) -> PreTrainedTokenizerBase:
    """`ImageTokenizer` under the type of a tokenizer; without ids it leaves every marker out."""
    return cast(PreTrainedTokenizerBase, ImageTokenizer(base, ids))


ImageSource = Callable[[torch.Tensor], torch.Tensor]
"""(M,) int64 numbers of images, all different, to (M, K, D) vectors in the width of the embedding."""


class ImageEmbedding(nn.Module):
    """Looks up ids of the vocabulary in the model's own table and all higher ones in an image source."""

    images_above_rows = True
    """Ids above the rows are right; `acceptance.check_ids` asks for it."""

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
    """Let a model read images of `each` ids; changes its input embedding in place."""
    base = cast(PreTrainedModel, base_model(model))
    words = base.get_input_embeddings()
    if isinstance(words, ImageEmbedding):
        words = words.words
    if type(words) is not nn.Embedding:
        raise ModelError(f"{type(base).__name__} embeds words with {type(words).__name__}; a table is needed")
    base.set_input_embeddings(ImageEmbedding(words, source, each).to(words.weight.device))
