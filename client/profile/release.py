"""The private sum that a client's task profile is released from: one clipped gradient for each unit."""

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from fedmosaic.client.data.records import by_unit, unit_ids
from fedmosaic.client.model.acceptance import check_ids, check_length
from fedmosaic.client.model.examples import EncodedExample, Example, encode_examples
from fedmosaic.client.model.load import load_model
from fedmosaic.client.profile.probe import Probe, gradient_factors, open_probe
from fedmosaic.client.settings import ClientSettings, ModelSettings
from fedmosaic.client.vision.inputs import without_images
from fedmosaic.privacy.federation.kits import Kit
from fedmosaic.privacy.ledger.rows import Unit
from fedmosaic.privacy.mechanism.gaussian import ClippedSum
from fedmosaic.privacy.mechanism.noise import BitSource, poisson_sample
from fedmosaic.privacy.mechanism.profile import ProfileMechanism, clipped_sum
from fedmosaic.privacy.mechanism.projection import PublicBasis, PublicMap
from fedmosaic.protos.errors import MechanismError, PrivacyError

logger = logging.getLogger(__name__)
LoadedProbe = tuple[Probe, PreTrainedTokenizerBase]


def load_probe(settings: ModelSettings, max_length: int, setting: str) -> LoadedProbe:
    """Load the probe and try that it can read `max_length` tokens, which `setting` names in messages."""
    model, tokenizer = load_model(settings)
    check_length(model, max_length, setting)
    return open_probe(model), tokenizer


def read_as_text(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> tuple[Example, ...]:
    """What a probe reads: without a chat template the texts before a conversation's last turn, and that."""
    if tokenizer.chat_template:
        return tuple(examples)
    return tuple(replace(example, turns=()) for example in examples)


def public_map(mechanism: ProfileMechanism, basis: Path) -> PublicMap:
    """The public map of the roster's mechanism, with the basis from this file if the mechanism names one."""
    return PublicMap(mechanism, PublicBasis.load(basis) if mechanism.basis_sha256 else None)


def clipped_profile(
    probe: Probe,
    examples: Sequence[EncodedExample],
    public_map: PublicMap,
    randomness: BitSource,
    advance: Callable[[int], None] = lambda _: None,
    unit: Unit = "example",
) -> ClippedSum:
    """Probe a Poisson sample of the units and sum their clipped gradients. Private, not a release.

    What one person's examples add up to is clipped as one. `advance` is told how much is done, in per cent:
    it is to say nothing of the number of examples. MechanismError if the probe is not the mechanism's;
    PrivacyError if there are too few examples, or an id occurs twice.
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
    agreed = mechanism.reduction.hidden_size, mechanism.reduction.intermediate_size
    if shape != agreed:
        raise MechanismError(
            f"the probe's gradient has shape {shape}, the mechanism's {agreed}; load {mechanism.probe}"
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
        words = "a task profile from fewer than %d examples is mostly noise; relevance may not be found"
        logger.warning(words, mechanism.warn_below)


@dataclass(frozen=True)
class ProfileProbe:
    """Makes the private sum of one client's task profile; see `clipped_profile`.

    `load` gives the probe once per sum, and nothing before; `max_length` tokens of an example are read, and
    `setting` is where that is set, for messages.
    """

    load: Callable[[], LoadedProbe]
    public_map: PublicMap
    examples: Sequence[Example]
    max_length: int
    randomness: BitSource
    setting: str = "profile_max_length"
    advance: Callable[[int], None] = lambda _: None
    unit: Unit = "example"

    def __call__(self) -> ClippedSum:
        """The sum, never to leave; the memory of a probe that was loaded for it is free again afterwards."""
        probe, encoded = self._open()
        return clipped_profile(probe, encoded, self.public_map, self.randomness, self.advance, self.unit)

    def check(self) -> None:
        """Find out now what would stop a release, as one error: nothing is probed, drawn or charged."""
        probe, _ = self._open()
        check_probe(probe, self.public_map.mechanism)

    def _open(self) -> tuple[Probe, list[EncodedExample]]:
        probe, tokenizer = self.load()
        # The probe reads the words alone: nothing of an image is in a profile, and any language model can be
        # the probe. Clients that ask the same about other images look alike to it.
        questions = read_as_text(tokenizer, [without_images(example) for example in self.examples])
        encoded = encode_examples(tokenizer, questions, self.max_length, setting=self.setting)
        check_ids(probe.base, (e.input_ids for e in encoded), "the training examples", "[probe] path")
        return probe, encoded


def client_probe(
    settings: ClientSettings,
    kit: Kit,
    examples: Sequence[Example],
    randomness: BitSource,
    advance: Callable[[int], None] = lambda _: None,
) -> ProfileProbe:
    """The probe of a client with a process of its own: loaded when a profile is due, then let go."""
    length = settings.profile_max_length
    terms = kit.roster.terms
    return ProfileProbe(
        lambda: load_probe(settings.probe, length, "profile_max_length"),
        public_map(terms.profile, kit.basis),
        examples,
        length,
        randomness,
        advance=advance,
        unit=terms.unit,
    )
