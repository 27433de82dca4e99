"""Training a projector once, on public images, with everything else frozen."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedmosaic.client.model.examples import Example, encode_examples, padding_token
from fedmosaic.client.model.fingerprint import fingerprint
from fedmosaic.client.model.scoring import Examiner
from fedmosaic.client.model.training import TrainingSettings, train_local
from fedmosaic.client.vision.encoder import CHANNELS
from fedmosaic.client.vision.features import GRID, SIZE, image_features
from fedmosaic.client.vision.inputs import located, number_images, put_images, tokenizer_with_images
from fedmosaic.client.vision.projector import ProjectedFeatures, Projector, ProjectorRecord
from fedmosaic.protos.errors import ModelError


@dataclass(frozen=True)
class PublicImages:
    """Questions about the public images of a folder; those for testing have choices and other images."""

    name: str
    folder: Path
    train: Sequence[Example]
    test: Sequence[Example]


def train_projector(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    public: PublicImages,
    settings: TrainingSettings,
    cache: Path,
    console: Console,
) -> tuple[Projector, ProjectorRecord, tuple[float, float]]:
    """Train a projector for a bare language model, which is frozen; its input embedding is changed.

    Gives the projector, its record, and accuracy on the test examples with their images and without.
    `ModelError` if the model embeds words in another way than a table.
    """
    model.requires_grad_(False)
    identity = fingerprint(model)
    words = model.get_input_embeddings()
    if not isinstance(words, nn.Embedding):
        raise ModelError(
            f"{type(model).__name__} embeds words with {type(words).__name__}; a table is needed"
        )
    scale = float(words.weight.float().square().mean().sqrt())
    ids = number_images((*public.train, *public.test), words.num_embeddings, GRID**2)
    paths = [located(public.folder, path) for path in ids.numbers]
    features = image_features(paths, cache=cache, console=console)
    projector = Projector(CHANNELS, words.embedding_dim, scale)
    put_images(model, ProjectedFeatures(features, projector), ids.each)
    with_images = tokenizer_with_images(tokenizer, ids)
    started = time.monotonic()
    shuffled = list(public.train)
    random.Random(settings.seed).shuffle(shuffled)  # noqa: S311 (public data, no secret)
    needed = shuffled[: settings.steps * settings.per_device_train_batch_size]
    with Progress(console=console) as progress:
        task = progress.add_task("training the projector", total=settings.steps)
        report = train_local(
            model,
            encode_examples(with_images, needed, settings.max_length),
            settings,
            pad_token_id=padding_token(with_images),
            progress=lambda step, _total, _loss: progress.update(task, completed=step),
        )
    seconds = time.monotonic() - started
    projector.requires_grad_(False)
    seen, blind = (
        Examiner(model, t, 32, settings.max_length).score(public.test).value
        for t in (with_images, tokenizer_with_images(tokenizer, None))
    )
    record = ProjectorRecord(
        identity,
        CHANNELS,
        words.embedding_dim,
        SIZE,
        GRID,
        public.name,
        settings.steps,
        seconds,
        report.first_loss,
        report.last_loss,
    )
    return projector, record, (seen, blind)
