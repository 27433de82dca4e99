"""The rounds of a baseline: clients one after the other on shared models, then the server's combination.

Baselines have no privacy: what is shared leaves in the clear. Streams, batches, scores and files are those
of a FedMosaic run.
"""

import json
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from safetensors.numpy import load_file as load_vectors
from safetensors.numpy import save_file as save_vectors
from safetensors.torch import load_file, save_file

from fedmosaic.client.model.examples import (
    EncodedExample,
    encode_examples,
    padding_token,
    read_public_examples,
)
from fedmosaic.client.model.sampling import EpochSampler
from fedmosaic.client.transport.traffic import Traffic
from fedmosaic.experiments.methods.cost import baseline_flops, reference_flops
from fedmosaic.experiments.methods.lora import Vector, load_with_lora
from fedmosaic.experiments.methods.strategy import ServerSide, Strategy, Trainer
from fedmosaic.experiments.scenario.newcomers import adapt, add_newcomer, read_newcomers
from fedmosaic.experiments.scenario.participants import (
    Board,
    add_evaluation,
    as_result,
    client_seed,
    client_stream,
    newcomer_seed,
    read_evaluations,
    training_examples,
)
from fedmosaic.experiments.scenario.streams import InOrder, Stream
from fedmosaic.experiments.scenario.terms import Scenario, ScenarioClient
from fedmosaic.experiments.simulation.compute import client_examples, equal_steps, training_cost
from fedmosaic.experiments.simulation.hosts import ModelHost, Tenant
from fedmosaic.experiments.simulation.progress import RunProgress
from fedmosaic.experiments.simulation.sight import give_client_sight
from fedmosaic.privacy.files import write_atomically

_SERVER = "server.safetensors"


@dataclass
class _Member:
    """One client of a baseline."""

    entry: ScenarioClient
    host: ModelHost
    stream: Stream | None
    encoded: Mapping[str, EncodedExample]
    order: EpochSampler
    seed: int
    state: Path
    tenant: Tenant = field(default_factory=Tenant)
    traffic: Traffic = field(default_factory=Traffic)

    def data(self, round_number: int) -> tuple[list[EncodedExample], EpochSampler]:
        """What to train on in a round, and in which order."""
        if self.stream is None:
            return list(self.encoded.values()), self.order
        drawn = [self.encoded[example.id] for example in self.stream.training(round_number)]
        return drawn, InOrder(len(drawn), self.seed, round_number)


def run_baseline(strategy: Strategy, scenario: Scenario, directory: Path, console: Console) -> None:
    """Run a baseline to its end, or go on with it after the last complete round.

    Args:
        strategy: the method.
        scenario: paths resolved; adapter.rank is the rank of clients that name none.
        directory: the run's directory.
        console: where progress is shown.

    Raises:
        FedMosaicError: the scenario cannot be run.
    """
    started = time.monotonic()
    board = Board(scenario)
    members = _members(strategy, scenario, directory)
    flops = _measure(strategy, scenario, members)
    if scenario.equal_compute:
        # The streams and the progress depend on the number of steps.
        scenario = equal_steps(scenario, flops, reference_flops(scenario))
        members = _members(strategy, scenario, directory)
    first = _resume(directory, members, strategy) + 1
    steps = scenario.training.steps * strategy.passes
    with RunProgress(console, steps * scenario.schedule.rounds * len(members)) as progress:
        progress.skip((first - 1) * steps * len(members))
        _score_untrained(board, strategy, members)
        for number in range(first, scenario.schedule.rounds + 1):
            uploads: dict[str, Vector] = {}
            for member in members:
                upload = _take_part(strategy, scenario, board, member, number, progress)
                if upload is not None:
                    uploads[member.entry.id] = upload
            if strategy.shares:
                _share(strategy, scenario, members, uploads)
            _save(directory, number, members, strategy)
    for member in members:
        cost = training_cost(scenario, flops[member.entry.id])
        _write_result(strategy, member, time.monotonic() - started, cost)
    for number, entry in enumerate(scenario.unseen):
        _adapt_newcomer(strategy, scenario, board, members, directory, number, entry)


