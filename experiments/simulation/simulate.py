"""A federation in one process: real sessions, server and privacy, a thread per client, one model at work.

Clients of one architecture take turns on one model in memory. What the run leaves behind has the form of a
run with processes, so that `fedmosaic report` reads both. Deadlines are lifted: nobody is late here.
"""

import json
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from rich.console import Console

from fedmosaic.client.client import RESULT, Participant
from fedmosaic.client.colora import family_layout, fix_gate
from fedmosaic.client.ledger import ServerAnchor, open_ledger
from fedmosaic.client.model.adapted import load_adapted
from fedmosaic.client.planning import budgeted_channels, plan_adapter
from fedmosaic.client.releases import Releases
from fedmosaic.client.settings import ClientSettings, DataSettings
from fedmosaic.client.state import ClientState
from fedmosaic.client.statement import STATEMENT
from fedmosaic.experiments.scenario.founding import agreed_adapter, fit_profile, found_federation
from fedmosaic.experiments.scenario.participants import (
    Board,
    add_evaluation,
    as_result,
    client_seed,
    client_stream,
    read_evaluations,
    training_examples,
    write_training_file,
)
from fedmosaic.experiments.scenario.processes import RunFailedError
from fedmosaic.experiments.scenario.terms import Scenario, ScenarioClient
from fedmosaic.experiments.simulation.client import StreamLearner, StreamReleases, TurnTakingLearner
from fedmosaic.experiments.simulation.compute import client_examples, colora_flops, equal_steps, training_cost
from fedmosaic.experiments.simulation.hosts import COMPUTE, ModelHost
from fedmosaic.experiments.simulation.newcomers_colora import Federation, adapt_newcomers
from fedmosaic.experiments.simulation.probe import SharedProbe
from fedmosaic.experiments.simulation.progress import ClientProgress, RunProgress
from fedmosaic.experiments.simulation.sight import give_client_sight
from fedmosaic.experiments.simulation.transport import InProcessTransport
from fedmosaic.privacy.federation.kits import open_kit
from fedmosaic.privacy.federation.roster import AdapterTerms
from fedmosaic.privacy.files import write_atomically
from fedmosaic.privacy.mechanism.noise import SecureNoise, SeededTestNoise
from fedmosaic.privacy.statement.build import statement
from fedmosaic.protos.errors import ConfigurationError
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.settings import settings_from_kit

log = logging.getLogger(__name__)

TRAIN = "train.jsonl"
_NO_DEADLINE_SECONDS = 1e8
_POLL_SECONDS = 0.2
_TICK_SECONDS = 60.0

Architecture = tuple[str, str]


@dataclass(frozen=True)
class _Parts:
    """What all clients of the process use."""

    scenario: Scenario
    directory: Path
    hosts: Mapping[Architecture, ModelHost]
    board: Board
    coordinator: Coordinator
    probe: SharedProbe
    stopped: threading.Event
    progress: RunProgress
    flops: Mapping[str, float]
    """Of a training step, by client; empty where training is private."""


def simulate(
    scenario: Scenario, directory: Path, console: Console, reference: Mapping[str, float] | None = None
) -> None:
    """Run a scenario to its end, or go on with it where an earlier process stopped.

    Args:
        scenario: paths resolved.
        directory: the run's directory; what is there already is kept and gone on with.
        console: where progress is shown.
        reference: operations of a step of the method that this one is to cost as much as, by client; none
            to leave the steps as they are.

    Raises:
        RunFailedError: a client failed; the message names it.
        FedMosaicError: the scenario cannot be run.
    """
    board = Board(scenario)
    hosts, adapter = make_hosts(scenario)
    flops = {} if adapter.private else _measure(scenario, hosts, adapter)
    scenario = equal_steps(scenario, flops, reference or {})
    mechanism = fit_profile(scenario, directory, console, own_process=False)
    place = directory / "federation"
    if not (place / "roster.json").exists():
        found_federation(scenario, mechanism, directory, 7443, adapter)
    settings = settings_from_kit(place / "server").model_copy(
        update={
            "durable": False,
            "round_deadline_seconds": _NO_DEADLINE_SECONDS,
            "gathering_seconds": _NO_DEADLINE_SECONDS,
        }
    )
    kit = open_kit(place / "clients" / scenario.clients[0].id)
    probe = SharedProbe(scenario.probe, mechanism, kit.basis, scenario.profile.max_length)
    steps = scenario.training.steps * scenario.schedule.rounds * len(scenario.clients)
    if adapter.private:
        steps += scenario.adapter_privacy.steps_per_round * scenario.schedule.rounds * len(scenario.clients)
    coordinator = Coordinator(settings)
    try:
        with RunProgress(console, steps) as progress:
            parts = _Parts(
                scenario, directory, hosts, board, coordinator, probe, threading.Event(), progress, flops
            )
            clients = [_Client(parts, index) for index in range(len(scenario.clients))]
            _score_untrained(parts, clients)
            _run_all(parts, clients)
    finally:
        coordinator.close()
    federation = Federation(
        scenario, directory, kit.roster.terms, settings, probe, board,
        {client.entry.id: client.learner.sections()["shared"] for client in clients},
    )  # fmt: skip
    adapt_newcomers(federation, {entry.id: hosts[architecture(entry)] for entry in scenario.unseen})


