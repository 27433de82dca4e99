"""The clients of a federation on the models of one process, each built for its turn from what is on disk.

A turn is a client's part in the open round: its session goes on from its state directory, as after a restart,
until the next round would have to be waited for. So memory does not grow with the number of clients.
"""

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from fedmosaic.client.client import RESULT, Participant
from fedmosaic.client.data.records import unit_ids
from fedmosaic.client.ledger import ServerAnchor, open_ledger
from fedmosaic.client.model.examples import Example
from fedmosaic.client.planning import plan_adapter
from fedmosaic.client.round.releases import Releases
from fedmosaic.client.settings import ClientSettings, DataSettings
from fedmosaic.client.state import ClientState
from fedmosaic.client.statement import STATEMENT
from fedmosaic.client.transport.grpc import Traffic
from fedmosaic.experiments.scenario import participants
from fedmosaic.experiments.scenario.terms import Scenario, ScenarioClient
from fedmosaic.experiments.simulation.client import SharedProbe, StreamLearner, StreamReleases
from fedmosaic.experiments.simulation.compute import training_cost
from fedmosaic.experiments.simulation.models import COMPUTE, AdapterState, SharedModel
from fedmosaic.experiments.simulation.progress import ClientProgress, RunProgress
from fedmosaic.experiments.simulation.transport import InProcessTransport, TurnOverError
from fedmosaic.privacy.federation.kits import BASIS, Kit, open_kit
from fedmosaic.privacy.files import write_atomically
from fedmosaic.privacy.mechanism.noise import SecureNoise, SeededTestNoise
from fedmosaic.privacy.statement.build import statement
from fedmosaic.server.coordinator import Coordinator

TRAIN: Final = "train.jsonl"
TRAFFIC: Final = "traffic.json"
Architecture = tuple[str, str]
_OPEN: Final = 64
"""Clients that are kept as they are between their turns; the others are built anew."""


def architecture(client: ScenarioClient) -> Architecture:
    """Clients with the same one share a model in memory."""
    return client.architecture, client.family


def state_of(directory: Path, client: str) -> Path:
    """A simulated client's state directory, in the run's."""
    return directory / "federation" / "clients" / client / "state"


class Worker:
    """Takes turns for clients whose models it has; several threads may ask."""

    def __init__(
        self,
        scenario: Scenario,
        directory: Path,
        models: Mapping[Architecture, SharedModel],
        evaluation: participants.Evaluation,
        coordinator: Coordinator,
        progress: RunProgress,
        flops: Mapping[str, float],
        tick_seconds: float = 60.0,
    ) -> None:
        """Load the probe.

        Models are by architecture; `flops` are operations of a step by client, none where training is
        private. A client that waits for the others within a round looks every `tick_seconds`.
        """
        self.tick_seconds = tick_seconds
        self.scenario, self.directory, self.models = scenario, directory, models
        self.evaluation, self.coordinator = evaluation, coordinator
        self.progress, self.flops = progress, flops
        # Every kit has the same roster, which is read and verified once.
        self.roster = open_kit(self._place(scenario.clients[0])).roster
        terms, basis = self.roster.terms, self._place(scenario.clients[0]) / BASIS
        self.probe = SharedProbe(scenario.probe, terms.profile, basis, scenario.profile.max_length)
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, _Client] = OrderedDict()
        self._at_work: set[_Client] = set()
        self._seconds: dict[int, float] = {}

    def _place(self, entry: ScenarioClient) -> Path:
        return self.directory / "federation" / "clients" / entry.id

    def turn(self, index: int, number: int) -> None:
        """One client's part in the rounds up to `number`; `index` is its place in the scenario."""
        began = time.monotonic() - self._seconds.get(index, 0.0)
        client, over = self._taken(index), True
        try:
            client.transport.last_round = number
            over = client.turn(began)
        finally:
            self._put_back(client, keep=not over)
            self._seconds[index] = time.monotonic() - began

    def _taken(self, index: int) -> "_Client":
        with self._lock:
            client = self._kept.pop(index, None)
        if client is None:
            client = _Client(self, index, self._place(self.scenario.clients[index]))
        with self._lock:
            self._at_work.add(client)
        return client

    def _put_back(self, client: "_Client", *, keep: bool) -> None:
        with self._lock:
            self._at_work.discard(client)
            if keep:
                self._kept[client.index] = client
            old = [self._kept.popitem(last=False)[1] for _ in range(len(self._kept) - _OPEN)]
        for one in old if keep else (*old, client):
            one.close()

    def stop(self) -> None:
        """End every turn at its next step."""
        self.stopped.set()
        with self._lock:
            at_work = tuple(self._at_work)
        for client in at_work:
            client.transport.wake()

    def close(self) -> None:
        """Let go of the clients' states and ledgers; no turn is at work any more."""
        while self._kept:
            self._kept.popitem()[1].close()


