"""Giving a scenario's model its sight: a projector for a language model, its own tower for a hub's model."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedmosaic.client.examples import Example, answer_tokens, prompt_tokens, read_examples
from fedmosaic.client.probe import fingerprint
from fedmosaic.experiments.scenario import Scenario, ScenarioClient
from fedmosaic.experiments.vision.embedding import PictureSource, ProjectedFeatures, put_pictures
from fedmosaic.experiments.vision.features import picture_features
from fedmosaic.experiments.vision.projector import load_projector
from fedmosaic.experiments.vision.tower import TowerPictures, has_tower
from fedmosaic.experiments.vision.words import (
    PictureIds,
    number_pictures,
    pictures_in,
    tokenizer_with_pictures,
)
from fedmosaic.protos.errors import ConfigurationError, ModelError


def give_sight(
    scenario: Scenario, client: ScenarioClient, model: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    """Let a client's model read the pictures of all the scenario's examples.

    Args:
        scenario: paths resolved.
        client: the first of those that use the model.
        model: adapted; its input embedding is changed.
        tokenizer: of the model.

    Returns:
        A tokenizer that knows the pictures; the one given if the scenario has none.

    Raises:
        ConfigurationError: a picture is missing, prompts name pictures without a folder for them, the model
            has no way to read them, or an example with its pictures is longer than `training.max_length`.
        ModelError: the projector belongs to another model.
    """
    if scenario.question_only:
        return tokenizer_with_pictures(tokenizer, None)
    named = [example for example in _examples(scenario) if pictures_in(example.prompt)]
    if not named:
        return tokenizer
    if scenario.pictures is None:
        raise ConfigurationError(
            f"scenario {scenario.name} has prompts with pictures; name the folder that they lie in (pictures)"
        )
    base = cast(PreTrainedModel, model.get_base_model())
    first = cast(nn.Embedding, base.get_input_embeddings()).num_embeddings
    paths = [located(scenario.pictures, path) for path in sorted(_names(named))]
    source, each = _source(client, model, paths)
    ids = number_pictures(named, first, each)
    put_pictures(model, source, each)
    with_pictures = tokenizer_with_pictures(tokenizer, ids)
    _check_lengths(with_pictures, named, ids, scenario.training.max_length)
    return with_pictures


def located(folder: Path, path: str) -> Path:
    """A picture's file.

    Raises:
        ConfigurationError: it lies outside the folder.
    """
    found = (folder / path).resolve()
    if not found.is_relative_to(folder.resolve()):
        raise ConfigurationError(f"the picture {path!r} lies outside {folder}")
    return found


def _examples(scenario: Scenario) -> Iterator[Example]:
    for client in (*scenario.clients, *scenario.unseen):
        for task in client.task_list:
            yield from read_examples(task.train)
            yield from read_examples(task.test)


def _names(examples: Sequence[Example]) -> set[str]:
    return {path for example in examples for path in pictures_in(example.prompt)}


def _source(client: ScenarioClient, model: PeftModel, paths: Sequence[Path]) -> tuple[PictureSource, int]:
    base = cast(PreTrainedModel, model.get_base_model())
    if client.projector is None:
        if not has_tower(base):
            raise ConfigurationError(
                f"client {client.id}: {client.model.path} reads no pictures; name its projector, which "
                "`fedmosaic tasks projector` trains, or choose a vision-language model"
            )
        source = TowerPictures(base, client.model.path, paths)
        return source, source.each
    projector, record = load_projector(client.projector)
    if record.model_sha256 != fingerprint(model):
        raise ModelError(
            f"client {client.id}: the projector in {client.projector} was trained for another model than "
            f"{client.model.path}; train one for it with `fedmosaic tasks projector`"
        )
    features = picture_features(paths, size=record.size, grid=record.grid)
    return ProjectedFeatures(features, projector), record.grid**2


def _check_lengths(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], ids: PictureIds, room: int
) -> None:
    """Prompts are cut from the left, where the pictures stand: cutting one away would go unnoticed."""
    longest = max(
        len(prompt_tokens(tokenizer, example.prompt))
        + 1
        + max(len(answer_tokens(tokenizer, answer)) for answer in (example.answer, *example.choices))
        for example in examples
    )
    if longest > room:
        raise ConfigurationError(
            f"an example with its pictures, {ids.each} tokens each, is {longest} tokens long; raise "
            f"training.max_length from {room} to {longest} at least"
        )
