"""A federation on this machine or a cluster: real sessions, server and privacy, client by client.

A round is a turn of every client that takes part in it. The server's clock stands: nobody is late here.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final

from rich.console import Console

from fedmosaic.client.client import RESULT
from fedmosaic.client.colora import fix_gate, read_family, set_active_branches, set_trainable
from fedmosaic.client.model.adapted import load_adapted
from fedmosaic.client.model.examples import EncodedExample
from fedmosaic.client.model.training import EpochSampler, TrainingSettings, train_local
from fedmosaic.client.state import read_record
from fedmosaic.experiments.scenario.founding import agreed_adapter, fit_profile, found_federation
from fedmosaic.experiments.scenario.participants import Evaluation
from fedmosaic.experiments.scenario.terms import RunFailedError, Scenario, ScenarioClient
from fedmosaic.experiments.simulation.compute import equal_steps, step_flops
from fedmosaic.experiments.simulation.models import SharedModel, shared_model
from fedmosaic.experiments.simulation.progress import RunProgress
from fedmosaic.experiments.simulation.worker import Architecture, Worker, architecture, state_of
from fedmosaic.privacy.federation.terms import AdapterTerms
from fedmosaic.protos.errors import ConfigurationError
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.settings import ServerSettings, settings_from_kit

_AT_ONCE: Final = 2
"""Turns in a process at once: one computes while the other waits for the disk."""


Turns = Callable[[Sequence[int], int], None]
"""Runs a turn of each of these clients of the scenario in a round, by number; RunFailedError if one fails."""


def simulate(
    scenario: Scenario, directory: Path, console: Console, reference: Mapping[str, float] | None = None
) -> None:
    """Run a scenario in this process to its end, or go on with it where an earlier process stopped.

    `reference` are operations of a step, by client, of the method that this one is to cost as much as; none
    to leave the steps as they are. `RunFailedError` if a client failed; the message names it.
    """
    evaluation = Evaluation(scenario)
    scenario, settings, flops, models = prepare(scenario, directory, reference or {}, console)
    progress = run_progress(scenario, directory, console)
    with Coordinator(settings, standing_clock) as coordinator, progress.bar:
        worker = Worker(scenario, directory, models, evaluation, coordinator, progress, flops)
        try:
            play(scenario, directory, coordinator, partial(_in_threads, worker))
        finally:
            worker.close()


def standing_clock() -> float:
    """No second passes, and so no deadline."""
    return 0.0


def prepare(
    scenario: Scenario, directory: Path, reference: Mapping[str, float], console: Console
) -> tuple[Scenario, ServerSettings, dict[str, float], dict[Architecture, SharedModel]]:
    """Load every model and found the federation, unless that is done; arguments as of `simulate`.

    Gives the scenario with the steps to take, the server's settings, operations of a step, and the models.
    """
    models, adapter = make_models(scenario)
    train = partial(_train_without_dp, adapter)
    flops = {} if adapter.private else step_flops(scenario, models, architecture, train)
    scenario = equal_steps(scenario, flops, reference)
    mechanism = fit_profile(scenario, directory, console, own_process=False)
    place = directory / "federation"
    if not (place / "roster.json").exists():
        found_federation(scenario, mechanism, directory, 7443, adapter)
    # The same seed draws the same clients.
    run_id = hashlib.sha256(f"{scenario.name}/{scenario.seed}".encode()).hexdigest()[:32]
    changes = {"durable": False, "run_id": run_id}
    settings = settings_from_kit(place / "server").model_copy(update=changes)
    return scenario, settings, flops, models


def play(scenario: Scenario, directory: Path, coordinator: Coordinator, turns: Turns) -> None:
    """Run the rounds that are left, each with a turn of those who take part, if only in its key agreement."""
    coordinator.advance()
    for number in range(coordinator.available_round, scenario.schedule.rounds + 1):
        chosen = coordinator.taking_part(number).union(coordinator.describe().waiting_for)
        turns([i for i, client in enumerate(scenario.clients) if client.id in chosen], number)
    unfinished = [
        index
        for index, client in enumerate(scenario.clients)
        if (state := state_of(directory, client.id)).exists() and not (state / RESULT).exists()
    ]
    turns(unfinished, scenario.schedule.rounds + 1)


def _in_threads(worker: Worker, indices: Sequence[int], number: int) -> None:
    """Turns in this process, few at once where clients need not talk; the first error stops all of them."""
    left, limit = iter(indices), turns_at_once(worker.scenario, len(indices))
    running: dict[Future[None], int] = {}
    with ThreadPoolExecutor(limit) as pool:
        try:
            while True:
                for index in islice(left, limit - len(running)):
                    running[pool.submit(worker.turn, index, number)] = index
                if not running:
                    return
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    if (error := done.exception()) is not None:
                        name = worker.scenario.clients[running[done]].id
                        raise RunFailedError(f"client {name}: {error}") from error
                    del running[done]
        finally:
            # Also after an interrupt from the keyboard: let those at work finish their step.
            if running:
                worker.stop()


def turns_at_once(scenario: Scenario, count: int) -> int:
    """How many turns have to be under way together: all where clients wait for one another within a round."""
    together = scenario.adapter.encrypted or scenario.adapter.in_group_sums
    return max(1, count if together else min(count, _AT_ONCE))


def run_progress(scenario: Scenario, directory: Path, console: Console) -> RunProgress:
    """Progress over the training steps of all clients, less what an earlier process of the run has done.

    Members of group sums train once, after the last round.
    """
    steps, schedule = steps_of_turn(scenario), scenario.schedule
    once, turns = scenario.adapter.in_group_sums, len(scenario.clients)
    if not once:
        turns = schedule.rounds * (schedule.sampled_clients or turns)
    progress = RunProgress(console, steps * turns)
    done = [trained_until(scenario, directory, client.id) for client in scenario.clients]
    # Of the newest round some have had their turn, of those before all who took part.
    newest = max(done)
    before = max(0, newest - 1) * (schedule.sampled_clients or len(done))
    progress.skip(steps * (before + (done.count(newest) if newest else 0)))
    return progress


def trained_until(scenario: Scenario, directory: Path, client: str) -> int:
    """Last round that a client's state says it trained for, 0 before any; under group sums 1 at its end."""
    state = state_of(directory, client)
    record = read_record(state)
    if record is None:
        return 0
    return int((state / RESULT).exists()) if scenario.adapter.in_group_sums else record.completed_round


