"""The rounds of a baseline: clients one after the other on shared models, then the server's combination.

Baselines have no privacy. Streams, batches, scores and files are those of a FedMosaic run.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from rich.console import Console
from safetensors.numpy import load_file as load_vectors
from safetensors.numpy import save_file as save_vectors
from safetensors.torch import load_file, save_file

from fedmosaic.client.client import RESULT
from fedmosaic.client.model.examples import EncodedExample, encode_examples, read_public_examples
from fedmosaic.client.model.training import EpochSampler, TrainingSettings
from fedmosaic.client.transport.grpc import Traffic
from fedmosaic.experiments.methods.local import LocalOnly
from fedmosaic.experiments.methods.lora import Vector, load_with_lora
from fedmosaic.experiments.methods.strategy import ServerSide, Strategy, Trainer, check_uploads
from fedmosaic.experiments.scenario import participants
from fedmosaic.experiments.scenario.streams import InOrder
from fedmosaic.experiments.scenario.terms import Scenario, ScenarioClient
from fedmosaic.experiments.simulation.compute import equal_steps, step_flops, training_cost
from fedmosaic.experiments.simulation.models import AdapterState, SharedModel, shared_model
from fedmosaic.experiments.simulation.progress import RunProgress
from fedmosaic.privacy.files import write_atomically

_SERVER, _MEMBERS = "server.safetensors", "members.json"


class _Member:
    """One client: its part of a shared model, its examples, and what it remembers from round to round."""

    def __init__(
        self,
        scenario: Scenario,
        models: Mapping[tuple[str, int], SharedModel],
        directory: Path,
        index: int,
    ) -> None:
        self.entry, seed = scenario.clients[index], participants.client_seed(scenario, index)
        self.shared = models[_key(scenario, self.entry)]
        examples = participants.training_examples(self.entry)
        encoded = encode_examples(self.shared.tokenizer, examples, scenario.training.max_length)
        self.encoded = {example.id: example for example in encoded}
        self.stream = participants.client_stream(scenario, index)
        self.order = EpochSampler(len(encoded), seed)
        self.settings = scenario.training.model_copy(update={"seed": seed})
        self.state = directory / "federation" / "clients" / self.entry.id / "state"
        self.state.mkdir(parents=True, exist_ok=True)
        self.adapter, self.traffic = AdapterState(), Traffic()

    def data(self, round_number: int) -> tuple[list[EncodedExample], EpochSampler]:
        """What to train on in a round, and in which order."""
        if self.stream is None:
            return list(self.encoded.values()), self.order
        drawn = [self.encoded[example.id] for example in self.stream.training(round_number)]
        return drawn, InOrder(len(drawn), self.settings.seed, round_number)


def run_baseline(strategy: Strategy, scenario: Scenario, directory: Path, console: Console) -> None:
    """Run a baseline to its end, or go on with it after the last complete round in the run's directory."""
    started = time.monotonic()
    evaluation = participants.Evaluation(scenario)
    models = _models(strategy, scenario)
    flops = _measure(strategy, scenario, models)
    # The streams and the progress depend on the number of steps.
    scenario = equal_steps(scenario, flops, reference_flops(scenario))
    members = [_Member(scenario, models, directory, index) for index in range(len(scenario.clients))]
    first = _resume(directory, members, strategy) + 1
    steps = scenario.training.steps * strategy.passes * len(members)
    progress = RunProgress(console, steps * scenario.schedule.rounds)
    with progress.bar:
        progress.skip((first - 1) * steps)
        for member in members:
            with member.shared.with_adapter(member.adapter) as model, strategy.scored(model) as scored:
                score = partial(evaluation.score_set, scored, member.shared.tokenizer)
                evaluation.score_untrained(member.entry.id, member.state, id(member.shared), score)
        for number in range(first, scenario.schedule.rounds + 1):
            uploads: dict[str, Vector] = {}
            for member in members:
                name, (examples, order) = member.entry.id, member.data(number)
                done = partial(progress.add, 1, name, number)
                with member.shared.with_adapter(member.adapter) as model:
                    pad = member.shared.pad_token_id
                    settings = member.settings.of_round(number, scenario.schedule.rounds)
                    strategy.train(Trainer(model, examples, order, settings, pad, done))
                    if number in scenario.rounds_to_score():
                        with strategy.scored(model) as scored:
                            scores = evaluation.score(scored, member.shared.tokenizer, name)
                        participants.add_evaluation(member.state, number, scores)
                    if strategy.shares:
                        uploads[name] = strategy.upload(model)
            if strategy.shares:
                _share(strategy, scenario, members, uploads)
            _save(directory, number, members, strategy)
    for member in members:
        cost = training_cost(scenario, flops[member.entry.id])
        _write_result(strategy, member, time.monotonic() - started, cost)


