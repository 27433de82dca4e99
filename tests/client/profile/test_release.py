"""The private sum of a profile: exact, one row an example, and refused where it would not be private."""

import logging
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from builders import tiny_mechanism
from devices import here
from fedmosaic.client.model.examples import IGNORED, EncodedExample
from fedmosaic.client.profile.probe import Probe, gradient_factors, open_probe
from fedmosaic.client.profile.release import clipped_profile
from fedmosaic.privacy.ledger.rows import Unit
from fedmosaic.privacy.mechanism.gaussian import GRID, ClippedSum
from fedmosaic.privacy.mechanism.noise import BitSource, SecureNoise, SeededTestNoise
from fedmosaic.privacy.mechanism.profile import ProfileMechanism, Reduction, release
from fedmosaic.privacy.mechanism.projection import PublicMap
from fedmosaic.protos.errors import MechanismError, PrivacyError
from tiny import random_texts, tiny_llama

pytestmark = pytest.mark.usefixtures("device")
SIZES: dict[str, Any] = {"intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def tiny_model(seed: int = 0, hidden: int = 16) -> LlamaForCausalLM:
    return tiny_llama(seed, hidden_size=hidden, initializer_range=0.3, **SIZES)


@pytest.fixture(scope="module")
def probe(device: torch.device) -> Probe:
    return open_probe(tiny_model())


def dataset(count: int) -> list[EncodedExample]:
    return random_texts([4 + index % 5 for index in range(count)])


def mechanism(probe: Probe, **changes: Any) -> ProfileMechanism:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "projection_dimensions": 32}
    fields: dict[str, Any] = {"probe_sha256": probe.sha256, "noise_multiplier": 2.0, "clipping_norm": 0.5}
    fields["reduction"] = Reduction(kind="tensor_sketch", **sizes)
    return tiny_mechanism(**(fields | changes))


def summed(
    probe: Probe, examples: list[EncodedExample], randomness: BitSource | None = None, **changes: Any
) -> ClippedSum:
    """The private sum under a mechanism, by the persons where the examples name them."""
    unit: Unit = "person" if examples[0].person else "example"
    public_map = PublicMap(mechanism(probe, **changes))
    return clipped_profile(probe, examples, public_map, randomness or SecureNoise(), unit=unit)


def test_how_far_a_sum_is_is_told_in_per_cent_of_nobody_knows_how_many(probe: Probe) -> None:
    told: list[int] = []
    clipped_profile(probe, dataset(70), PublicMap(mechanism(probe)), SeededTestNoise(1), told.append)
    assert told == sorted(told)
    assert (len(told), told[0], told[-1]) == (70, 1, 100)


def test_release_is_the_clipped_sum_of_the_exact_gradients_plus_noise(probe: Probe) -> None:
    examples, quiet = dataset(80), mechanism(probe, noise_multiplier=0.0)
    released = release(summed(probe, examples), quiet, SecureNoise())
    rows = PublicMap(quiet).rows(list(gradient_factors(probe, examples)))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(released, 0.5 * rows.sum(axis=0), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_removing_any_example_moves_the_sum_by_exactly_its_own_row(dtype: torch.dtype) -> None:
    """In particular, padding and batches must not let an example change the others' last bits."""
    probe, examples = open_probe(here(tiny_model(), dtype)), dataset(53)
    whole = summed(probe, examples, minimum_examples=1).units
    for removed in (0, 17, 52):
        rest = examples[:removed] + examples[removed + 1 :]
        difference = whole - summed(probe, rest, minimum_examples=1).units
        assert np.array_equal(difference, summed(probe, [examples[removed]], minimum_examples=1).units)
        assert 0 < sum(int(value) ** 2 for value in difference) <= GRID**2


def test_removing_a_person_moves_the_sum_by_one_clipping_norm_at_most(probe: Probe) -> None:
    """A person's gradients are clipped as one; those of others stay as they are to the last bit."""
    examples = [replace(text, person=str(number % 7 % 3)) for number, text in enumerate(dataset(30))]
    whole = summed(probe, examples, minimum_examples=1)
    assert whole.rows == 3
    for person in "012":
        own, others = ([t for t in examples if (t.person == person) is mine] for mine in (True, False))
        difference = whole.units - summed(probe, others, minimum_examples=1).units
        assert np.array_equal(difference, summed(probe, own, minimum_examples=1).units)
        assert 0 < sum(int(value) ** 2 for value in difference) <= GRID**2
    with pytest.raises(PrivacyError, match="at least 4 examples"):
        summed(probe, examples, minimum_examples=4)


def test_poisson_sample_decides_who_is_summed(probe: Probe) -> None:
    sums = [summed(probe, dataset(100), SeededTestNoise(seed), sampling_rate=0.3) for seed in range(8)]
    counts = [total.rows for total in sums]
    assert len(set(counts)) > 1
    assert 10 < np.mean(counts) < 50
    included = SeededTestNoise(3).words(100) < np.uint64(math.floor(0.3 * 2**64))
    assert counts[3] == np.count_nonzero(included)


def test_an_empty_sample_is_a_sum_of_zeros_and_released_as_noise(probe: Probe) -> None:
    total = summed(probe, dataset(60), sampling_rate=1e-12)
    assert total.rows == np.count_nonzero(total.units) == 0
    assert np.all(release(total, mechanism(probe, sampling_rate=1e-12), SecureNoise()) != 0)


def test_examples_without_a_finite_gradient_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[60] = math.nan
    # The head is not tied to the embedding here: that would put the poisoned row into the logits.
    assert not model.config.tie_word_embeddings
    broken = open_probe(model)
    examples = [
        EncodedExample(example.id, example.input_ids.clamp(max=59), example.labels.clamp(max=59))
        for example in dataset(60)
    ]
    poison = EncodedExample("poison", torch.tensor([60, 5, 6]), torch.tensor([IGNORED, 5, 6]))
    with caplog.at_level(logging.WARNING):
        total = summed(broken, [*examples, poison])
    assert (total.rejected, total.rows) == (1, 61)
    assert np.array_equal(total.units, summed(broken, examples).units)
    assert "1 examples gave no finite gradient" in caplog.text
    assert "poison" not in caplog.text


def test_small_data_sets_are_refused_or_warned_about(probe: Probe, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(PrivacyError, match="at least 50 examples"):
        summed(probe, dataset(49))
    with caplog.at_level(logging.WARNING):
        summed(probe, dataset(50))
    assert "fewer than 300" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        summed(probe, dataset(300))
    assert caplog.text == ""


def test_an_example_listed_twice_is_refused_without_naming_it(probe: Probe) -> None:
    examples = dataset(60)
    with pytest.raises(PrivacyError, match="more than once") as caught:
        summed(probe, [*examples, examples[7]])
    assert "7" not in str(caught.value)


def test_another_probe_than_the_agreed_one_is_refused(probe: Probe) -> None:
    public_map = PublicMap(mechanism(probe))
    for changes, words in (({"seed": 1}, "fingerprint"), ({"hidden": 32}, r"\(32, 24\)")):
        with pytest.raises(MechanismError, match=words):
            clipped_profile(open_probe(tiny_model(**changes)), dataset(60), public_map, SecureNoise())
