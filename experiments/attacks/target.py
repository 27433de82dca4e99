"""What `fedmosaic attack` works on: a finished run, or a scenario that has not been run."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console

from fedmosaic.client.model.examples import Example, encode_examples, read_examples
from fedmosaic.client.model.load import load_model
from fedmosaic.client.profile.probe import Probe, gradient_factors, open_probe
from fedmosaic.client.settings import ModelSettings
from fedmosaic.experiments.attacks.federation import weight_matrix
from fedmosaic.experiments.scenario.founding import agreed_adapter, fit_profile
from fedmosaic.experiments.scenario.terms import Scenario
from fedmosaic.privacy.configuration import Frozen, read_configuration, validate
from fedmosaic.privacy.federation.kits import BASIS, PROFILE, ROSTER, open_kit
from fedmosaic.privacy.federation.terms import AdapterTerms, RelevanceTerms
from fedmosaic.privacy.mechanism.noise import Float64Array
from fedmosaic.privacy.mechanism.projection import GradientFactors, PublicBasis, PublicMap
from fedmosaic.privacy.policy import AggregationPolicy
from fedmosaic.protos.errors import ConfigurationError
from fedmosaic.server.summary import with_rounds

RUN: Final = "run.json"
_SCENARIO: Final = "scenario.json"


class _RoundResult(Frozen, extra="ignore"):
    """What the server says of a closed round: shares by section, recipient and contributor."""

    weights: dict[str, dict[str, dict[str, float]]]


class ServerRun(Frozen, extra="ignore"):
    """What the attacks use of a server's account of a run, its `run.json`."""

    federation: str = "federation"
    members: tuple[str, ...] = ()
    policy: AggregationPolicy = AggregationPolicy()
    relevance: RelevanceTerms = RelevanceTerms()
    results: tuple[_RoundResult, ...] = ()

    @property
    def rows(self) -> list[dict[str, dict[str, float]]]:
        """Shares of P, Q by round, recipient and contributor; those of the last round are never sent."""
        return [result.weights.get("shared", {}) for result in self.results]

    def weights(self, members: Sequence[str]) -> list[np.ndarray]:
        """(N, N) shares per round."""
        return [weight_matrix(rows, members) for rows in self.rows]


def read_server_run(path: Path) -> ServerRun:
    """Read `run.json` and what stands beside it; `ConfigurationError` or `StateError` if that is none."""
    run = read_configuration(path, ServerRun).model_dump(exclude_unset=True)
    return validate(with_rounds(run, path.parent), ServerRun, str(path))


@dataclass(frozen=True)
class Victim:
    """One client under attack: what it trains on is secret; `state` is its directory in a finished run."""

    client_id: str
    task: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    model: ModelSettings
    state: Path | None

    @property
    def unseen(self) -> list[Example]:
        """Examples of the task with prompts that it does not train on."""
        known = {example.prompt for example in self.train}
        return [example for example in self.test if example.prompt not in known]

    def released_profile(self, dimensions: int) -> np.ndarray | None:
        """The bytes that really left in the run; None without a run, or if there were several epochs."""
        found = list(self.state.glob("profile-*.npy")) if self.state else []
        if len(found) != 1:
            return None
        vector: np.ndarray = np.load(found[0], allow_pickle=False)
        return vector if vector.shape == (dimensions,) else None

    def saved_adapter(self) -> Path | None:
        """What it saved after the last round of a finished run; None if there is nothing."""
        saved = "round-*/adapter_model.safetensors"
        return max((self.state / "adapter").glob(saved), default=None) if self.state else None


@dataclass(frozen=True)
class Target:
    """A federation under attack; `directory` is the finished run, None for a scenario."""

    name: str
    scenario: Scenario
    directory: Path | None
    victims: tuple[Victim, ...]

    @cached_property
    def server_run(self) -> ServerRun:
        """What the server of a finished run wrote; without rounds where there is none."""
        path = self.directory and self.directory / "federation/server/state" / RUN
        return read_server_run(path) if path and path.exists() else ServerRun()

    @property
    def adapter(self) -> AdapterTerms:
        """The adapter as the roster of a run has it, or as `fedmosaic run` would agree on it."""
        kit = self.directory and self.directory / "federation/clients" / self.victims[0].client_id
        if kit and (kit / ROSTER).is_file():
            return open_kit(kit).roster.terms.adapter
        agreed = agreed_adapter(self.scenario)
        return agreed.model_copy(update={"basis_seed": agreed.basis_seed + self.scenario.seed})


def read_target(path: Path) -> Target:
    """Read a run's directory or a scenario file; `ConfigurationError` if it is neither, or data lack."""
    if (path / _SCENARIO).is_file():
        return _target(read_configuration(path / _SCENARIO, Scenario).resolved(path.resolve()), path)
    if path.is_file():
        return _target(read_configuration(path, Scenario).resolved(path.parent.resolve()), None)
    raise ConfigurationError(
        f"{path}: neither a run nor a scenario nor a state directory; give the directory that "
        "`fedmosaic run` or `fedmosaic demo` printed, a scenario file, or the state_dir of a client or server"
    )


def _target(scenario: Scenario, directory: Path | None) -> Target:
    victims = []
    for client in scenario.clients:
        state = directory and directory / "federation/clients" / client.id / "state"
        train, test = (
            tuple(e for task in client.task_list for e in read_examples(getattr(task, part)))
            for part in ("train", "test")
        )
        kept = state if state and state.is_dir() else None
        victims.append(Victim(client.id, client.domain, train, test, client.model, kept))
    name = directory.resolve().name if directory else scenario.name
    return Target(name, scenario, directory, tuple(victims))


@dataclass(frozen=True, eq=False)
class Prober:
    """The probe model with the public map, as every adversary has them."""

    probe: Probe
    tokenizer: Any
    public_map: PublicMap
    basis: PublicBasis | None
    max_length: int

    def factors(self, examples: Sequence[Example]) -> list[GradientFactors]:
        """Gradients of examples as factors, in order."""
        return list(gradient_factors(self.probe, encode_examples(self.tokenizer, examples, self.max_length)))

    def rows(self, examples: Sequence[Example]) -> Float64Array:
        """(n, k) standardised rows of examples, in order."""
        return self.public_map.rows(self.factors(examples))


def open_prober(target: Target, other: ModelSettings | None = None) -> Prober:
    """Load the probe with the run's own map, or fit a map as `fedmosaic run` would; `other` for the probe."""
    settings = other or target.scenario.probe
    with tempfile.TemporaryDirectory() as scratch:
        finished = target.directory if other is None else None
        place = finished if finished and (finished / "profile" / PROFILE).is_file() else Path(scratch)
        scenario = target.scenario.model_copy(update={"probe": settings})
        mechanism = fit_profile(scenario, place, Console(quiet=True), own_process=False)
        basis = PublicBasis.load(place / "profile" / BASIS) if mechanism.basis_sha256 else None
    model, tokenizer = load_model(settings)
    length = scenario.profile.max_length
    return Prober(open_probe(model), tokenizer, PublicMap(mechanism, basis), basis, length)


def candidates(victim: Victim, size: int, seed: int = 0) -> list[Example]:
    """At most `size` candidates with distinct prompts, half of them trained on if there are enough others."""
    generator, others = np.random.default_rng(seed), victim.unseen
    chosen: dict[str, Example] = {}
    for source, count in ((others, size // 2), (victim.train, size - min(len(others), size // 2))):
        for index in generator.permutation(len(source))[:count]:
            chosen.setdefault(source[index].prompt, source[index])
    return list(chosen.values())
