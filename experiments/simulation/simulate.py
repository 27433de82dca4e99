"""A federation in one process: real sessions, server and privacy, a thread per client, one model at work.

Clients of one architecture take turns on one model in memory. What the run leaves behind has the form of a
run with processes, so that `fedmosaic report` reads both. Deadlines are lifted: nobody is late here.
"""

import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rich.console import Console

from fedmosaic.client.client import RESULT, Participant
from fedmosaic.client.colora import family_layout, fix_gate, set_active_branches, set_trainable
from fedmosaic.client.ledger import ServerAnchor, open_ledger
from fedmosaic.client.model.adapted import load_adapted
from fedmosaic.client.model.examples import EncodedExample, Example
from fedmosaic.client.model.sampling import EpochSampler
from fedmosaic.client.model.training import TrainingSettings, train_local
from fedmosaic.client.planning import budgeted_channels, plan_adapter
from fedmosaic.client.releases import Releases
from fedmosaic.client.settings import ClientSettings, DataSettings
from fedmosaic.client.state import ClientState
from fedmosaic.client.statement import STATEMENT
from fedmosaic.experiments.scenario.founding import agreed_adapter, fit_profile, found_federation
from fedmosaic.experiments.scenario.participants import (
    Evaluation,
    TestSet,
    add_evaluation,
    before_and_after,
    client_seed,
    client_stream,
    training_examples,
    write_examples,
)
from fedmosaic.experiments.scenario.processes import RunFailedError
from fedmosaic.experiments.scenario.terms import Scenario, ScenarioClient
from fedmosaic.experiments.simulation.client import (
    SharedProbe,
    StreamLearner,
    StreamReleases,
    TurnTakingLearner,
)
from fedmosaic.experiments.simulation.compute import Train, by_client, equal_steps, step_flops, training_cost
from fedmosaic.experiments.simulation.models import COMPUTE, SharedModel, shared_model
from fedmosaic.experiments.simulation.progress import ClientProgress, RunProgress
from fedmosaic.experiments.simulation.transport import InProcessTransport
from fedmosaic.experiments.simulation.unseen import Federation, adapt_unseen
from fedmosaic.privacy.federation.kits import open_kit
from fedmosaic.privacy.federation.roster import AdapterTerms
from fedmosaic.privacy.files import write_atomically
from fedmosaic.privacy.mechanism.noise import SecureNoise, SeededTestNoise
from fedmosaic.privacy.statement.build import statement
from fedmosaic.protos.errors import ConfigurationError
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.settings import ServerSettings, settings_from_kit

TRAIN: Final = "train.jsonl"
_NO_DEADLINE_SECONDS: Final = 1e8
_POLL_SECONDS: Final = 0.2
_TICK_SECONDS: Final = 60.0

Architecture = tuple[str, str]


@dataclass(frozen=True)
class _Run:
    """What all clients of the process use; operations of a step by client, none where training is private."""

    scenario: Scenario
    directory: Path
    models: Mapping[Architecture, SharedModel]
    evaluation: Evaluation
    coordinator: Coordinator
    probe: SharedProbe
    progress: RunProgress
    flops: Mapping[str, float]
    stopped: threading.Event = field(default_factory=threading.Event)


def simulate(
    scenario: Scenario, directory: Path, console: Console, reference: Mapping[str, float] | None = None
) -> None:
    """Run a scenario to its end, or go on with it where an earlier process stopped.

    Args:
        scenario: paths resolved.
        directory: the run's directory; what is there already is kept and gone on with.
        console: where progress is shown.
        reference: operations of a step of the method that this one is to cost as much as, by client; none to
            leave the steps as they are.

    Raises:
        RunFailedError: a client failed; the message names it.
        FedMosaicError: the scenario cannot be run.
    """
    evaluation = Evaluation(scenario)
    models, adapter = make_models(scenario)
    flops = {} if adapter.private else _measure(scenario, models, adapter)
    scenario = equal_steps(scenario, flops, reference or {})
    settings = _found(scenario, directory, adapter, console)
    kit = open_kit(directory / "federation" / "clients" / scenario.clients[0].id)
    terms = kit.roster.terms
    probe = SharedProbe(scenario.probe, terms.profile, kit.basis, scenario.profile.max_length)
    steps = scenario.training.steps + (scenario.adapter_privacy.steps_per_round if adapter.private else 0)
    coordinator = Coordinator(settings)
    try:
        with RunProgress(console, steps * scenario.schedule.rounds * len(scenario.clients)) as progress:
            run = _Run(scenario, directory, models, evaluation, coordinator, probe, progress, flops)
            clients = [_Client(run, index) for index in range(len(scenario.clients))]
            _score_untrained(run, clients)
            _run_all(run, clients)
    finally:
        coordinator.close()
    shared = {client.entry.id: client.learner.sections()["shared"] for client in clients}
    federation = Federation(scenario, directory, terms, settings, probe, shared)
    own_layers = terms.adapter.other_layers == "lora"
    adapt_unseen(
        scenario, evaluation, directory, lambda entry: models[architecture(entry)], federation.begin,
        _training(own_family_layers=own_layers),
    )  # fmt: skip


