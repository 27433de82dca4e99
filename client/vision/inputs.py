"""Images for a model, as words: a prompt names images in place, and each becomes a few token ids of its own.

A prompt holds markers `<image:PATH>`. With n images of K tokens each, image i has the ids
V + iK … V + iK + K - 1, above the V ids of the vocabulary, so that examples, batches, scoring and generation
handle images like any other words. The model's input embedding knows what stands behind these ids: a
projector's vectors for a language model, its own tower's for a vision-language model.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedmosaic.client.model.examples import Example, answer_tokens, question_tokens
from fedmosaic.client.model.loss import base_model, fingerprint
from fedmosaic.client.vision.features import forget_features, image_features
from fedmosaic.client.vision.projector import ProjectedFeatures, TowerImages, has_tower, load_projector
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


@dataclass(frozen=True)
class VisionInputs:
    """Model, folder of images, projector, whether images are left out, and where features are kept."""

    model: str
    images: Path | None = None
    projector: Path | None = None
    question_only: bool = False
    features: Path | None = None


def open_images(
    inputs: VisionInputs, model: PeftModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example],
    max_length: int,
) -> PreTrainedTokenizerBase:  # fmt: skip
    """Let an adapted model read the images of all `examples` that it will read; changes its input embedding.

    Everything that reads images is frozen, so nothing of it is ever shared. The tokenizer that is given back
    knows the images; it is the one given if no example names an image. ConfigurationError if an image is
    missing, prompts name images without a folder for them, answers or choices name some, the model has no way
    to read them, or an example with its images is longer than `max_length`; ModelError if the projector is of
    another model.
    """
    for example in examples:
        if any(images_in(text) for text in (example.answer, *example.choices)):
            raise ConfigurationError(
                f"example {example.id!r} names an image in its answer or a choice; only prompts can"
            )
    if inputs.question_only:
        return tokenizer_with_images(tokenizer, None)
    named = [example for example in examples if images_in(example.prompt)]
    if not named:
        _forget(inputs)
        return tokenizer
    if inputs.images is None:
        raise ConfigurationError(
            f"example {named[0].id!r} names the image {images_in(named[0].prompt)[0]!r}; name the folder "
            "that images lie in (data.pictures of a client, images of a scenario)"
        )
    base = cast(PreTrainedModel, model.get_base_model())
    first = cast(nn.Embedding, base.get_input_embeddings()).num_embeddings
    names = sorted({path for example in named for path in images_in(example.prompt)})
    source, each = _source(inputs, model, [located(inputs.images, path) for path in names])
    put_images(model, source, each)
    with_images = tokenizer_with_images(tokenizer, number_images(named, first, each))
    _check_lengths(with_images, named, each, max_length)
    return with_images


def located(folder: Path, path: str) -> Path:
    """An image's file; ConfigurationError if it lies outside the folder, or is no file."""
    try:
        found = (folder / path).resolve()
        if not found.is_relative_to(folder.resolve()):
            raise ConfigurationError(f"the image {path!r} lies outside {folder}")
        is_file = found.is_file()
    except (OSError, ValueError, RuntimeError):
        is_file = False
    if not is_file:
        raise ConfigurationError(f"there is no image {path[:200]!r} in {folder}")
    return found


def _source(inputs: VisionInputs, model: PeftModel, paths: Sequence[Path]) -> tuple[ImageSource, int]:
    """What gives the vectors of images, and how many tokens each has."""
    base = cast(PreTrainedModel, model.get_base_model())
    if inputs.projector is None:
        if not has_tower(base):
            raise ConfigurationError(
                f"{inputs.model} reads no images; name its projector, which `fedmosaic tasks projector` "
                "trains, or choose a vision-language model"
            )
        tower = TowerImages(base, inputs.model, paths)
        _forget(inputs)
        return tower, tower.each
    projector, record = load_projector(inputs.projector)
    if record.model_sha256 != fingerprint(model):
        raise ModelError(
            f"the projector in {inputs.projector} was trained for another model than {inputs.model}; train "
            "one for it with `fedmosaic tasks projector`"
        )
    features = image_features(paths, size=record.size, grid=record.grid, kept=inputs.features)
    return ProjectedFeatures(features, projector), record.grid**2


def _forget(inputs: VisionInputs) -> None:
    """Once it is sure that none are needed: after an error they would have to be computed again."""
    if inputs.features is not None:
        forget_features(inputs.features)


def _check_lengths(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], each: int, room: int
) -> None:
    """Prompts are cut from the left, where the images stand: cutting one away would go unnoticed."""
    longest = max(
        len(question_tokens(tokenizer, example))
        + 1
        + max(len(answer_tokens(tokenizer, answer)) for answer in (example.answer, *example.choices))
        for example in examples
    )
    if longest > room:
        raise ConfigurationError(
            f"an example with its images, {each} tokens each, is {longest} tokens long; raise "
            f"training.max_length from {room} to {longest} at least"
        )
