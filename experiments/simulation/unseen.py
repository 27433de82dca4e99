"""Unseen clients: one begins with what the method gives it, and trains for a few steps.

With FedMosaic it releases a task profile; both branches of its adapter begin with the sum of the members'
adapters that the server's own rule gives it.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from peft import PeftModel
from torch import nn

from fedmosaic.client.colora import copy_branch, set_active_branches
from fedmosaic.client.colora.aligned import write_embedded
from fedmosaic.client.ledger import open_ledger
from fedmosaic.client.model.examples import encode_examples
from fedmosaic.client.model.sampling import EpochSampler
from fedmosaic.client.planning import AdapterPlan, sampling_rate
from fedmosaic.client.releases import Releases
from fedmosaic.client.state import ClientState
from fedmosaic.experiments.scenario.participants import Evaluation, client_seed, training_examples
from fedmosaic.experiments.scenario.terms import Scenario, ScenarioClient
from fedmosaic.experiments.scenario.unseen import UnseenClient, add_unseen, read_unseen
from fedmosaic.experiments.simulation.client import SharedProbe
from fedmosaic.experiments.simulation.compute import Train
from fedmosaic.experiments.simulation.models import AdapterState, SharedModel
from fedmosaic.privacy.federation.terms import Terms
from fedmosaic.privacy.mechanism.noise import SecureNoise, SeededTestNoise
from fedmosaic.protos.messages import Profile
from fedmosaic.server.round.relevance import relevance
from fedmosaic.server.round.weights import Group, plan
from fedmosaic.server.settings import ServerSettings
from fedmosaic.server.storage.store import Store, default_url

Begin = Callable[[PeftModel, ScenarioClient], str | Mapping[str, float]]
"""Writes what an unseen client begins with into its fresh adapter; says what that is, or whose shares."""
FRESH = "a fresh adapter"


def adapt_unseen(
    scenario: Scenario,
    evaluation: Evaluation,
    directory: Path,
    model_of: Callable[[ScenarioClient], SharedModel],
    begin: Begin,
    train: Train,
    scored: Callable[[PeftModel], AbstractContextManager[nn.Module]] = nullcontext,
) -> None:
    """Let every unseen client begin, train and be scored, unless an earlier process has done it.

    `train` is a client's training by itself, and `scored` gives the model as the method scores it.
    """
    done = {client.id for client in read_unseen(directory)}
    for number, entry in enumerate(scenario.unseen, start=len(scenario.clients)):
        if entry.id in done:
            continue
        shared, seed = model_of(entry), client_seed(scenario, number)
        encoded = encode_examples(shared.tokenizer, training_examples(entry), scenario.training.max_length)
        order = EpochSampler(len(encoded), seed)
        scores: dict[int, dict[str, float]] = {}
        with shared.with_adapter(AdapterState()) as model:
            begun_with = begin(model, entry)
            for before, steps in pairwise((0, *scenario.adaptation_steps)):
                if steps > before:
                    few = {"seed": seed, "steps": steps - before}
                    train(shared, encoded, order, scenario.training.model_copy(update=few))
                with scored(model) as as_scored:
                    scores[steps] = evaluation.score(as_scored, shared.tokenizer, entry.id)
        add_unseen(directory, UnseenClient(id=entry.id, begun_with=begun_with, scores=scores))


@dataclass(frozen=True)
class Federation:
    """What a finished federation has for an unseen client; `shared`: the members' adapters, float32 (d,)."""

    scenario: Scenario
    directory: Path
    terms: Terms
    settings: ServerSettings
    probe: SharedProbe
    shared: Mapping[str, np.ndarray]

    def begin(self, model: PeftModel, entry: ScenarioClient) -> str | Mapping[str, float]:
        """Begin with the sum that the client's weights give it; see `Begin`."""
        if self.terms.adapter.other_layers == "lora":
            set_active_branches(model, {"local"}, layers="family")
        if self.scenario.discard_received:
            return FRESH
        shares = self.shares(entry)
        if not isinstance(shares, str):
            total = np.sum([share * self.shared[c] for c, share in shares.items()], axis=0)
            write_embedded(model, total.astype(np.float32), self.terms.adapter.rank)
            # Both branches begin there, so that the client has the whole sum whatever its gate says.
            copy_branch(model, "global", "local", layers="shared")
        return shares

    def shares(self, entry: ScenarioClient) -> dict[str, float] | str:
        """Each member's share of what a client begins with, or why it gets nothing.

        Its profile is released as any member's first: one release with the same noise.
        """
        own, settings = self._released_profile(entry), self.settings
        store = Store(settings.store_url or default_url(settings.state_dir), durable=False)
        try:
            known = store.profiles()
        finally:
            store.close()
        members = sorted(self.shared)
        planned = plan(
            Group("shared", "", settings.shared_dimensions, frozenset(members), frozenset({entry.id})),
            [*members, entry.id],
            relevance([*(known.get(member) for member in members), own], settings.similarity),
            temperature=settings.temperature,
            policy=settings.policy,
            bits=settings.encryption.weight_bits,
        )
        if entry.id in planned.refusals:
            return planned.refusals[entry.id]
        row = planned.rows[entry.id]
        return {c: w / 2**row.bits for c, w in zip(row.contributors, row.weights, strict=True)}

    def _released_profile(self, entry: ScenarioClient) -> Profile | None:
        """The client's one release, charged to a ledger of its own in the run's directory."""
        seed = self.scenario.unsafe_test_noise_seed
        randomness = SecureNoise() if seed is None else SeededTestNoise(seed - 1)
        examples, terms = training_examples(entry), self.terms
        ids = tuple(example.id for example in examples)
        state = ClientState(self.directory / "unseen" / entry.id, "unseen", entry.id)
        target = terms.adapter_privacy.target_epsilon
        ledger = open_ledger(state.ledger_path, entry.id, terms, len(ids), target)
        try:
            probe = self.probe.of(examples, randomness)
            unprotected = AdapterPlan(0.0, sampling_rate(terms, len(ids)))
            releases = Releases(ledger, terms, state, ids, probe, randomness, unprotected)
            return releases.profile(self.scenario.schedule.rounds)
        finally:
            ledger.close()
            state.release()