def reference_flops(scenario: Scenario) -> dict[str, float]:
    """Operations of a step of plain LoRA by client; empty unless the scenario asks for equal compute."""
    if not scenario.equal_compute:
        return {}
    return _measure(LocalOnly(), scenario, _models(LocalOnly(), scenario))


def _key(scenario: Scenario, client: ScenarioClient) -> tuple[str, int]:
    """Clients with the same one share a model; those of one architecture can average their adapters."""
    return client.architecture, client.rank or scenario.adapter.rank


def _models(strategy: Strategy, scenario: Scenario) -> dict[tuple[str, int], SharedModel]:
    models: dict[tuple[str, int], SharedModel] = {}
    for client in scenario.clients:
        key = _key(scenario, client)
        if key not in models:
            seed = scenario.adapter.basis_seed + scenario.seed
            loaded = load_with_lora(
                client.model, scenario.adapter, strategy.adapters, key[1], seed, alike=strategy.alike
            )
            models[key] = shared_model(scenario, client, *loaded)
    return models


def _by_itself(
    strategy: Strategy,
    _client: ScenarioClient,
    shared: SharedModel,
    examples: Sequence[EncodedExample],
    order: EpochSampler,
    few: TrainingSettings,
) -> None:
    strategy.train(Trainer(shared.model, examples, order, few, shared.pad_token_id))


def _measure(
    strategy: Strategy, scenario: Scenario, models: Mapping[tuple[str, int], SharedModel]
) -> dict[str, float]:
    """Operations of a training step, by client."""
    return step_flops(scenario, models, partial(_key, scenario), partial(_by_itself, strategy))


def _share(
    strategy: Strategy, scenario: Scenario, members: Sequence[_Member], uploads: Mapping[str, Vector]
) -> None:
    """Let the server do its part, and hand out what it gives."""
    check_uploads(uploads)
    public = read_public_examples(scenario.profile.public_data)
    servers: dict[str, ServerSide] = {}
    with ExitStack() as lent:
        for architecture in sorted({member.entry.architecture for member in members}):
            group = [member for member in members if member.entry.architecture == architecture]
            shared = group[0].shared
            servers[architecture] = ServerSide(
                lent.enter_context(shared.with_adapter(AdapterState())),
                encode_examples(shared.tokenizer, public, scenario.training.max_length),
                shared.pad_token_id,
                scenario.training,
                {member.entry.id: _key(scenario, member.entry)[1] for member in group},
                architecture,
                shared.tokenizer,
                public,
            )
        exchanged = strategy.exchange(uploads, servers)
    for member in members:
        name = member.entry.id
        member.traffic.sent("adapter", exchanged.sent[name])
        member.traffic.received("adapter", exchanged.got[name])
        with member.shared.with_adapter(member.adapter) as model:
            strategy.receive(model, exchanged.received[name])


def _save(directory: Path, number: int, members: Sequence[_Member], strategy: Strategy) -> None:
    """Everything that the next round starts from, in a directory renamed into place."""
    temporary, place = (directory / "baseline" / name for name in ("saving", f"round-{number:04d}"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for member in members:
        save_file(member.shared.read(member.adapter), temporary / f"{member.entry.id}.safetensors")
    state = {m.entry.id: {"order": m.order.state_dict(), "traffic": m.traffic.as_dict()} for m in members}
    (temporary / _MEMBERS).write_text(json.dumps(state))
    save_vectors(strategy.server_state, temporary / _SERVER)
    temporary.rename(place)
    for old in place.parent.glob("round-*"):
        if old != place:
            shutil.rmtree(old)


def _resume(directory: Path, members: Sequence[_Member], strategy: Strategy) -> int:
    """Load the last complete round; returns its number, 0 if there is none."""
    found = sorted((directory / "baseline").glob("round-*"))
    if not found:
        return 0
    place = found[-1]
    state = json.loads((place / _MEMBERS).read_text())
    for member in members:
        name = member.entry.id
        member.adapter.tensors = load_file(place / f"{name}.safetensors")
        member.order.load_state_dict(state[name]["order"])
        sums = state[name]["traffic"]["adapter"]
        member.traffic.sent("adapter", sums["sent"])
        member.traffic.received("adapter", sums["received"])
    strategy.server_state.update(load_vectors(place / _SERVER))
    return int(place.name.removeprefix("round-"))


def _write_result(strategy: Strategy, member: _Member, seconds: float, cost: Mapping[str, float]) -> None:
    result = {
        **participants.before_and_after(member.entry.id, member.state),
        **cost,
        "seconds": seconds,
        "traffic": member.traffic.as_dict(),
        # What is shared leaves in the clear, and what is not shared does not leave at all.
        "epsilon": "inf" if strategy.shares else "0",
    }
    write_atomically(member.state / RESULT, json.dumps(result, indent=2).encode())
