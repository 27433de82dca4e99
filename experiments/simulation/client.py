"""The client's own classes where several clients share one process: streams, and turns on model and probe."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedmosaic.client.learner import SAMPLER, ModelLearner
from fedmosaic.client.ledger import ServerAnchor
from fedmosaic.client.model.examples import EncodedExample, Example
from fedmosaic.client.model.training import EpochSampler
from fedmosaic.client.profile.release import ProfileProbe, check_probe, load_probe, public_map
from fedmosaic.client.progress import Progress
from fedmosaic.client.round.releases import ProfileSum, Randomness, Releases
from fedmosaic.client.settings import ClientSettings, ModelSettings
from fedmosaic.experiments.scenario.streams import InOrder, Stream
from fedmosaic.experiments.simulation.models import COMPUTE, AdapterState, SharedModel
from fedmosaic.privacy.federation.terms import Terms
from fedmosaic.privacy.ledger.rows import Unit
from fedmosaic.privacy.mechanism.gaussian import ClippedSum
from fedmosaic.privacy.mechanism.noise import BitSource
from fedmosaic.privacy.mechanism.profile import ProfileMechanism
from fedmosaic.protos.errors import StateError
from fedmosaic.protos.messages import Profile

_ADAPTER: Final = "adapter_model.safetensors"
_LENGTH_SETTING: Final = "profile.max_length"
P = ParamSpec("P")
T = TypeVar("T")


def _in_turn(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """A learner's method, run while the shared model holds the client's own adapter."""

    @wraps(method)
    def call(self: Any, /, *arguments: P.args, **named: P.kwargs) -> T:
        with self.shared.with_adapter(self.adapter):
            return method(self, *arguments, **named)

    return call


class StreamLearner(ModelLearner):
    """A learner that takes turns with others on a shared model; its examples may arrive over the rounds."""

    def __init__(
        self,
        settings: ClientSettings,
        terms: Terms,
        family: str,
        progress: Progress,
        shared: SharedModel,
        stream: Stream | None,
        scored: Callable[[int], None],
        *,
        discard: bool = False,
    ) -> None:
        """As `ModelLearner`; without a stream all examples are there from the start.

        `scored` is called after every round's training, while the model still holds this client's adapter.
        With `discard` what is received is not used, as if the policy had refused it.
        """
        self.shared, self.adapter = shared, AdapterState()
        self._stream, self._scored, self._discard = stream, scored, discard
        with shared.with_adapter(self.adapter):
            super().__init__(settings, terms, family, progress, loaded=(shared.model, shared.tokenizer))
        self._by_id = {example.id: example for example in self._encoded}

    keep_own = _in_turn(ModelLearner.keep_own)
    load_shared = _in_turn(ModelLearner.load_shared)
    group_share = _in_turn(ModelLearner.group_share)
    sections = _in_turn(ModelLearner.sections)

    def training_data(self, round_number: int) -> tuple[Sequence[EncodedExample], EpochSampler]:
        """What the replay draws in this round, in its order."""
        if self._stream is None:
            return super().training_data(round_number)
        drawn = [self._by_id[example.id] for example in self._stream.training(round_number)]
        return drawn, InOrder(len(drawn), self._settings.training.seed, round_number)

    @_in_turn
    def load_global(self, section: str, vector: np.ndarray) -> None:
        """Load an aggregate, or keep what is the client's own if nothing received is to be used."""
        if self._discard:
            self.keep_own(section)
        else:
            super().load_global(section, vector)

    @_in_turn
    def train(self, round_number: int, releases: Releases, give_up: Callable[[], None]) -> None:
        """Train one round, then score if this round is to be scored."""
        super().train(round_number, releases, give_up)
        self._scored(round_number)

    @_in_turn
    def train_personal(self, round_number: int) -> None:
        """Train what never leaves, then score."""
        super().train_personal(round_number)
        self._scored(round_number)

    def save(self, directory: Path) -> None:
        """Write adapter and sampler, without the model card of a client process."""
        save_file(self.shared.read(self.adapter), directory / _ADAPTER)
        (directory / SAMPLER).write_text(json.dumps(self._sampler.state_dict()))

    def load(self, directory: Path) -> None:
        """Read what `save` wrote; StateError if it is missing, damaged, or of another adapter."""
        try:
            tensors = load_file(directory / _ADAPTER)
            order = json.loads((directory / SAMPLER).read_text())
        except (OSError, ValueError, SafetensorError) as error:
            raise StateError(f"{directory}: the saved adapter cannot be read ({error})") from None
        self.shared.write(self.adapter, tensors)
        self._sampler.load_state_dict(order)


class StreamReleases(Releases):
    """Releases of a client whose examples arrive over the rounds: a data epoch of its own for each round.

    The ledger checks that the slices share no example and composes them in parallel; neighbouring data sets
    differ in one example together with its round of arrival.
    """

    def __init__(
        self, of_round: Callable[[int], Releases], randomness: Randomness, anchor: ServerAnchor
    ) -> None:
        """Begin; `of_round` makes the releases of one round's data epoch, on the ledger of the anchor."""
        # The state of a data epoch, which the base class sets up, is that of the round's own releases.
        self.receive_only = False
        self.randomness = randomness
        self.anchor = anchor
        self._of_round = of_round
        self._current: tuple[int, Releases] | None = None

    def _round(self, round_number: int) -> Releases:
        if self._current is None or self._current[0] != round_number:
            self._current = (round_number, self._of_round(round_number))
        return self._current[1]

    def adapter(self, round_number: int, vectors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """See `Releases.adapter`."""
        return self._round(round_number).adapter(round_number, vectors)

    def profile(self, round_number: int) -> Profile | None:
        """See `Releases.profile`."""
        return self._round(round_number).profile(round_number)

    def profile_acknowledged(self) -> None:
        """See `Releases.profile_acknowledged`."""
        if self._current is not None:
            self._current[1].profile_acknowledged()


class SharedProbe:
    """Sums anybody's task profile with a probe that is loaded once."""

    def __init__(
        self, settings: ModelSettings, mechanism: ProfileMechanism, basis: Path, max_length: int
    ) -> None:
        """Load the probe; the basis is a file, read if the roster's mechanism names one."""
        self._loaded = load_probe(settings, max_length, _LENGTH_SETTING)
        check_probe(self._loaded[0], mechanism)
        self._map = public_map(mechanism, basis)
        self._max_length = max_length

    def of(self, examples: Sequence[Example], randomness: BitSource, unit: Unit = "example") -> ProfileSum:
        """What sums the profile over a data epoch's units; the randomness is of the Poisson sample."""
        probe = ProfileProbe(
            lambda: self._loaded,
            self._map,
            examples,
            self._max_length,
            randomness,
            unit=unit,
            setting=_LENGTH_SETTING,
        )

        def summed() -> ClippedSum:
            with COMPUTE:
                return probe()

        return summed