def _found(scenario: Scenario, directory: Path, adapter: AdapterTerms, console: Console) -> ServerSettings:
    """Found the federation unless an earlier process has, and give the settings of its server."""
    mechanism = fit_profile(scenario, directory, console, own_process=False)
    place = directory / "federation"
    if not (place / "roster.json").exists():
        found_federation(scenario, mechanism, directory, 7443, adapter)
    lifted = {"round_deadline_seconds": _NO_DEADLINE_SECONDS, "gathering_seconds": _NO_DEADLINE_SECONDS}
    return settings_from_kit(place / "server").model_copy(update={"durable": False, **lifted})


def make_models(scenario: Scenario) -> tuple[dict[Architecture, SharedModel], AdapterTerms]:
    """One model per architecture, and the adapter's terms with the families' dimensions filled in."""
    agreed = agreed_adapter(scenario)
    terms = agreed.model_copy(update={"basis_seed": agreed.basis_seed + scenario.seed})
    models: dict[Architecture, SharedModel] = {}
    dimensions = dict(terms.family_dimensions)
    for client in (*scenario.clients, *scenario.unseen):
        if architecture(client) in models:
            continue
        model, tokenizer = load_adapted(client.model, terms)
        models[architecture(client)] = shared_model(scenario, client, model, tokenizer)
        if scenario.fixed_gate is not None:
            fix_gate(model, scenario.fixed_gate)
        size = family_layout(model).size if scenario.family_sharing and client.family else 0
        if size and dimensions.setdefault(client.family, size) != size:
            raise ConfigurationError(
                f"client {client.id}: family {client.family!r} shares {dimensions[client.family]} "
                f"values of its other layers, this model has {size}; a family has one model and one rank"
            )
    return models, terms.model_copy(update={"family_dimensions": dimensions})


def architecture(client: ScenarioClient) -> Architecture:
    """Clients with the same one share a model in memory."""
    return client.architecture, client.family


def _training(*, own_family_layers: bool) -> Train:
    """A step of FedMosaic without DP; the LoRA of the other layers may be the client's own."""

    def train(
        shared: SharedModel,
        examples: Sequence[EncodedExample],
        order: EpochSampler,
        settings: TrainingSettings,
    ) -> None:
        set_trainable(shared.model, {"local", "gate"})
        if own_family_layers:
            set_active_branches(shared.model, {"local"}, layers="family")
        train_local(shared.model, examples, settings, pad_token_id=shared.pad_token_id, sampler=order)

    return train


def _measure(
    scenario: Scenario, models: Mapping[Architecture, SharedModel], adapter: AdapterTerms
) -> dict[str, float]:
    def measure(client: ScenarioClient) -> float:
        own = adapter.other_layers == "lora" and client.family not in adapter.family_dimensions
        return step_flops(scenario, client, models[architecture(client)], _training(own_family_layers=own))

    return by_client(scenario.clients, architecture, measure)


def _score_untrained(run: _Run, clients: Sequence["_Client"]) -> None:
    by_id = {client.entry.id: client for client in clients}

    def score(name: str, test: TestSet) -> float:
        client = by_id[name]
        with client.shared.with_adapter(client.learner.adapter) as model:
            return run.evaluation.score_set(model, client.shared.tokenizer, test)

    run.evaluation.score_untrained(
        {name: client.state.directory for name, client in by_id.items()},
        {name: architecture(client.entry) for name, client in by_id.items()},
        score,
    )


