"""The methods that a scenario can be run with: FedMosaic, its ablations, and what it is compared with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from rich.console import Console
from rich.table import Table

from fedmosaic.experiments.methods.cost import reference_flops
from fedmosaic.experiments.methods.loop import run_baseline
from fedmosaic.experiments.methods.pruning import HetLoraPruned
from fedmosaic.experiments.methods.server_side import FlexLora, HetLora, PerAda
from fedmosaic.experiments.methods.strategies import (
    Ditto,
    FedAvg,
    FedDat,
    FedDpa,
    FedSim,
    LocalOnly,
    Strategy,
)
from fedmosaic.experiments.methods.transfer import FedMd, FedMkt, Takfl
from fedmosaic.experiments.scenario.terms import Scenario
from fedmosaic.experiments.simulation.simulate import simulate
from fedmosaic.privacy.configuration import validate
from fedmosaic.protos.errors import ConfigurationError

UNIFORM_TEMPERATURE: Final = 1e9
"""A softmax over similarities in [-1, 1] at this temperature is uniform to nine digits."""


@dataclass(frozen=True)
class Variant:
    """FedMosaic with something changed.

    Attributes:
        description: what is changed.
        changes: to the scenario, as nested tables.
        aligned: whether aligned checkpoints stay: "as_named"; "left_out", where the scenario must name some;
            "refused", where they would undo the change.
    """

    description: str
    changes: Mapping[str, object]
    aligned: Literal["as_named", "left_out", "refused"] = "as_named"


VARIANTS: Final[dict[str, Variant]] = {
    "fedmosaic": Variant("Co-LoRA and relevance weights, as the scenario says", {}),
    "fedmosaic-uniform": Variant(
        "without relevance: every other client has the same weight",
        {"relevance": {"temperature": UNIFORM_TEMPERATURE}},
    ),
    "fedmosaic-fixed-gate": Variant("the received branch always has weight 1/2", {"fixed_gate": 0.5}),
    "fedmosaic-family": Variant(
        "clients of one architecture also share LoRA of other layers", {"family_sharing": True}
    ),
    "fedmosaic-cosine": Variant(
        "the paper's cosine of noisy profiles, not corrected", {"relevance": {"similarity": "cosine"}}
    ),
    "fedmosaic-first-layers": Variant(
        "without block alignment: the first layers share, whatever the model's depth",
        {"adapter": {"layer_rule": "first"}},
        aligned="refused",
    ),
    "fedmosaic-unaligned": Variant(
        "without weight alignment: random bases in place of the aligned checkpoints",
        {"adapter": {"basis": ""}},
        aligned="left_out",
    ),
    "fedmosaic-blend": Variant(
        "the local branch begins every round half way to what is received (not in the paper)",
        {"training": {"blend_received": 0.5}},
    ),
    "fedmosaic-family-blend": Variant(
        "the same with family sharing", {"family_sharing": True, "training": {"blend_received": 0.5}}
    ),
    "fedmosaic-alone": Variant(
        "the same adapter and training, but what is received is not used", {"discard_received": True}
    ),
}

BASELINES: Final[dict[str, tuple[str, Callable[[], Strategy]]]] = {
    "local": ("LoRA, every client alone", LocalOnly),
    "fedavg": ("FedIT: LoRA averaged within an architecture", FedAvg),
    "ditto": ("a shared adapter, and a personal one near it", Ditto),
    "feddpa": ("a shared adapter, then a personal one beside it", FedDpa),
    "fedsim": ("shared and personal adapter trained on their summed logits", FedSim),
    "feddat": ("shared and personal adapter teach each other", FedDat),
    "perada": ("Ditto, and the server distils clients' logits on public data", PerAda),
    "takfl": ("architectures teach each other; the task vectors are averaged", Takfl),
    "fedmd": ("clients learn from the mean of what all say about public data", FedMd),
    "fedmkt": ("clients and a server's model teach each other what they know better", FedMkt),
    "hetlora": ("ranks differ: padded and weighted by norm", HetLora),
    "hetlora-pruned": ("the same, and clients give up ranks that training makes smaller", HetLoraPruned),
    "flexlora": ("ranks differ: products averaged, cut by singular values", FlexLora),
}


def simulate_method(scenario: Scenario, directory: Path, console: Console) -> None:
    """Run a scenario with the method it names, in this process; resumes what stands in the directory.

    Args:
        scenario: paths resolved.
        directory: the run's directory.
        console: where progress is shown.

    Raises:
        ConfigurationError: the method is not known, or not possible in this scenario.
    """
    if scenario.method in VARIANTS:
        _refuse_ranks(scenario, scenario.method)
        simulate(with_variant(scenario), directory, console, reference_flops(scenario))
        return
    if scenario.method not in BASELINES:
        known = ", ".join((*VARIANTS, *BASELINES))
        raise ConfigurationError(f"there is no method {scenario.method!r}; known: {known}")
    strategy = BASELINES[scenario.method][1]()
    if strategy.shares and not isinstance(strategy, HetLora | FlexLora):
        _refuse_ranks(scenario, scenario.method)
    run_baseline(strategy, scenario, directory, console)


def with_variant(scenario: Scenario) -> Scenario:
    """The scenario with the changes of the variant that it names."""
    variant = VARIANTS[scenario.method]
    content = scenario.model_dump(mode="json")
    named = [
        client["model"] for client in (*content["clients"], *content["unseen"]) if client["model"]["aligned"]
    ]
    if variant.aligned == "refused" and named:
        raise ConfigurationError(
            f"{scenario.method} with aligned checkpoints: they fix which layers share; leave them out"
        )
    if variant.aligned == "left_out":
        if not named:
            raise ConfigurationError(
                f"{scenario.method} leaves aligned checkpoints out, and scenario {scenario.name} names none"
            )
        for model in named:
            model |= {"aligned": None, "rank": None}
    for key, change in variant.changes.items():
        content[key] = {**content[key], **change} if isinstance(change, dict) else change
    return validate(content, Scenario, f"scenario {scenario.name} as {scenario.method}")


def _refuse_ranks(scenario: Scenario, method: str) -> None:
    named = [client.id for client in scenario.clients if client.rank]
    if named:
        raise ConfigurationError(
            f"client {named[0]} names a rank of its own, which {method} cannot share; use hetlora or "
            "flexlora, or leave it out"
        )


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic methods`: list them."""
    if arguments and arguments[0] not in ("-h", "--help"):
        raise ConfigurationError(f"`fedmosaic methods` takes no arguments, got {arguments[0]!r}")
    table = Table(title="Methods for `fedmosaic run --method NAME`")
    for column in ("name", "what it is", "runs with"):
        table.add_column(column)
    for name, variant in VARIANTS.items():
        table.add_row(name, variant.description, "sessions, server, privacy")
    for name, (description, _) in BASELINES.items():
        table.add_row(name, description, "no privacy")
    Console().print(table)
    return 0
