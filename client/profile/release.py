"""A client's task profile before noise: probe its examples, clip, sum.

Every example goes through the probe and the public map alone. In a batch its neighbours decide the padding
and the order of additions, so leaving one example out would move the last bits of all others, which the bound
of one clipping norm does not allow for.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import closing

import numpy as np

from fedmosaic.client.data.records import by_unit, unit_ids
from fedmosaic.client.model.examples import EncodedExample
from fedmosaic.client.profile.probe import Probe, gradient_factors
from fedmosaic.privacy.ledger.rows import Unit
from fedmosaic.privacy.mechanism.gaussian import ClippedSum
from fedmosaic.privacy.mechanism.noise import BitSource, poisson_sample
from fedmosaic.privacy.mechanism.profile import ProfileMechanism, clipped_sum
from fedmosaic.privacy.mechanism.projection import PublicMap
from fedmosaic.protos.errors import MechanismError, PrivacyError

logger = logging.getLogger(__name__)


def clipped_profile(
    probe: Probe,
    examples: Sequence[EncodedExample],
    public_map: PublicMap,
    randomness: BitSource,
    advance: Callable[[int], None] = lambda _: None,
    unit: Unit = "example",
) -> ClippedSum:
    """Probe a Poisson sample of the units and sum their clipped gradients. Private, not a release.

    What one person's examples add up to is clipped as one.

    `advance` is told how much is done, in per cent: it is to say nothing of the number of examples.

    Raises:
        MechanismError: the probe is not the mechanism's.
        PrivacyError: there are too few examples, or an id occurs twice.
    """
    mechanism = public_map.mechanism
    _check_data(examples, mechanism, len(unit_ids(examples, unit)))
    check_probe(probe, mechanism)
    units = by_unit(examples, unit)
    sample = poisson_sample(len(units), mechanism.sampling_rate, randomness)
    total = ClippedSum.empty(mechanism.dimensions)
    sampled = (example for index in sample for example in units[index])
    with closing(gradient_factors(probe, sampled)) as gradients:
        for done, index in enumerate(sample, start=1):
            own = [public_map.rows([next(gradients)]) for _ in units[index]]
            total += clipped_sum(np.sum(own, axis=0), mechanism)
            advance(100 * done // len(sample))
    if total.rejected:
        logger.warning("%d examples gave no finite gradient and were left out of the profile", total.rejected)
    return total


def check_probe(probe: Probe, mechanism: ProfileMechanism) -> None:
    """Refuse, with a MechanismError, a probe whose gradient's shape or weights are not the roster's."""
    shape = (probe.hidden_size, probe.intermediate_size)
    if shape != (mechanism.reduction.hidden_size, mechanism.reduction.intermediate_size):
        raise MechanismError(
            f"the probe's gradient has shape {shape}, the mechanism's "
            f"{(mechanism.reduction.hidden_size, mechanism.reduction.intermediate_size)}; "
            f"load {mechanism.probe}"
        )
    if probe.sha256 != mechanism.probe_sha256:
        raise MechanismError(
            f"the probe's weights have fingerprint {probe.sha256[:16]}…, those of {mechanism.probe} in the "
            f"roster {mechanism.probe_sha256[:16]}…; profiles of different probes cannot be compared: name "
            "the roster's in [probe] path"
        )


def _check_data(examples: Sequence[EncodedExample], mechanism: ProfileMechanism, count: int) -> None:
    if count < mechanism.minimum_examples:
        raise PrivacyError(
            f"a task profile needs at least {mechanism.minimum_examples} examples, this client has fewer; "
            "it can take part without a profile and gets uniform weights"
        )
    if len({example.id for example in examples}) != len(examples):
        raise PrivacyError(
            "some example ids occur more than once, and the unit of privacy is one example; give every "
            "example its own id and list it once"
        )
    if count < mechanism.warn_below:
        logger.warning(
            "a task profile from fewer than %d examples is mostly noise; relevance may not be found",
            mechanism.warn_below,
        )
