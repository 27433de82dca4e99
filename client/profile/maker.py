"""Load the probe when a task profile is due, release it, and let the model go again."""

from collections.abc import Callable, Sequence
from pathlib import Path

from fedmosaic.client.clipping import ClippingRecord
from fedmosaic.client.model.acceptance import check_ids, check_length, encoded_ids
from fedmosaic.client.model.examples import EncodedExample, Example, encode_examples
from fedmosaic.client.model.load import load_model
from fedmosaic.client.profile.probe import Probe, open_probe
from fedmosaic.client.profile.release import check_probe, release_profile
from fedmosaic.client.releases import Randomness
from fedmosaic.client.settings import ModelSettings
from fedmosaic.client.vision.words import without_pictures
from fedmosaic.privacy.mechanism.profile import ClippedSum, Float32Array, ProfileMechanism
from fedmosaic.privacy.mechanism.projection import PublicBasis, PublicMap


class ProfileProbe:
    """Makes releases of one client's task profile; see `fedmosaic.client.profile.release.release_profile`."""

    def __init__(
        self,
        settings: ModelSettings,
        mechanism: ProfileMechanism,
        basis: Path,
        examples: Sequence[Example],
        max_length: int,
        randomness: Randomness,
        clipping: ClippingRecord,
    ) -> None:
        self._settings = settings
        self._map = PublicMap(mechanism, PublicBasis.load(basis) if mechanism.basis_sha256 else None)
        self._examples = examples
        self._max_length = max_length
        self._randomness = randomness
        self._clipping = clipping

    def __call__(self, charge: Callable[[], None]) -> Float32Array:
        """Make one release; the probe's memory is free again afterwards."""
        probe, encoded = self._open()
        return release_profile(probe, encoded, self._map, self._randomness, charge, self._count_clipped)

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
        settings = self._settings
        model, tokenizer = load_model(settings)
        # The probe reads the words alone: nothing of a picture is in a profile, and any language model can be
        # the probe. Clients that ask the same about other pictures look alike to it.
        questions = [without_pictures(example) for example in self._examples]
        check_length(model, self._max_length, "profile_max_length")
        encoded = encode_examples(tokenizer, questions, self._max_length, setting="profile_max_length")
        check_ids(model, encoded_ids(encoded), "the training examples", "[probe] path")
        return open_probe(model), encoded

    def _count_clipped(self, total: ClippedSum) -> None:
        self._clipping.add("profile", total.clipped, total.rows)
