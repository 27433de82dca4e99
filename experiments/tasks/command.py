"""`fedmosaic tasks`: write the data sets of scenarios; train the projector that lets a model read images."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
import tyro
from rich.console import Console
from rich.table import Table

from fedmosaic.client.assets import cache_directory
from fedmosaic.client.model.load import load_base_model
from fedmosaic.client.model.training import TrainingSettings
from fedmosaic.client.vision.projector import save_projector
from fedmosaic.experiments.tasks.easy_vqa import easy_vqa
from fedmosaic.experiments.tasks.projector import PublicImages, train_projector
from fedmosaic.experiments.tasks.sets import SETS, Size, write_set
from fedmosaic.protos.errors import ConfigurationError

_COLUMNS: Final = ("train", "test", "images", "most_frequent_answer", "question_only")


@dataclass(frozen=True)
class Write:
    """Write a set of tasks: a folder per client, images, public examples, a table of sizes and licences."""

    set: tyro.conf.Positional[str]
    """Its name: text-pairs, text-siblings, text-siblings-many, text-desks, text-desks-one-form, text-four,
    text-unlike or images-siblings."""
    data: Path
    """Folder with the data sets, as published: self_instruct and wikitext2; for texts cl_benchmark_text,
    clinc150 and banking77; for images omniglot_small and fashion_mnist."""
    out: Path
    """Where to write; made if absent."""
    size: tyro.conf.OmitArgPrefixes[Size] = field(default_factory=Size)


@dataclass(frozen=True)
class TrainProjector:
    """Train the projector that lets a language model read images, on public images (easy-VQA)."""

    model: str
    """Folder or hub id of the language model."""
    out: Path
    """Where to write it; `projector` of a scenario's client."""
    keep_layers: int | None = None
    """Keep only so many of the first layers, as the clients do."""
    steps: int = 400
    """Optimizer steps of 16 questions; everything but the projector is frozen."""


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic tasks` with its arguments."""
    parsed: Write | TrainProjector = tyro.extras.subcommand_cli_from_dict(
        {"write": Write, "projector": TrainProjector}, args=list(arguments), prog="fedmosaic tasks"
    )
    if isinstance(parsed, TrainProjector):
        pretrain(parsed, Console())
        return 0
    if parsed.set not in SETS:
        raise ConfigurationError(f"there is no set {parsed.set!r}; known: {', '.join(SETS)}")
    content = write_set(SETS[parsed.set], parsed.data, parsed.out, parsed.size)
    heads = (column.replace("_", " ") for column in _COLUMNS)
    table = Table("task", *heads, title=f"{parsed.set}, in {parsed.out}")
    for task, row in content.items():
        table.add_row(task, *(str(row[column]) for column in _COLUMNS))
    table.caption = "question only: the answer that the same words had most often in training"
    console = Console()
    console.print(table)
    console.print(f"origins and licences are in {parsed.out / 'table.json'}")
    return 0


def pretrain(arguments: TrainProjector, console: Console) -> None:
    """Train and write a projector; see `train_projector` for the errors."""
    cache = cache_directory()
    folder, train = easy_vqa(cache, "train")
    _, test = easy_vqa(cache, "test")
    model, tokenizer = load_base_model(arguments.model, keep_layers=arguments.keep_layers)
    settings = TrainingSettings(
        steps=arguments.steps,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        warmup=min(50, arguments.steps),
        max_length=96,
    )
    public = PublicImages("easy-VQA 1.0", folder, train, test[:1000])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        projector, record, accuracies = train_projector(model, tokenizer, public, settings, cache, console)
    save_projector(projector, record, arguments.out)
    console.print(
        f"{arguments.out}: loss {record.first_loss:.2f} to {record.last_loss:.2f} nats per token "
        f"in {record.seconds:.0f} s; on {len(public.test)} questions about other images "
        f"{accuracies[0]:.3f}, without the images {accuracies[1]:.3f}"
    )
