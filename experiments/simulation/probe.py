"""The probe of the task profile for many clients of one process: loaded once, used by one at a time."""

from collections.abc import Sequence
from pathlib import Path

from fedmosaic.client.model.examples import Example
from fedmosaic.client.profile.maker import ProfileProbe, load_probe, public_map
from fedmosaic.client.profile.release import check_probe
from fedmosaic.client.releases import ProfileSum
from fedmosaic.client.settings import ModelSettings
from fedmosaic.experiments.simulation.hosts import COMPUTE
from fedmosaic.privacy.mechanism.gaussian import ClippedSum
from fedmosaic.privacy.mechanism.noise import BitSource
from fedmosaic.privacy.mechanism.profile import ProfileMechanism

_SETTING = "profile.max_length"


class SharedProbe:
    """Sums anybody's task profile; see `fedmosaic.client.profile.maker.ProfileProbe`."""

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
        self._loaded = load_probe(settings, max_length, _SETTING)
        check_probe(self._loaded[0], mechanism)
        self._map = public_map(mechanism, basis)
        self._max_length = max_length

    def of(self, examples: Sequence[Example], randomness: BitSource) -> ProfileSum:
        """What sums the profile over these examples, of one data epoch.

        Args:
            examples: of one data epoch.
            randomness: of the Poisson sample.
        """
        probe = ProfileProbe(
            lambda: self._loaded, self._map, examples, self._max_length, randomness, setting=_SETTING
        )

        def summed() -> ClippedSum:
            with COMPUTE:
                return probe()

        return summed
