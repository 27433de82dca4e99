"""What `fedmosaic attack` works on: a finished run, or a scenario that has not been run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedmosaic.client.model.examples import (
    EncodedExample,
    Example,
    encode_examples,
    read_examples,
    read_public_examples,
)
from fedmosaic.client.model.load import load_model
from fedmosaic.client.profile.basis import BasisSettings, fit_mechanism
from fedmosaic.client.profile.probe import Probe, gradient_factors, open_probe
from fedmosaic.client.settings import ModelSettings
from fedmosaic.experiments.scenario.founding import agreed_adapter
from fedmosaic.experiments.scenario.terms import Scenario
from fedmosaic.privacy.configuration import read_configuration
from fedmosaic.privacy.federation.kits import BASIS, ROSTER, open_kit
from fedmosaic.privacy.federation.roster import AdapterTerms
from fedmosaic.privacy.mechanism.profile import ProfileMechanism, Reduction
from fedmosaic.privacy.mechanism.projection import GradientFactors, PublicBasis, PublicMap
from fedmosaic.protos.errors import ConfigurationError

_PROFILE = "profile.json"
_SCENARIO = "scenario.json"


@dataclass(frozen=True)
class Victim:
    """One client under attack.

    Attributes:
        client_id: which client.
        task: its task.
        train: the examples that it trains on, the secrets.
        test: examples of the same task that it does not train on.
        model: its own model.
        state: its state directory in a finished run; None otherwise.
    """

    client_id: str
    task: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    model: ModelSettings
    state: Path | None

    def released_profile(self, dimensions: int) -> np.ndarray | None:
        """The bytes that really left in the run; None without a run, or if there were several epochs."""
        found = sorted(self.state.glob("profile-*.npy")) if self.state is not None else []
        if len(found) != 1:
            return None
        vector: np.ndarray = np.load(found[0], allow_pickle=False)
        return vector if vector.shape == (dimensions,) else None


@dataclass(frozen=True)
class Target:
    """A federation under attack.

    Attributes:
        name: of the run or scenario.
        scenario: its settings.
        directory: the finished run; None for a scenario.
        victims: its clients.
        public: public examples.
    """

    name: str
    scenario: Scenario
    directory: Path | None
    victims: tuple[Victim, ...]
    public: tuple[Example, ...]

    @property
    def server_run(self) -> Mapping[str, Any]:
        """What the server of a finished run wrote; empty without one."""
        path = self.directory / "federation/server/state/run.json" if self.directory else None
        return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}

    @property
    def adapter(self) -> AdapterTerms:
        """The adapter as the roster of a run has it, or as `fedmosaic run` would agree on it."""
        kit = self.directory / "federation/clients" / self.victims[0].client_id if self.directory else None
        if kit is not None and (kit / ROSTER).is_file():
            return open_kit(kit).roster.terms.adapter
        agreed = agreed_adapter(self.scenario)
        return agreed.model_copy(update={"basis_seed": agreed.basis_seed + self.scenario.seed})


def read_target(path: Path) -> Target:
    """Read a run's directory, or a scenario file.

    Raises:
        ConfigurationError: there is neither, or its data is missing.
    """
    if (path / _SCENARIO).is_file():
        return _target(read_configuration(path / _SCENARIO, Scenario).resolved(path.resolve()), path)
    if path.is_file():
        return _target(read_configuration(path, Scenario).resolved(path.parent.resolve()), None)
    raise ConfigurationError(
        f"{path}: neither a run nor a scenario; give the directory that `fedmosaic run` or `fedmosaic demo` "
        "printed, or a scenario file"
    )


def _target(scenario: Scenario, directory: Path | None) -> Target:
    victims = []
    for client in scenario.clients:
        state = directory / "federation/clients" / client.id / "state" if directory is not None else None
        victims.append(
            Victim(
                client.id,
                client.domain,
                tuple(example for task in client.task_list for example in read_examples(task.train)),
                tuple(example for task in client.task_list for example in read_examples(task.test)),
                client.model,
                state if state is not None and state.is_dir() else None,
            )
        )
    name = directory.resolve().name if directory is not None else scenario.name
    public = read_public_examples(scenario.profile.public_data)
    return Target(name, scenario, directory, tuple(victims), public)


@dataclass(frozen=True, eq=False)
class Prober:
    """The probe model with the public map, as every adversary has them."""

    probe: Probe
    tokenizer: Any
    public_map: PublicMap
    basis: PublicBasis | None
    max_length: int

    def with_noise(self, noise_multiplier: float) -> PublicMap:
        """The same map with another σ."""
        mechanism = self.public_map.mechanism.model_copy(update={"noise_multiplier": noise_multiplier})
        return PublicMap(mechanism, self.basis)

    def encode(self, examples: Sequence[Example]) -> list[EncodedExample]:
        """Encode as the product does."""
        return encode_examples(self.tokenizer, examples, self.max_length)

    def factors(self, examples: Sequence[Example]) -> list[GradientFactors]:
        """Gradients of examples as factors, in order."""
        return list(gradient_factors(self.probe, self.encode(examples)))


def open_prober(target: Target, other: ModelSettings | None = None) -> Prober:
    """Load the probe with the run's own map, or fit a map as `fedmosaic run` would.

    Args:
        target: a run or scenario.
        other: another model to take for the probe, with a map fitted for it.

    Raises:
        ModelError: the probe cannot be loaded.
    """
    settings, profile = other or target.scenario.probe, target.scenario.profile
    model, tokenizer = load_model(settings)
    probe = open_probe(model)
    fitted = target.directory / "profile" if target.directory is not None else None
    if other is None and fitted is not None and (fitted / _PROFILE).is_file():
        mechanism = ProfileMechanism.model_validate_json((fitted / _PROFILE).read_text(encoding="utf-8"))
        basis = PublicBasis.load(fitted / BASIS) if mechanism.basis_sha256 else None
        return Prober(probe, tokenizer, PublicMap(mechanism, basis), basis, profile.max_length)
    reduction = Reduction.model_validate(
        {
            "kind": profile.kind,
            "hidden_size": probe.hidden_size,
            "intermediate_size": probe.intermediate_size,
            "projection_dimensions": profile.dimensions,
        }
    )
    mechanism, basis = fit_mechanism(
        probe,
        Path(settings.path).name,
        encode_examples(tokenizer, target.public, profile.max_length),
        reduction,
        BasisSettings(
            standardise="none" if profile.kind == "coordinates" else "whiten",
            kronecker_shape=(profile.left, profile.dimensions // profile.left),
        ),
        profile.noise_multiplier,
    )
    return Prober(probe, tokenizer, PublicMap(mechanism, basis), basis, profile.max_length)


def candidates(victim: Victim, size: int, seed: int = 0) -> tuple[list[Example], np.ndarray]:
    """A pool of candidates: the client's training examples and others of the same task.

    Args:
        victim: the client.
        size: most candidates; half of them from the training set, if there are enough others.
        seed: of the draw.

    Returns:
        Candidates with distinct prompts, and (n,) bool, which of them the client really trains on.
    """
    generator = np.random.default_rng(seed)
    known = {example.prompt for example in victim.train}
    others = [example for example in victim.test if example.prompt not in known]
    chosen: dict[str, tuple[Example, bool]] = {}
    for source, member, count in (
        (others, False, size // 2),
        (list(victim.train), True, size - min(len(others), size // 2)),
    ):
        for index in generator.permutation(len(source))[:count]:
            chosen.setdefault(source[index].prompt, (source[index], member))
    examples = [example for example, _ in chosen.values()]
    return examples, np.array([member for _, member in chosen.values()], dtype=bool)
