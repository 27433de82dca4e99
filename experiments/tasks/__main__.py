"""`fedmosaic tasks`: write the data sets of scenarios from the folders that the sources are published in."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from fedmosaic.client.assets import cache_directory
from fedmosaic.client.model.examples import Example, read_examples
from fedmosaic.client.model.load import load_base_model
from fedmosaic.client.model.training import TrainingSettings
from fedmosaic.client.vision.projector import save_projector
from fedmosaic.experiments.scenario.streams import dirichlet_shares
from fedmosaic.experiments.tasks.drake.files import DrakeFiles, write_drake
from fedmosaic.experiments.tasks.labelled import write_examples
from fedmosaic.experiments.tasks.pictures.projector_training import PublicPictures, train_projector
from fedmosaic.experiments.tasks.pictures.sets import write_pictures
from fedmosaic.experiments.tasks.pictures.words import easy_vqa
from fedmosaic.experiments.tasks.texts.sets import write_set
from fedmosaic.protos.errors import ConfigurationError

_PROJECTOR_LENGTH: Final = 96
_PROJECTOR_TESTS: Final = 1000


@dataclass(frozen=True)
class Text:
    """Write a text benchmark: one folder per client, public examples, and a table of sizes and licences."""

    set: Literal[
        "text-ten",
        "text-pairs",
        "text-siblings",
        "text-siblings-many",
        "text-desks",
        "text-desks-one-form",
        "glue",
    ]
    """Ten clients with four tasks each; three pairs with related tasks; two trios; two dozens; two trios that
    contradict each other, in forms of their own or in one; GLUE."""
    data: Path
    """Folder with the data sets: cl_benchmark_text, llm_adapters_qa, bigbench_subset, clinc150, banking77,
    self_instruct and wikitext2."""
    out: Path
    """Where to write; made if absent."""
    train_rows: int = 400
    """Most training examples per task."""
    test_rows: int = 100
    """Most test examples per task."""
    public_rows: int = 600
    """Most public examples, for the basis of the task profile and for servers that distil."""
    tuning: bool = False
    """Write validation examples, taken from the part for training, in place of the test examples."""


@dataclass(frozen=True)
class Pictures:
    """Write a picture benchmark: one folder per client, the pictures, public examples, and a table."""

    data: Path
    """Folder with the data sets: omniglot_small, self_instruct and wikitext2; nlvr, shapes_vqa and vqa_rad
    for pictures-ten, fashion_mnist for pictures-siblings."""
    out: Path
    """Where to write; made if absent."""
    train_rows: int = 240
    """Most training examples per task."""
    test_rows: int = 60
    """Most test examples per task."""
    public_rows: int = 600
    """Most public examples, without pictures."""
    set: Literal["pictures-ten", "pictures-siblings"] = "pictures-ten"
    """Ten clients with four tasks each; two trios with two tasks each."""
    tuning: bool = False
    """Write validation examples, taken from the part for training, in place of the test examples."""


@dataclass(frozen=True)
class TrainProjector:
    """Train the projector that lets a language model read pictures, on public pictures (easy-VQA)."""

    model: str
    """Folder or hub id of the language model."""
    out: Path
    """Where to write it; `projector` of a scenario's client."""
    gguf_file: str | None = None
    """GGUF file inside the folder."""
    keep_layers: int | None = None
    """Keep only so many of the first layers, as the clients do."""
    steps: int = 400
    """Optimizer steps; everything but the projector is frozen."""
    batch_size: int = 16
    """Questions in a step."""
    learning_rate: float = 1e-3
    """Of AdamW."""
    seed: int = 0
    """Of the start and of the order of the questions."""


@dataclass(frozen=True)
class Drake:
    """Write a scenario of DRAKE from its downloaded data sets (SNUMPR/DRAKE on the Hugging Face hub)."""

    data: Path
    """Folder with the data sets, each with train/ and test/."""
    out: Path
    """Where to write; made if absent."""
    public: Path
    """Public examples, JSON lines, for the basis of the task profile."""
    scenario: str = "DRAKE_hetero_llava_llama_1B_3B"
    """Name in the authors' repository; it says which client has which model."""
    model: str | None = None
    """Give every client this model, in place of the scenario's."""
    projector: Path | None = None
    """Of that model, if it is no vision-language model itself."""