class _Client:
    """One client: everything a client process would have, on shared models."""

    def __init__(self, worker: Worker, index: int, place: Path) -> None:
        scenario = worker.scenario
        self.worker, self.index, self.entry = worker, index, scenario.clients[index]
        self.kit, self.terms = Kit(place, worker.roster), worker.roster.terms
        self.state = ClientState(place / "state", worker.roster.federation, self.entry.id)
        self.shared = worker.models[architecture(self.entry)]
        self.stream = participants.client_stream(scenario, index)
        self._score_untrained()
        progress = ClientProgress(worker.progress, self.entry.id, worker.stopped)
        self.learner = StreamLearner(
            self._settings(),
            self.terms,
            self.entry.family,
            progress,
            self.shared,
            self.stream,
            self._score,
            discard=scenario.discard_received,
        )
        count, target = self.learner.example_count, self.terms.adapter_privacy.target_epsilon
        self.ledger = open_ledger(self.state.ledger_path, self.entry.id, self.terms, count, target)
        # One after the other: the accountants remember what they computed, and most clients ask the same.
        with COMPUTE:
            steps = worker.roster.private_steps
            self.plan = plan_adapter(self.terms, count, self.ledger.parameters.delta, target, steps)
        self.transport = InProcessTransport(
            worker.coordinator,
            self.entry.id,
            patience_seconds=0.0,
            stopped=worker.stopped,
            tick_seconds=worker.tick_seconds,
            traffic=Traffic(self.state.directory / TRAFFIC),
        )
        releases = self._releases()
        self.member = Participant(
            self.kit, self.transport, self.learner, self.state, self.ledger, self.plan, releases, progress
        )

    def _settings(self) -> ClientSettings:
        scenario, train = self.worker.scenario, self.kit.directory / TRAIN
        if not train.exists():
            participants.write_examples(train, participants.training_examples(self.entry))
        return ClientSettings(
            kit=self.kit.directory,
            server="localhost:7443",
            state_dir=self.state.directory,
            model=self.entry.model,
            probe=scenario.probe,
            data=DataSettings(train=train),
            training=scenario.training.model_copy(
                update={"seed": participants.client_seed(scenario, self.index)}
            ),
        )

    def _releases(self) -> Releases:
        seed = self.worker.scenario.unsafe_test_noise_seed
        completed = self.state.record.completed_round

        def over(examples: Sequence[Example], round_number: int = completed) -> Releases:
            # A seeded stream of noise must be a new one in every round, also after a restart.
            number = None if seed is None else seed + 1_000_003 * round_number + self.index
            randomness = SecureNoise() if number is None else SeededTestNoise(number)
            make = self.worker.probe.of(examples, randomness, self.terms.unit)
            ids = unit_ids(examples, self.terms.unit)
            ledger, terms, state, plan = self.ledger, self.terms, self.state, self.plan
            disjoint = self.stream is not None
            return Releases(ledger, terms, state, ids, make, randomness, plan, disjoint_epochs=disjoint)

        stream = self.stream
        if stream is None:
            return over(self.learner.examples)
        return StreamReleases(
            lambda number: over(stream.arriving(number), number),
            SecureNoise() if seed is None else SeededTestNoise(seed),
            ServerAnchor(self.ledger, self.state.record),
        )

    def _score_untrained(self) -> None:
        def score(test: participants.TestSet) -> float:
            with self.shared.with_adapter(AdapterState()) as model:
                return self.worker.evaluation.score_set(model, self.shared.tokenizer, test)

        alike, state = architecture(self.entry), self.state.directory
        self.worker.evaluation.score_untrained(self.entry.id, state, alike, score)

    def _score(self, round_number: int) -> None:
        if round_number in self.worker.scenario.rounds_to_score():
            evaluation, tokenizer = self.worker.evaluation, self.shared.tokenizer
            with self.shared.with_adapter(self.learner.adapter) as model:
                scores = evaluation.score(model, tokenizer, self.entry.id)
            participants.add_evaluation(self.state.directory, round_number, scores)

    def turn(self, began: float) -> bool:
        """Go on until the next round is waited for; whether the client's part in the run is over.

        At its end it writes what a client process would. `began` are monotonic seconds at which the turn
        would have begun, had the client's turns been one.
        """
        try:
            self.member.session.run()
        except TurnOverError:
            return False
        finally:
            self.transport.traffic().save()
        with COMPUTE:
            facts = self.member.statement_inputs()
            found = statement(facts.model_copy(update={"transport": "in_process"}))
        write_atomically(self.state.directory / STATEMENT, found.model_dump_json(indent=2).encode())
        flops = self.worker.flops
        cost = training_cost(self.worker.scenario, flops[self.entry.id]) if flops else {}
        result = {
            **participants.before_and_after(self.entry.id, self.state.directory),
            **cost,
            "seconds": time.monotonic() - began,
            "traffic": self.transport.traffic().as_dict(),
        }
        write_atomically(self.state.directory / RESULT, json.dumps(result, indent=2).encode())
        return True

    def close(self) -> None:
        """Let go of the state and the ledger."""
        self.transport.close()
        self.ledger.close()
        self.state.release()
