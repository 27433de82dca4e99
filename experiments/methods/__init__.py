"""The methods that a scenario can be run with.

A baseline is a file with a `Strategy` and a line in `BASELINES`; a variant is a line in `VARIANTS`. All
baselines stand on `strategy`, `loop` and `lora`. Those that learn from what models say share `knowledge`,
`vocabulary` and `distillation`; those whose ranks differ share `matrices`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from fedmosaic.experiments.methods.ditto import Ditto
from fedmosaic.experiments.methods.fedavg import FedAvg
from fedmosaic.experiments.methods.feddat import FedDat
from fedmosaic.experiments.methods.feddpa import FedDpa
from fedmosaic.experiments.methods.fedmd import FedMd
from fedmosaic.experiments.methods.fedmkt import FedMkt
from fedmosaic.experiments.methods.fedsim import FedSim
from fedmosaic.experiments.methods.flexlora import FlexLora
from fedmosaic.experiments.methods.hetlora import HetLora
from fedmosaic.experiments.methods.local import LocalOnly
from fedmosaic.experiments.methods.loop import reference_flops, run_baseline
from fedmosaic.experiments.methods.perada import PerAda
from fedmosaic.experiments.methods.strategy import Strategy
from fedmosaic.experiments.methods.takfl import Takfl
from fedmosaic.experiments.methods.variants import VARIANTS, with_variant
from fedmosaic.experiments.scenario.terms import Scenario
from fedmosaic.experiments.simulation.cluster import Cluster, simulate_on
from fedmosaic.experiments.simulation.simulate import simulate
from fedmosaic.protos.errors import ConfigurationError

BASELINES: Final[dict[str, tuple[str, type[Strategy]]]] = {
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
    "flexlora": ("ranks differ: products averaged, cut by singular values", FlexLora),
}


def simulate_method(
    scenario: Scenario, directory: Path, console: Console, cluster: Cluster | None = None
) -> None:
    """Run a scenario, its paths resolved, with the method it names, in this process or on a cluster.

    Resumes what stands in the run's directory. `ConfigurationError` if the method is not known, or not
    possible in this scenario or on a cluster.
    """
    method = scenario.method
    if method not in VARIANTS and method not in BASELINES:
        known = ", ".join((*VARIANTS, *BASELINES))
        raise ConfigurationError(f"there is no method {method!r}; known: {known}")
    strategy = BASELINES[method][1]() if method in BASELINES else None
    if strategy is not None and cluster is not None:
        raise ConfigurationError(f"method {method!r} runs in one process; leave --engine ray out")
    ranked = [client.id for client in scenario.clients if client.rank]
    if ranked and (strategy is None or (strategy.shares and not strategy.ranks_differ)):
        able = " or ".join(name for name, (_, made) in BASELINES.items() if made.ranks_differ)
        raise ConfigurationError(
            f"client {ranked[0]} names a rank of its own, which {method} cannot share; use {able}, or leave "
            "it out"
        )
    if strategy is not None:
        run_baseline(strategy, scenario, directory, console)
        return
    arguments = (with_variant(scenario), directory, console, reference_flops(scenario))
    if cluster is not None:
        simulate_on(cluster, *arguments)
    else:
        simulate(*arguments)


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic methods`: list them."""
    if arguments and arguments[0] not in ("-h", "--help"):
        raise ConfigurationError(f"`fedmosaic methods` takes no arguments, got {arguments[0]!r}")
    table = Table("name", "what it is", "runs with", title="Methods for `fedmosaic run --method NAME`")
    for name, variant in VARIANTS.items():
        table.add_row(name, variant.description, "sessions, server, privacy")
    for name, (description, _) in BASELINES.items():
        table.add_row(name, description, "no privacy")
    Console().print(table)
    return 0
