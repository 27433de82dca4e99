"""Load the probe when a task profile is due, sum its clipped gradients, and let the model go again."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fedmosaic.client.model.acceptance import check_ids, check_length, encoded_ids
from fedmosaic.client.model.examples import EncodedExample, Example, encode_examples
from fedmosaic.client.model.load import load_model
from fedmosaic.client.profile.probe import Probe, open_probe
from fedmosaic.client.profile.release import check_probe, clipped_profile
from fedmosaic.client.settings import ClientSettings, ModelSettings
from fedmosaic.client.vision.words import without_images
from fedmosaic.privacy.federation.kits import Kit
from fedmosaic.privacy.ledger.rows import Unit
from fedmosaic.privacy.mechanism.gaussian import ClippedSum
from fedmosaic.privacy.mechanism.noise import BitSource
from fedmosaic.privacy.mechanism.profile import ProfileMechanism
from fedmosaic.privacy.mechanism.projection import PublicBasis, PublicMap

LoadedProbe = tuple[Probe, PreTrainedTokenizerBase]


def load_probe(settings: ModelSettings, max_length: int, setting: str) -> LoadedProbe:
    """Load the probe and try that it can read `max_length` tokens; `setting` names that length in messages.

    Raises:
        ModelError: it cannot be loaded, or be a probe.
        ConfigurationError: it has fewer positions than `max_length`.
    """
    model, tokenizer = load_model(settings)
    check_length(model, max_length, setting)
    return open_probe(model), tokenizer


def read_as_text(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> tuple[Example, ...]:
    """What a probe reads.

    Where it has no chat template it reads a conversation like a prompt and its answer: the texts before the
    last turn, and that turn.
    """
    if tokenizer.chat_template:
        return tuple(examples)
    return tuple(replace(example, turns=()) for example in examples)


def public_map(mechanism: ProfileMechanism, basis: Path) -> PublicMap:
    """The public map of the roster's mechanism, with the basis from this file if the mechanism names one."""
    return PublicMap(mechanism, PublicBasis.load(basis) if mechanism.basis_sha256 else None)


class ProfileProbe:
    """Makes the private sum of one client's task profile; see `clipped_profile`."""

    def __init__(
        self,
        load: Callable[[], LoadedProbe],
        public_map: PublicMap,
        examples: Sequence[Example],
        max_length: int,
        randomness: BitSource,
        *,
        setting: str = "profile_max_length",
        advance: Callable[[int], None] = lambda _: None,
        unit: Unit = "example",
    ) -> None:
        """Prepare; nothing is loaded yet. `load` gives the probe, once per sum.

        `advance` is told how much of a sum is done, in per cent.
        """
        self._load = load
        self._map = public_map
        self._examples = examples
        self._max_length = max_length
        self._randomness = randomness
        self._setting = setting
        self._advance = advance
        self._unit = unit

    def __call__(self) -> ClippedSum:
        """The sum, never to leave; the memory of a probe that was loaded for it is free again afterwards."""
        probe, encoded = self._open()
        return clipped_profile(probe, encoded, self._map, self._randomness, self._advance, self._unit)

    def check(self) -> None:
        """Find out now what would stop a release: nothing is probed, drawn or charged.

        Raises:
            ModelError: the probe cannot be loaded, or has no row for a token of the examples.
            MechanismError: it is not the roster's.
            ConfigurationError: an answer leaves no room for its prompt within `profile_max_length`.
        """
        probe, _ = self._open()
        check_probe(probe, self._map.mechanism)

    def _open(self) -> tuple[Probe, list[EncodedExample]]:
        probe, tokenizer = self._load()
        # The probe reads the words alone: nothing of an image is in a profile, and any language model can be
        # the probe. Clients that ask the same about other images look alike to it.
        questions = read_as_text(tokenizer, [without_images(example) for example in self._examples])
        encoded = encode_examples(tokenizer, questions, self._max_length, setting=self._setting)
        check_ids(probe.base, encoded_ids(encoded), "the training examples", "[probe] path")
        return probe, encoded


def client_probe(
    settings: ClientSettings,
    kit: Kit,
    examples: Sequence[Example],
    randomness: BitSource,
    advance: Callable[[int], None] = lambda _: None,
) -> ProfileProbe:
    """The probe of a client with a process of its own: loaded when a profile is due, then let go.

    `advance` is told how much of a sum is done, in per cent.
    """
    length = settings.profile_max_length
    return ProfileProbe(
        lambda: load_probe(settings.probe, length, "profile_max_length"),
        public_map(kit.roster.terms.profile, kit.basis),
        examples,
        length,
        randomness,
        advance=advance,
        unit=kit.roster.terms.unit,
    )
