"""The probe of the task profile for many clients of one process: loaded once, used by one at a time."""

from collections.abc import Callable, Sequence
from pathlib import Path

from fedmosaic.client.model.acceptance import check_length
from fedmosaic.client.model.examples import Example, encode_examples
from fedmosaic.client.model.load import load_model
from fedmosaic.client.profile.probe import open_probe
from fedmosaic.client.profile.release import check_probe, release_profile
from fedmosaic.client.releases import MakeRelease, Randomness
from fedmosaic.client.settings import ModelSettings
from fedmosaic.client.vision.words import without_pictures
from fedmosaic.experiments.simulation.hosts import COMPUTE
from fedmosaic.privacy.mechanism.profile import Float32Array, ProfileMechanism
from fedmosaic.privacy.mechanism.projection import PublicBasis, PublicMap


class SharedProbe:
    """Makes releases of anybody's task profile; see `fedmosaic.client.profile.release.release_profile`."""

    def __init__(
        self, settings: ModelSettings, mechanism: ProfileMechanism, basis: Path, max_length: int
    ) -> None:
        """Load the probe.

        Args:
            settings: where the probe comes from.
            mechanism: of the roster.
            basis: file of the public basis, if the mechanism names one.
            max_length: tokens of an example that are read.
        """
        model, self._tokenizer = load_model(settings)
        check_length(model, max_length, "profile.max_length")
        self._probe = open_probe(model)
        check_probe(self._probe, mechanism)
        self._map = PublicMap(mechanism, PublicBasis.load(basis) if mechanism.basis_sha256 else None)
        self._max_length = max_length

    def of(self, examples: Sequence[Example], randomness: Randomness) -> MakeRelease:
        """The maker of releases over these examples."""

        def make(charge: Callable[[], None]) -> Float32Array:
            with COMPUTE:
                # The words alone, as `fedmosaic.client.profile.maker` reads them.
                questions = [without_pictures(example) for example in examples]
                encoded = encode_examples(self._tokenizer, questions, self._max_length)
                return release_profile(self._probe, encoded, self._map, randomness, charge)

        return make