def _adapt_newcomer(
    strategy: Strategy,
    scenario: Scenario,
    board: Board,
    members: list[_Member],
    directory: Path,
    number: int,
    entry: ScenarioClient,
) -> None:
    """Let an unseen client begin with what the method gives it, unless an earlier process has done it."""
    if any(newcomer.id == entry.id for newcomer in read_newcomers(directory)):
        return
    rank = entry.rank or scenario.adapter.rank
    alike = [
        m
        for m in members
        if _architecture(m.entry) == _architecture(entry) and (m.entry.rank or scenario.adapter.rank) == rank
    ]
    host = alike[0].host if alike else _host(strategy, scenario, entry)
    received: dict[str, Vector] = {}
    for member in alike:
        with member.host.lent_to(member.tenant) as model:
            received[member.entry.id] = strategy.upload(model)
    given = strategy.newcomer(received, _architecture(entry))
    examples = [example for task in training_examples(entry) for example in task]
    encoded = encode_examples(host.tokenizer, examples, scenario.training.max_length)
    seed = newcomer_seed(scenario, number)
    order = EpochSampler(len(encoded), seed)
    with host.lent_to(Tenant()) as model:
        if given is not None:
            strategy.receive(model, given)

        def train(steps: int) -> None:
            settings = scenario.training.model_copy(update={"seed": seed, "steps": steps})
            strategy.train(Trainer(model, encoded, order, settings, padding_token(host.tokenizer)))

        def score() -> dict[str, float]:
            with strategy.scored(model) as scored:
                return board.score(scored, host.tokenizer, board.of_newcomer(entry.id))

        words = "a fresh adapter" if given is None else "the shared adapter of its architecture"
        add_newcomer(directory, adapt(scenario, entry.id, words, train, score))


def _host(strategy: Strategy, scenario: Scenario, client: ScenarioClient) -> ModelHost:
    rank = client.rank or scenario.adapter.rank
    seed = scenario.adapter.basis_seed + scenario.seed
    model, tokenizer = load_with_lora(
        client.model, scenario.adapter, strategy.adapters, rank, seed, alike=strategy.alike
    )
    return ModelHost(model, give_client_sight(scenario, client, model, tokenizer))


def _members(strategy: Strategy, scenario: Scenario, directory: Path) -> list[_Member]:
    hosts: dict[tuple[str, int], ModelHost] = {}
    members = []
    for index, client in enumerate(scenario.clients):
        rank = client.rank or scenario.adapter.rank
        key = (_architecture(client), rank)
        if key not in hosts:
            hosts[key] = _host(strategy, scenario, client)
        tasks = training_examples(client)
        examples = [example for task in tasks for example in task]
        encoded = encode_examples(hosts[key].tokenizer, examples, scenario.training.max_length)
        seed = client_seed(scenario, index)
        state = directory / "federation" / "clients" / client.id / "state"
        state.mkdir(parents=True, exist_ok=True)
        members.append(
            _Member(
                client,
                hosts[key],
                client_stream(scenario, index),
                {example.id: example for example in encoded},
                EpochSampler(len(encoded), seed),
                seed,
                state,
            )
        )
    return members


def _measure(strategy: Strategy, scenario: Scenario, members: list[_Member]) -> dict[str, float]:
    """Operations of a training step, by client; measured once per model in memory."""
    known: dict[int, float] = {}
    for member in members:
        if id(member.host) not in known:
            examples = client_examples(scenario, member.entry, member.host)
            known[id(member.host)] = baseline_flops(strategy, member.host, examples, scenario.training)
    return {member.entry.id: known[id(member.host)] for member in members}


def _architecture(client: ScenarioClient) -> str:
    """Clients with the same one can average their adapters."""
    return f"{client.model.model_dump_json()} {client.projector or ''}"


def _score_untrained(board: Board, strategy: Strategy, members: list[_Member]) -> None:
    cache: dict[tuple[int, str, int], float] = {}
    for member in members:
        if 0 in read_evaluations(member.state) or not board.chosen(member.entry.id):
            continue
        scores = {}
        for test in board.chosen(member.entry.id):
            place = (id(member.host), test.label, len(test.examples))
            if place not in cache:
                with member.host.lent_to(member.tenant) as model, strategy.scored(model) as scored:
                    cache |= {place: board.score(scored, member.host.tokenizer, [test])[test.label]}
            scores[test.label] = cache[place]
        add_evaluation(member.state, 0, scores)