def steps_of_turn(scenario: Scenario) -> int:
    """Training steps of a client in a round, private ones among them; in all, under group sums."""
    adapter, steps = scenario.adapter, scenario.training.steps
    private = adapter.private and not adapter.in_group_sums
    return steps + (scenario.adapter_privacy.steps_per_round if private else 0)


def make_models(scenario: Scenario) -> tuple[dict[Architecture, SharedModel], AdapterTerms]:
    """One model per architecture, and the adapter's terms with the families' dimensions filled in."""
    agreed = agreed_adapter(scenario)
    terms = agreed.model_copy(update={"basis_seed": agreed.basis_seed + scenario.seed})
    models: dict[Architecture, SharedModel] = {}
    dimensions = dict(terms.family_dimensions)
    for client in scenario.clients:
        if architecture(client) in models:
            continue
        models[architecture(client)] = shared = load_shared(scenario, client, terms)
        size = read_family(shared.model).size if scenario.family_sharing and client.family else 0
        if size and dimensions.setdefault(client.family, size) != size:
            raise ConfigurationError(
                f"client {client.id}: family {client.family!r} shares {dimensions[client.family]} "
                f"values of its other layers, this model has {size}; a family has one model and one rank"
            )
    return models, terms.model_copy(update={"family_dimensions": dimensions})


def load_shared(scenario: Scenario, client: ScenarioClient, terms: AdapterTerms) -> SharedModel:
    """The model of a client's architecture with a fresh adapter."""
    model, tokenizer = load_adapted(client.model, terms)
    if scenario.fixed_gate is not None:
        fix_gate(model, scenario.fixed_gate)
    return shared_model(scenario, client, model, tokenizer)


def _train_without_dp(
    adapter: AdapterTerms,
    client: ScenarioClient,
    shared: SharedModel,
    examples: Sequence[EncodedExample],
    order: EpochSampler,
    settings: TrainingSettings,
) -> None:
    """FedMosaic's steps; the LoRA of the other layers is the client's own where no family shares it."""
    set_trainable(shared.model, {"local", "gate"})
    if adapter.other_layers == "lora" and client.family not in adapter.family_dimensions:
        set_active_branches(shared.model, {"local"}, layers="family")
    train_local(shared.model, examples, settings, pad_token_id=shared.pad_token_id, sampler=order)