def make_hosts(scenario: Scenario) -> tuple[dict[Architecture, ModelHost], AdapterTerms]:
    """One model per architecture, and the adapter's terms with the families' dimensions filled in."""
    agreed = agreed_adapter(scenario)
    terms = agreed.model_copy(update={"basis_seed": agreed.basis_seed + scenario.seed})
    hosts: dict[Architecture, ModelHost] = {}
    dimensions = dict(terms.family_dimensions)
    for client in (*scenario.clients, *scenario.unseen):
        if architecture(client) in hosts:
            continue
        model, tokenizer = load_adapted(client.model, terms)
        tokenizer = give_client_sight(scenario, client, model, tokenizer)
        if scenario.fixed_gate is not None:
            fix_gate(model, scenario.fixed_gate)
        if scenario.family_sharing and client.family and family_layout(model).size:
            size = family_layout(model).size
            if dimensions.setdefault(client.family, size) != size:
                raise ConfigurationError(
                    f"client {client.id}: family {client.family!r} shares {dimensions[client.family]} "
                    f"values of its other layers, this model has {size}; a family has one model and one rank"
                )
        hosts[architecture(client)] = ModelHost(model, tokenizer)
    return hosts, terms.model_copy(update={"family_dimensions": dimensions})


def _measure(
    scenario: Scenario, hosts: Mapping[Architecture, ModelHost], adapter: AdapterTerms
) -> dict[str, float]:
    """Operations of a training step, by client; measured once per architecture."""
    known: dict[Architecture, float] = {}
    for client in scenario.clients:
        key = architecture(client)
        if key not in known:
            known[key] = colora_flops(
                hosts[key],
                client_examples(scenario, client, hosts[key]),
                scenario.training,
                own_family_layers=adapter.other_layers == "lora"
                and client.family not in adapter.family_dimensions,
            )
    return {client.id: known[architecture(client)] for client in scenario.clients}


def architecture(client: ScenarioClient) -> Architecture:
    """Clients with the same one share a model in memory."""
    return f"{client.model.model_dump_json()} {client.projector or ''}", client.family


def _score_untrained(parts: _Parts, clients: list["_Client"]) -> None:
    """Score round 0 once per architecture and test set: every client starts from the same adapter."""
    cache: dict[tuple[Architecture, str, int], float] = {}
    for client in clients:
        if 0 in read_evaluations(client.state.directory):
            continue
        key = architecture(client.entry)
        scores: dict[str, float] = {}
        if parts.scenario.score == "nothing":
            continue
        for test in parts.board.chosen(client.entry.id):
            place = (key, test.label, len(test.examples))
            if place not in cache:
                with parts.hosts[key].lent_to(client.learner.tenant) as model:
                    cache |= {place: parts.board.score(model, parts.hosts[key].tokenizer, [test])[test.label]}
            scores[test.label] = cache[place]
        add_evaluation(client.state.directory, 0, scores)


