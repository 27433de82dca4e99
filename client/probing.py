"""Load the probe when a task profile is due, release it, and let the model go again."""

from collections.abc import Callable, Sequence
from pathlib import Path

from fedmosaic.client.clipping import ClippingRecord
from fedmosaic.client.examples import Example, encode_examples
from fedmosaic.client.models import load_model
from fedmosaic.client.probe import open_probe
from fedmosaic.client.profile import release_profile
from fedmosaic.client.releases import Randomness
from fedmosaic.client.settings import ModelSettings
from fedmosaic.client.vision.words import without_pictures
from fedmosaic.privacy.mechanism import ClippedSum, Float32Array, ProfileMechanism
from fedmosaic.privacy.projection import PublicBasis, PublicMap


class ProfileProbe:
    """Makes releases of one client's task profile; see `fedmosaic.client.profile.release_profile`."""

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
        settings = self._settings
        model, tokenizer = load_model(settings)
        # The probe reads the words alone: nothing of a picture is in a profile, and any language model can be
        # the probe. Clients that ask the same about other pictures look alike to it.
        questions = [without_pictures(example) for example in self._examples]
        encoded = encode_examples(tokenizer, questions, self._max_length)
        return release_profile(
            open_probe(model), encoded, self._map, self._randomness, charge, self._count_clipped
        )

    def _count_clipped(self, total: ClippedSum) -> None:
        self._clipping.add("profile", total.clipped, total.rows)
