"""`fedmosaic tasks`: write the data sets of scenarios from the folders that the sources are published in."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from fedmosaic.client.examples import Example, read_examples
from fedmosaic.experiments.streams import dirichlet_shares
from fedmosaic.experiments.tasks.labelled import write_examples
from fedmosaic.experiments.tasks.text_sets import write_set
from fedmosaic.protos.errors import ConfigurationError


@dataclass(frozen=True)
class Text:
    """Write a text benchmark: one folder per client, public examples, and a table of sizes and licences."""

    set: Literal["text-ten", "text-pairs", "text-siblings", "glue"]
    """Ten clients with four tasks each; three pairs with related tasks; three trios; GLUE."""
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
    parsed: Text | Dirichlet = tyro.extras.subcommand_cli_from_dict(
        {"text": Text, "dirichlet": Dirichlet}, args=list(arguments), prog="fedmosaic tasks"
    )
    console = Console()
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