class _Client:
    """One client: everything a client process would have, on shared models."""

    def __init__(self, run: _Run, index: int) -> None:
        scenario = run.scenario
        self.in_run, self.index, self.entry = run, index, scenario.clients[index]
        self.kit = open_kit(run.directory / "federation" / "clients" / self.entry.id)
        self.terms = self.kit.roster.terms
        self.state = ClientState(self.kit.directory / "state", self.kit.roster.federation, self.entry.id)
        self.shared = run.models[architecture(self.entry)]
        self.stream = client_stream(scenario, index)
        progress = ClientProgress(run.progress, self.entry.id, run.stopped)
        run.progress.skip(self.state.record.completed_round * scenario.training.steps)
        settings = self._settings()
        self.learner = TurnTakingLearner(
            lambda: StreamLearner(
                settings, self.terms, self.entry.family, progress, self.shared, self.stream
            ),
            self.shared,
            self._score,
            discard=scenario.discard_received,
        )
        count, privacy = self.learner.inner.example_count, self.terms.adapter_privacy
        target, channels = privacy.target_epsilon, budgeted_channels(self.terms)
        self.ledger = open_ledger(
            self.state.ledger_path, self.entry.id, count, target, channels, privacy.largest_delta
        )
        self.plan = plan_adapter(self.terms, count, self.ledger.parameters.delta, target)
        self.transport = InProcessTransport(
            run.coordinator, self.entry.id, _NO_DEADLINE_SECONDS, run.stopped, _TICK_SECONDS
        )
        self.member = Participant(
            self.kit, self.transport, self.learner, self.state, self.ledger, self.plan, self._releases(),
            progress,
        )  # fmt: skip

    def _settings(self) -> ClientSettings:
        scenario, train = self.in_run.scenario, self.kit.directory / TRAIN
        write_examples(train, training_examples(self.entry))
        return ClientSettings(
            kit=self.kit.directory,
            server="localhost:7443",
            state_dir=self.state.directory,
            model=self.entry.model,
            probe=scenario.probe,
            data=DataSettings(train=train),
            training=scenario.training.model_copy(update={"seed": client_seed(scenario, self.index)}),
        )

    def _releases(self) -> Releases:
        seed = self.in_run.scenario.unsafe_test_noise_seed

        def over(examples: Sequence[Example], round_number: int = 0) -> Releases:
            # A seeded stream of noise must be a new one in every round, also after a restart.
            number = None if seed is None else seed + 1_000_003 * round_number + self.index
            randomness = SecureNoise() if number is None else SeededTestNoise(number)
            make = self.in_run.probe.of(examples, randomness)
            ids = tuple(example.id for example in examples)
            return Releases(
                self.ledger, self.terms, self.state, ids, make, randomness, self.plan,
                disjoint_epochs=self.stream is not None,
            )  # fmt: skip

        stream = self.stream
        if stream is None:
            return over(self.learner.inner.examples)
        return StreamReleases(
            lambda number: over(stream.arriving(number), number),
            SecureNoise() if seed is None else SeededTestNoise(seed),
            ServerAnchor(self.ledger, self.state.record),
        )

    def _score(self, round_number: int) -> None:
        if round_number in self.in_run.scenario.rounds_to_score():
            evaluation, tokenizer = self.in_run.evaluation, self.shared.tokenizer
            with self.shared.with_adapter(self.learner.adapter) as model:
                scores = evaluation.score(model, tokenizer, self.entry.id)
            add_evaluation(self.state.directory, round_number, scores)

    def run(self) -> None:
        """Take part to the end, then write what a client process would write."""
        started = time.monotonic()
        self.member.session.run()
        # One after the other: the accountants remember what they computed, and most clients ask the same.
        with COMPUTE:
            facts = self.member.statement_inputs()
            found = statement(facts.model_copy(update={"transport": "in_process"}))
        write_atomically(self.state.directory / STATEMENT, found.model_dump_json(indent=2).encode())
        flops = self.in_run.flops
        cost = training_cost(self.in_run.scenario, flops[self.entry.id]) if flops else {}
        result = {
            **before_and_after(self.entry.id, self.state.directory),
            **cost,
            "seconds": time.monotonic() - started,
            "traffic": self.transport.traffic().as_dict(),
        }
        write_atomically(self.state.directory / RESULT, json.dumps(result, indent=2).encode())

    def close(self) -> None:
        """Let go of the state and the ledger."""
        self.ledger.close()
        self.state.release()


def _run_all(run: _Run, clients: Sequence[_Client]) -> None:
    """Run every session in a thread of its own; the first error stops all of them."""
    errors: dict[str, BaseException] = {}

    def stop() -> None:
        run.stopped.set()
        for client in clients:
            client.transport.wake()

    def take_part(client: _Client) -> None:
        try:
            client.run()
        except BaseException as error:
            if not run.stopped.is_set():
                errors[client.entry.id] = error
            stop()

    threads = [threading.Thread(target=take_part, args=(c,), name=c.entry.id, daemon=True) for c in clients]
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(_POLL_SECONDS)
    finally:
        # Also after an interrupt from the keyboard: let the one at work finish its step, then end all.
        stop()
        with COMPUTE:
            for client in clients:
                client.close()
    for name, error in errors.items():
        raise RunFailedError(f"client {name}: {error}") from error