class _Client:
    """One client: everything a client process would have, on shared models."""

    def __init__(self, parts: _Parts, index: int) -> None:
        scenario = parts.scenario
        self.parts, self.entry = parts, scenario.clients[index]
        self.kit = open_kit(parts.directory / "federation" / "clients" / self.entry.id)
        terms = self.kit.roster.terms
        self.state = ClientState(self.kit.directory / "state", self.kit.roster.federation, self.entry.id)
        self.host = parts.hosts[architecture(self.entry)]
        self.stream = client_stream(scenario, index)
        progress = ClientProgress(parts.progress, self.entry.id, parts.stopped)
        parts.progress.skip(self.state.record.completed_round * scenario.training.steps)
        settings = self._settings(index)
        self.learner = TurnTakingLearner(
            lambda: StreamLearner(settings, terms, self.entry.family, progress, self.host, self.stream),
            self.host,
            self._score,
            discard=scenario.discard_received,
        )
        count, target = self.learner.inner.example_count, terms.adapter_privacy.target_epsilon
        self.ledger = open_ledger(
            self.state.ledger_path, self.entry.id, count, target, budgeted_channels(terms)
        )
        self.plan = plan_adapter(terms, count, self.ledger.parameters.delta, target)
        self.transport = InProcessTransport(
            parts.coordinator, self.entry.id, _NO_DEADLINE_SECONDS, parts.stopped, _TICK_SECONDS
        )
        self.member = Participant(
            self.kit, self.transport, self.learner, self.state, self.ledger, self.plan, self._releases(),
            progress,
        )  # fmt: skip

    def _settings(self, index: int) -> ClientSettings:
        scenario = self.parts.scenario
        tasks = training_examples(self.entry)
        train = write_training_file(self.kit.directory / TRAIN, tasks)
        return ClientSettings(
            kit=self.kit.directory,
            server="localhost:7443",
            state_dir=self.state.directory,
            model=self.entry.model,
            probe=scenario.probe,
            data=DataSettings(train=train),
            training=scenario.training.model_copy(update={"seed": client_seed(scenario, index)}),
        )

    def _releases(self) -> Releases:
        scenario, terms = self.parts.scenario, self.kit.roster.terms
        seed = scenario.unsafe_test_noise_seed
        index = [client.id for client in scenario.clients].index(self.entry.id)

        def over(round_number: int) -> Releases:
            examples = self.learner.inner.examples
            if self.stream is not None:
                examples = self.stream.arriving(round_number)
            # A seeded stream of noise must be a new one in every round, also after a restart.
            randomness = (
                SecureNoise() if seed is None else SeededTestNoise(seed + 1_000_003 * round_number + index)
            )
            make = self.parts.probe.of(examples, randomness)
            ids = tuple(example.id for example in examples)
            return Releases(
                self.ledger,
                terms,
                self.state,
                ids,
                make,
                randomness,
                self.plan,
                disjoint_epochs=self.stream is not None,
            )

        if self.stream is None:
            return over(0)
        return StreamReleases(
            over,
            SecureNoise() if seed is None else SeededTestNoise(seed),
            ServerAnchor(self.ledger, self.state.record),
        )

    def _score(self, round_number: int) -> None:
        if round_number in self.parts.scenario.rounds_to_score():
            with self.host.lent_to(self.learner.tenant) as model:
                scores = self._scores(model)
            add_evaluation(self.state.directory, round_number, scores)

    def _scores(self, model: PeftModel) -> dict[str, float]:
        board = self.parts.board
        return board.score(model, self.host.tokenizer, board.chosen(self.entry.id))

    def run(self) -> None:
        """Take part to the end, then write what a client process would write."""
        started = time.monotonic()
        self.member.session.run()
        evaluations = read_evaluations(self.state.directory)
        # One after the other: the accountants remember what they computed, and most clients ask the same.
        with COMPUTE:
            facts = self.member.statement_inputs()
            found = statement(facts.model_copy(update={"transport": "in_process"}))
        write_atomically(self.state.directory / STATEMENT, found.model_dump_json(indent=2).encode())
        scores = (
            {
                "before": as_result(self.entry.id, evaluations[0]),
                "after": as_result(self.entry.id, evaluations[max(evaluations)]),
            }
            if evaluations
            else {}
        )
        training = scores | (
            training_cost(self.parts.scenario, self.parts.flops[self.entry.id]) if self.parts.flops else {}
        )
        result = training | {
            "seconds": time.monotonic() - started,
            "traffic": self.transport.traffic().as_dict(),
        }
        write_atomically(self.state.directory / RESULT, json.dumps(result, indent=2).encode())

    def close(self) -> None:
        """Let go of the state and the ledger."""
        self.ledger.close()
        self.state.release()


def _run_all(parts: _Parts, clients: list[_Client]) -> None:
    """Run every session in a thread of its own; the first error stops all of them."""
    errors: dict[str, BaseException] = {}

    def stop() -> None:
        parts.stopped.set()
        for client in clients:
            client.transport.wake()

    def run(client: _Client) -> None:
        try:
            client.run()
        except BaseException as error:
            if not parts.stopped.is_set():
                errors[client.entry.id] = error
            stop()

    threads = [threading.Thread(target=run, args=(c,), name=c.entry.id, daemon=True) for c in clients]
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
