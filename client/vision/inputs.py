"""Images for a model: through a projector for a language model, its own tower for a vision-language model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedmosaic.client.model.examples import Example, answer_tokens, question_tokens
from fedmosaic.client.model.fingerprint import fingerprint
from fedmosaic.client.vision.features import forget_features, image_features
from fedmosaic.client.vision.projector import ProjectedFeatures, load_projector
from fedmosaic.client.vision.tower import TowerImages, has_tower
from fedmosaic.client.vision.words import (
    ImageSource,
    images_in,
    number_images,
    put_images,
    tokenizer_with_images,
)
from fedmosaic.protos.errors import ConfigurationError, ModelError


@dataclass(frozen=True)
class VisionInputs:
    """Where images come from, and what reads them.

    The folder or hub id of the model, the folder that the images which prompts name lie in, the folder of the
    projector that lets a language model read images, whether to leave every image out, and the directory
    where features of the images are kept (`image_features`).
    """

    model: str
    images: Path | None = None
    projector: Path | None = None
    question_only: bool = False
    features: Path | None = None


def open_images(
    inputs: VisionInputs,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_length: int,
) -> PreTrainedTokenizerBase:
    """Let an adapted model read the images of all `examples` that it will read; changes its input embedding.

    Everything that reads images is frozen, so nothing of it is ever shared. The tokenizer that is given back
    knows the images; it is the one given if no example names an image.

    Raises:
        ConfigurationError: an image is missing, prompts name images without a folder for them, answers or
            choices name some, the model has no way to read them, or an example with its images is longer
            than `max_length`.
        ModelError: the projector belongs to another model.
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
