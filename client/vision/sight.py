"""Giving a model its sight: a projector for a language model, its own tower for a vision-language model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedmosaic.client.model.examples import Example, answer_tokens, question_tokens
from fedmosaic.client.model.fingerprint import fingerprint
from fedmosaic.client.vision.embedding import PictureSource, ProjectedFeatures, put_pictures
from fedmosaic.client.vision.features import forget_features, picture_features
from fedmosaic.client.vision.projector import load_projector
from fedmosaic.client.vision.tower import TowerPictures, has_tower
from fedmosaic.client.vision.words import (
    PictureIds,
    number_pictures,
    pictures_in,
    tokenizer_with_pictures,
)
from fedmosaic.protos.errors import ConfigurationError, ModelError


@dataclass(frozen=True)
class Sight:
    """Where pictures come from, and what reads them.

    Attributes:
        model: folder or hub id of the model.
        pictures: folder that the pictures which prompts name lie in; None if there are none.
        projector: folder of the projector that lets a language model read pictures; None for a
            vision-language model.
        question_only: leave every picture out.
        features: directory where features of the pictures are kept; see `picture_features`.
    """

    model: str
    pictures: Path | None = None
    projector: Path | None = None
    question_only: bool = False
    features: Path | None = None


def give_sight(
    sight: Sight,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_length: int,
) -> PreTrainedTokenizerBase:
    """Let a model read the pictures of examples.

    Everything that reads pictures is frozen, so nothing of it is ever shared.

    Args:
        sight: where pictures come from.
        model: adapted; its input embedding is changed.
        tokenizer: of the model.
        examples: all that the model will read.
        max_length: most tokens of an example, `training.max_length`.

    Returns:
        A tokenizer that knows the pictures; the one given if no example names a picture.

    Raises:
        ConfigurationError: a picture is missing, prompts name pictures without a folder for them, answers or
            choices name some, the model has no way to read them, or an example with its pictures is longer
            than `max_length`.
        ModelError: the projector belongs to another model.
    """
    for example in examples:
        if any(pictures_in(text) for text in (example.answer, *example.choices)):
            raise ConfigurationError(
                f"example {example.id!r} names a picture in its answer or a choice; only prompts can"
            )
    if sight.question_only:
        return tokenizer_with_pictures(tokenizer, None)
    named = [example for example in examples if pictures_in(example.prompt)]
    if not named:
        _forget(sight)
        return tokenizer
    if sight.pictures is None:
        raise ConfigurationError(
            f"example {named[0].id!r} names the picture {pictures_in(named[0].prompt)[0]!r}; name the folder "
            "that pictures lie in (pictures)"
        )
    base = cast(PreTrainedModel, model.get_base_model())
    first = cast(nn.Embedding, base.get_input_embeddings()).num_embeddings
    names = {path for example in named for path in pictures_in(example.prompt)}
    source, each = _source(sight, model, [located(sight.pictures, path) for path in sorted(names)])
    ids = number_pictures(named, first, each)
    put_pictures(model, source, each)
    with_pictures = tokenizer_with_pictures(tokenizer, ids)
    _check_lengths(with_pictures, named, ids, max_length)
    return with_pictures


def located(folder: Path, path: str) -> Path:
    """A picture's file.

    Raises:
        ConfigurationError: it lies outside the folder, or is no file.
    """
    try:
        found = (folder / path).resolve()
        if not found.is_relative_to(folder.resolve()):
            raise ConfigurationError(f"the picture {path!r} lies outside {folder}")
        is_file = found.is_file()
    except (OSError, ValueError, RuntimeError):
        is_file = False
    if not is_file:
        raise ConfigurationError(f"there is no picture {path[:200]!r} in {folder}")
    return found


def _source(sight: Sight, model: PeftModel, paths: Sequence[Path]) -> tuple[PictureSource, int]:
    base = cast(PreTrainedModel, model.get_base_model())
    if sight.projector is None:
        if not has_tower(base):
            raise ConfigurationError(
                f"{sight.model} reads no pictures; name its projector, which `fedmosaic tasks projector` "
                "trains, or choose a vision-language model"
            )
        source = TowerPictures(base, sight.model, paths)
        _forget(sight)
        return source, source.each
    projector, record = load_projector(sight.projector)
    if record.model_sha256 != fingerprint(model):
        raise ModelError(
            f"the projector in {sight.projector} was trained for another model than {sight.model}; train one "
            "for it with `fedmosaic tasks projector`"
        )
    features = picture_features(paths, size=record.size, grid=record.grid, kept=sight.features)
    return ProjectedFeatures(features, projector), record.grid**2


def _forget(sight: Sight) -> None:
    """Once it is sure that none are needed: after an error they would have to be computed again."""
    if sight.features is not None:
        forget_features(sight.features)


def _check_lengths(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], ids: PictureIds, room: int
) -> None:
    """Prompts are cut from the left, where the pictures stand: cutting one away would go unnoticed."""
    longest = max(
        len(question_tokens(tokenizer, example))
        + 1
        + max(len(answer_tokens(tokenizer, answer)) for answer in (example.answer, *example.choices))
        for example in examples
    )
    if longest > room:
        raise ConfigurationError(
            f"an example with its pictures, {ids.each} tokens each, is {longest} tokens long; raise "
            f"training.max_length from {room} to {longest} at least"
        )