def _take_part(
    strategy: Strategy,
    scenario: Scenario,
    board: Board,
    member: _Member,
    number: int,
    progress: RunProgress,
) -> Vector | None:
    """One client's round: train, score if due, and what it uploads."""
    examples, order = member.data(number)
    with member.host.lent_to(member.tenant) as model:
        strategy.train(
            Trainer(
                model,
                examples,
                order,
                scenario.training.model_copy(update={"seed": member.seed}),
                padding_token(member.host.tokenizer),
                lambda: progress.add(1, member.entry.id, number),
            )
        )
        if number in scenario.rounds_to_score():
            with strategy.scored(model) as scored:
                scores = board.score(scored, member.host.tokenizer, board.chosen(member.entry.id))
            add_evaluation(member.state, number, scores)
        if not strategy.shares:
            return None
        return strategy.upload(model)


def _share(
    strategy: Strategy, scenario: Scenario, members: list[_Member], uploads: Mapping[str, Vector]
) -> None:
    """Let the server do its part, and hand out what it gives."""
    public = read_public_examples(scenario.profile.public_data)
    servers: dict[str, ServerSide] = {}
    with ExitStack() as lent:
        for key in sorted({_architecture(member.entry) for member in members}):
            group = [member for member in members if _architecture(member.entry) == key]
            host = group[0].host
            servers[key] = ServerSide(
                lent.enter_context(host.lent_to(Tenant())),
                encode_examples(host.tokenizer, public, scenario.training.max_length),
                padding_token(host.tokenizer),
                scenario.training,
                {member.entry.id: member.entry.rank or scenario.adapter.rank for member in group},
                key,
                host.tokenizer,
                public,
            )
        exchanged = strategy.exchange(uploads, servers)
    for member in members:
        name = member.entry.id
        member.traffic.sent("adapter", exchanged.sent[name])
        member.traffic.received("adapter", exchanged.got[name])
        with member.host.lent_to(member.tenant) as model:
            strategy.receive(model, exchanged.received[name])


def _place(directory: Path, number: int) -> Path:
    return directory / "baseline" / f"round-{number:04d}"


def _save(directory: Path, number: int, members: list[_Member], strategy: Strategy) -> None:
    """Everything that the next round starts from, in a directory renamed into place."""
    temporary = _place(directory, number).with_name("saving")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for member in members:
        with member.host.lent_to(member.tenant) as model:
            tensors = {
                name: parameter.detach().clone().contiguous()
                for name, parameter in model.named_parameters()
                if "lora_" in name
            }
        save_file(tensors, temporary / f"{member.entry.id}.safetensors")
    state = {m.entry.id: {"order": m.order.state_dict(), "traffic": m.traffic.as_dict()} for m in members}
    (temporary / "members.json").write_text(json.dumps(state))
    save_vectors(strategy.server_state, temporary / _SERVER)
    temporary.rename(_place(directory, number))
    for old in (directory / "baseline").glob("round-*"):
        if old != _place(directory, number):
            shutil.rmtree(old)


@torch.no_grad()
def _resume(directory: Path, members: list[_Member], strategy: Strategy) -> int:
    """Load the last complete round; returns its number, 0 if there is none."""
    found = sorted((directory / "baseline").glob("round-*"))
    if not found:
        return 0
    place = found[-1]
    state = json.loads((place / "members.json").read_text())
    for member in members:
        name = member.entry.id
        member.tenant.tensors = load_file(place / f"{name}.safetensors")
        member.order.load_state_dict(state[name]["order"])
        sums = state[name]["traffic"]["adapter"]
        member.traffic.sent("adapter", sums["sent"])
        member.traffic.received("adapter", sums["received"])
    strategy.server_state.update(load_vectors(place / _SERVER))
    return int(place.name.removeprefix("round-"))


def _write_result(strategy: Strategy, member: _Member, seconds: float, cost: Mapping[str, float]) -> None:
    evaluations = read_evaluations(member.state)
    scores = (
        {
            "before": as_result(member.entry.id, evaluations[0]),
            "after": as_result(member.entry.id, evaluations[max(evaluations)]),
        }
        if evaluations
        else {}
    )
    result = {**scores, **cost} | {
        "seconds": seconds,
        "traffic": member.traffic.as_dict(),
        # What is shared leaves in the clear, and what is not shared does not leave at all.
        "epsilon": "inf" if strategy.shares else "0",
    }
    write_atomically(member.state / "result.json", json.dumps(result, indent=2).encode())