@dataclass(frozen=True)
class Dirichlet:
    """Deal one data set to clients, with label shares drawn from a Dirichlet distribution."""

    train: Path
    """Training examples, JSON lines."""
    test: Path
    """Test examples, JSON lines; dealt with the same shares of labels as nearly as chance allows."""
    out: Path
    """Where to write `client-<n>.train.jsonl` and `client-<n>.test.jsonl`."""
    clients: int = 10
    """Number of clients."""
    alpha: float = 0.5
    """Concentration; 0.1 gives clients with one or two classes, 1.0 mixed ones."""
    seed: int = 0
    """Of the draws."""
    least: int = 8
    """Fewest training examples of a client."""


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic tasks` with its arguments."""
    parsed: Text | Pictures | TrainProjector | Drake | Dirichlet = tyro.extras.subcommand_cli_from_dict(
        {
            "text": Text,
            "pictures": Pictures,
            "projector": TrainProjector,
            "drake": Drake,
            "dirichlet": Dirichlet,
        },
        args=list(arguments),
        prog="fedmosaic tasks",
    )
    console = Console()
    if isinstance(parsed, TrainProjector):
        pretrain(parsed, console)
        return 0
    if isinstance(parsed, Drake):
        files = DrakeFiles(
            parsed.data, parsed.scenario, parsed.public, parsed.out, parsed.model, parsed.projector
        )
        console.print(f"{write_drake(files)}; run it with `fedmosaic run`")
        return 0
    if isinstance(parsed, Pictures):
        written = write_pictures(
            parsed.set,
            parsed.data,
            parsed.out,
            parsed.train_rows,
            parsed.test_rows,
            parsed.public_rows,
            tuning=parsed.tuning,
        )
        show_pictures(written, parsed.set, parsed.out, console)
        return 0
    if isinstance(parsed, Dirichlet):
        deal(parsed)
        console.print(f"{parsed.clients} clients are in {parsed.out}")
        return 0
    content = write_set(
        parsed.set,
        parsed.data,
        parsed.out,
        parsed.train_rows,
        parsed.test_rows,
        parsed.public_rows,
        tuning=parsed.tuning,
    )
    table = Table(title=f"{parsed.set}, in {parsed.out}")
    for column in ("task", "training", "test", "most frequent answer", "origin", "licence"):
        table.add_column(column)
    for task, row in content.items():
        table.add_row(task, *(str(value) for value in row.values()))
    console.print(table)
    return 0


def show_pictures(
    content: Mapping[str, Mapping[str, object]], name: str, out: Path, console: Console
) -> None:
    """Print the table of a picture benchmark."""
    table = Table(title=f"{name}, in {out}")
    columns = ("domain", "training", "test", "pictures", "most frequent answer", "question only")
    for column in ("task", *columns, "origin", "licence"):
        table.add_column(column)
    for task, row in content.items():
        table.add_row(task, *(str(value) for value in row.values()))
    console.print(table)
    console.print("question only: the answer that the same words had most often in training, no picture seen")


def pretrain(arguments: TrainProjector, console: Console) -> None:
    """Train and write a projector; see `train_projector` for the errors."""
    cache = cache_directory()
    folder, train = easy_vqa(cache, "train")
    _, test = easy_vqa(cache, "test")
    model, tokenizer = load_base_model(
        arguments.model, gguf_file=arguments.gguf_file, keep_layers=arguments.keep_layers
    )
    settings = TrainingSettings(
        steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        warmup=min(50, arguments.steps),
        max_length=_PROJECTOR_LENGTH,
        seed=arguments.seed,
    )
    public = PublicPictures("easy-VQA 1.0", folder, train, test[:_PROJECTOR_TESTS])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arguments.seed)
        done = train_projector(model, tokenizer, public, settings, cache, console)
    save_projector(done.projector, done.record, arguments.out)
    console.print(
        f"{arguments.out}: loss {done.record.first_loss:.2f} to {done.record.last_loss:.2f} nats per token "
        f"in {done.record.seconds:.0f} s; on {len(public.test)} questions about other pictures "
        f"{done.accuracy:.3f}, without the pictures {done.question_only:.3f}"
    )


def deal(arguments: Dirichlet) -> None:
    """Write every client's part; see `dirichlet_shares` for the errors.

    Raises:
        ConfigurationError: an example has no choices, so that it has no class.
    """
    train, test = read_examples(arguments.train), read_examples(arguments.test)
    if any(not example.choices for example in (*train, *test)):
        raise ConfigurationError("every example needs choices: its answer is the class that is dealt by")
    # One draw over both parts gives a client the same shares of the classes in training and in test.
    both = [*train, *test]
    shares = dirichlet_shares(
        [example.answer for example in both],
        arguments.clients,
        arguments.alpha,
        arguments.seed,
        least=2 * arguments.least,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    for number, share in enumerate(shares):
        parts: dict[str, list[Example]] = {
            "train": [both[i] for i in share if i < len(train)],
            "test": [both[i] for i in share if i >= len(train)],
        }
        if len(parts["train"]) < arguments.least or not parts["test"]:
            raise ConfigurationError(
                f"client {number} got {len(parts['train'])} training and {len(parts['test'])} test examples; "
                "raise alpha, give more examples, or try another seed"
            )
        for name, examples in parts.items():
            write_examples(arguments.out / f"client-{number}.{name}.jsonl", examples)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
