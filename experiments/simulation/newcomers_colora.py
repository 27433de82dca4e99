"""FedMosaic's newcomers: a task profile, its weights, and an adapter that begins with their sum."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedmosaic.client.colora import copy_branch, set_active_branches, set_trainable
from fedmosaic.client.colora.aligned import write_embedded
from fedmosaic.client.ledger import open_ledger
from fedmosaic.client.model.examples import encode_examples, padding_token
from fedmosaic.client.model.sampling import EpochSampler
from fedmosaic.client.model.training import train_local
from fedmosaic.client.planning import AdapterPlan, budgeted_channels, sampling_rate
from fedmosaic.client.releases import Releases
from fedmosaic.client.state import ClientState
from fedmosaic.experiments.scenario.newcomers import Newcomer, adapt, add_newcomer, read_newcomers
from fedmosaic.experiments.scenario.participants import Board, newcomer_seed, training_examples
from fedmosaic.experiments.scenario.terms import Scenario, ScenarioClient
from fedmosaic.experiments.simulation.hosts import ModelHost, Tenant
from fedmosaic.experiments.simulation.probe import SharedProbe
from fedmosaic.privacy.federation.roster import Terms
from fedmosaic.privacy.mechanism.noise import SecureNoise, SeededTestNoise
from fedmosaic.protos.messages import Profile
from fedmosaic.server.round.relevance import relevance
from fedmosaic.server.round.weights import Group, plan
from fedmosaic.server.settings import ServerSettings
from fedmosaic.server.storage.store import Store, default_url


@dataclass(frozen=True)
class Federation:
    """What a finished federation has for a newcomer.

    Attributes:
        scenario: with newcomers.
        directory: of the run.
        terms: of the roster.
        settings: of the server, whose store holds the members' profiles.
        probe: reads the newcomer's examples.
        board: scores.
        shared: what each member shares, float32 (d,).
    """

    scenario: Scenario
    directory: Path
    terms: Terms
    settings: ServerSettings
    probe: SharedProbe
    board: Board
    shared: Mapping[str, np.ndarray]


def adapt_newcomers(federation: Federation, hosts: Mapping[str, ModelHost]) -> None:
    """Let every newcomer begin and train, unless an earlier process has done it.

    Args:
        federation: finished.
        hosts: of each newcomer's model, by its id.
    """
    done = {newcomer.id for newcomer in read_newcomers(federation.directory)}
    for number, entry in enumerate(federation.scenario.unseen):
        if entry.id not in done:
            newcomer = _adapt(federation, entry, hosts[entry.id], newcomer_seed(federation.scenario, number))
            add_newcomer(federation.directory, newcomer)


def newcomer_shares(federation: Federation, entry: ScenarioClient) -> dict[str, float] | str:
    """Each member's share of what a newcomer begins with, or why it gets nothing.

    The newcomer's profile is released as any member's first: one release with the same noise.
    """
    own = _released_profile(federation, entry)
    settings = federation.settings
    store = Store(settings.store_url or default_url(settings.state_dir), durable=False)
    try:
        known = store.profiles()
    finally:
        store.close()
    members = sorted(federation.shared)
    group = Group("shared", "", settings.shared_dimensions, frozenset(members), frozenset({entry.id}))
    planned = plan(
        group,
        [*members, entry.id],
        relevance([*(known.get(member) for member in members), own], settings.similarity),
        round_number=federation.scenario.schedule.rounds,
        temperature=settings.temperature,
        policy=settings.policy,
        bits=settings.encryption.weight_bits,
    )
    if entry.id in planned.refusals:
        return planned.refusals[entry.id]
    row = planned.rows[entry.id]
    return {c: w / 2**row.bits for c, w in zip(row.contributors, row.weights, strict=True)}


def _released_profile(federation: Federation, entry: ScenarioClient) -> Profile | None:
    """The newcomer's one release, charged to a ledger of its own in the run's directory."""
    seed = federation.scenario.unsafe_test_noise_seed
    randomness = SecureNoise() if seed is None else SeededTestNoise(seed - 1)
    examples = [example for task in training_examples(entry) for example in task]
    terms, ids = federation.terms, tuple(example.id for example in examples)
    state = ClientState(federation.directory / "newcomers" / entry.id, "newcomers", entry.id)
    target, channels = terms.adapter_privacy.target_epsilon, budgeted_channels(terms)
    ledger = open_ledger(state.ledger_path, entry.id, len(ids), target, channels)
    try:
        probe = federation.probe.of(examples, randomness)
        unprotected = AdapterPlan(0.0, sampling_rate(terms, len(ids)))
        releases = Releases(ledger, terms, state, ids, probe, randomness, unprotected)
        return releases.profile(federation.scenario.schedule.rounds)
    finally:
        ledger.close()
        state.release()


def _adapt(federation: Federation, entry: ScenarioClient, host: ModelHost, seed: int) -> Newcomer:
    shares = "a fresh adapter" if federation.scenario.discard_received else newcomer_shares(federation, entry)
    adapter, training = federation.terms.adapter, federation.scenario.training
    examples = [example for task in training_examples(entry) for example in task]
    encoded = encode_examples(host.tokenizer, examples, training.max_length)
    order = EpochSampler(len(encoded), seed)
    with host.lent_to(Tenant()) as model:
        if isinstance(shares, dict):
            total = np.sum([share * federation.shared[c] for c, share in shares.items()], axis=0)
            write_embedded(model, total.astype(np.float32), adapter.rank)
            # Both branches begin there, so that the newcomer has the whole sum whatever its gate says.
            copy_branch(model, "global", "local", layers="shared")
        set_trainable(model, {"local", "gate"})
        if adapter.other_layers == "lora":
            set_active_branches(model, {"local"}, layers="family")

        def train(steps: int) -> None:
            train_local(
                model,
                encoded,
                training.model_copy(update={"steps": steps, "seed": seed}),
                pad_token_id=padding_token(host.tokenizer),
                sampler=order,
            )

        def score() -> dict[str, float]:
            return federation.board.score(model, host.tokenizer, federation.board.of_newcomer(entry.id))

        return adapt(federation.scenario, entry.id, shares, train, score)
