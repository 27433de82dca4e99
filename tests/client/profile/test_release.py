"""The private sum of a profile: exact, one row an example, and refused where it would not be private."""

import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import LlamaForCausalLM

from fedmosaic.client.model.examples import IGNORED, EncodedExample
from fedmosaic.client.profile.maker import clipped_profile
from fedmosaic.client.profile.probe import Probe, gradient_factors, open_probe
from fedmosaic.privacy.mechanism.gaussian import GRID, ClippedSum
from fedmosaic.privacy.mechanism.noise import SecureNoise, SeededTestNoise
from fedmosaic.privacy.mechanism.profile import ProfileMechanism, Reduction, release
from fedmosaic.privacy.mechanism.projection import PublicMap
from fedmosaic.protos.errors import MechanismError, PrivacyError
from tiny import tiny_llama

pytestmark = pytest.mark.usefixtures("device")


SIZES = {"intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}


def tiny_model(seed: int = 0, hidden: int = 16) -> LlamaForCausalLM:
    return tiny_llama(seed, hidden_size=hidden, initializer_range=0.3, **SIZES)


@pytest.fixture(scope="module")
def probe(device: torch.device) -> Probe:
    return open_probe(tiny_model())


def dataset(count: int, seed: int = 0) -> list[EncodedExample]:
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index in range(count):
        ids = torch.randint(3, 40, (4 + index % 5,), generator=generator)
        labels = ids.clone()
        labels[:2] = IGNORED
        examples.append(EncodedExample(f"example-{index}", ids, labels))
    return examples


def mechanism(probe: Probe, **changes: object) -> ProfileMechanism:
    fields: dict[str, object] = {
        "probe": "tiny",
        "probe_sha256": probe.sha256,
        "reduction": Reduction(
            kind="tensor_sketch", hidden_size=16, intermediate_size=24, projection_dimensions=32
        ),
        "noise_multiplier": 2.0,
        "clipping_norm": 0.5,
    }
    return ProfileMechanism.model_validate(fields | changes)


def test_how_far_a_sum_is_is_told_in_per_cent_of_nobody_knows_how_many(probe: Probe) -> None:
    told: list[int] = []
    clipped_profile(probe, dataset(70), PublicMap(mechanism(probe)), SeededTestNoise(1), told.append)
    assert told == sorted(told)
    assert (len(told), told[0], told[-1]) == (70, 1, 100)


def test_release_is_the_clipped_sum_of_the_exact_gradients_plus_noise(probe: Probe) -> None:
    examples, public_map = dataset(80), PublicMap(mechanism(probe, noise_multiplier=0.0))
    released = release(
        clipped_profile(probe, examples, public_map, SecureNoise()), public_map.mechanism, SecureNoise()
    )
    rows = public_map.rows(list(gradient_factors(probe, examples)))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(released, 0.5 * rows.sum(axis=0), atol=1e-4)


def test_noise_has_the_standard_deviation_of_the_mechanism(probe: Probe) -> None:
    loud = mechanism(probe)
    total = clipped_profile(probe, dataset(60), PublicMap(loud), SecureNoise())
    clean = release(total, mechanism(probe, noise_multiplier=0.0), SecureNoise())
    noise = [release(total, loud, SecureNoise()) - clean for _ in range(40)]
    assert stats.kstest(np.ravel(noise) / 1.0, "norm").pvalue > 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_removing_any_example_moves_the_sum_by_exactly_its_own_row(dtype: torch.dtype) -> None:
    """In particular, padding and batches must not let an example change the others' last bits."""
    probe = open_probe(tiny_model().to(dtype))
    examples, public_map = dataset(53), PublicMap(mechanism(probe, minimum_examples=1))
    whole = clipped_profile(probe, examples, public_map, SecureNoise()).units
    for removed in (0, 17, 52):
        rest = examples[:removed] + examples[removed + 1 :]
        difference = whole - clipped_profile(probe, rest, public_map, SecureNoise()).units
        own = clipped_profile(probe, [examples[removed]], public_map, SecureNoise()).units
        assert np.array_equal(difference, own)
        assert 0 < sum(int(value) ** 2 for value in difference) <= GRID**2


def test_removing_a_person_moves_the_sum_by_one_clipping_norm_at_most(probe: Probe) -> None:
    """A person's gradients are clipped as one; those of others stay as they are to the last bit."""
    examples = [replace(text, person=str(number % 7 % 3)) for number, text in enumerate(dataset(30))]
    public_map = PublicMap(mechanism(probe, minimum_examples=1))

    def summed(texts: list[EncodedExample]) -> ClippedSum:
        return clipped_profile(probe, texts, public_map, SecureNoise(), unit="person")

    whole = summed(examples)
    assert whole.rows == 3
    for person in "012":
        own = [text for text in examples if text.person == person]
        difference = whole.units - summed([text for text in examples if text.person != person]).units
        assert np.array_equal(difference, summed(own).units)
        assert 0 < sum(int(value) ** 2 for value in difference) <= GRID**2
    with pytest.raises(PrivacyError, match="at least 4 examples"):
        clipped_profile(
            probe, examples, PublicMap(mechanism(probe, minimum_examples=4)), SecureNoise(), unit="person"
        )


def test_poisson_sample_decides_who_is_summed(probe: Probe) -> None:
    examples = dataset(100)
    public_map = PublicMap(mechanism(probe, sampling_rate=0.3))
    totals = [clipped_profile(probe, examples, public_map, SeededTestNoise(seed)) for seed in range(8)]
    counts = [total.rows for total in totals]
    assert len(set(counts)) > 1
    assert 10 < np.mean(counts) < 50
    included = SeededTestNoise(3).words(100) < np.uint64(math.floor(0.3 * 2**64))
    assert totals[3].rows == np.count_nonzero(included)


def test_an_empty_sample_is_a_sum_of_zeros_and_released_as_noise(probe: Probe) -> None:
    public_map = PublicMap(mechanism(probe, sampling_rate=1e-12))
    total = clipped_profile(probe, dataset(60), public_map, SecureNoise())
    assert total.rows == np.count_nonzero(total.units) == 0
    assert np.all(release(total, public_map.mechanism, SecureNoise()) != 0)


def test_examples_without_a_finite_gradient_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[39] = math.nan
    broken = open_probe(model)
    examples = [
        EncodedExample(example.id, example.input_ids.clamp(max=38), example.labels.clamp(max=38))
        for example in dataset(60)
    ]
    # The head is tied to the embedding here, so keep the poisoned row out of the logits.
    assert not model.config.tie_word_embeddings
    public_map = PublicMap(mechanism(broken))
    clean = clipped_profile(broken, examples, public_map, SecureNoise())
    ids = torch.tensor([39, 5, 6])
    poisoned = [*examples, EncodedExample("poison", ids, torch.tensor([IGNORED, 5, 6]))]
    with caplog.at_level(logging.WARNING):
        total = clipped_profile(broken, poisoned, public_map, SecureNoise())
    assert (total.rejected, total.rows) == (1, 61)
    assert np.array_equal(total.units, clean.units)
    assert "1 examples gave no finite gradient" in caplog.text
    assert "poison" not in caplog.text


def test_small_data_sets_are_refused_or_warned_about(probe: Probe, caplog: pytest.LogCaptureFixture) -> None:
    public_map = PublicMap(mechanism(probe))
    with pytest.raises(PrivacyError, match="at least 50 examples"):
        clipped_profile(probe, dataset(49), public_map, SecureNoise())
    with caplog.at_level(logging.WARNING):
        clipped_profile(probe, dataset(50), public_map, SecureNoise())
    assert "fewer than 300" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        clipped_profile(probe, dataset(300), public_map, SecureNoise())
    assert caplog.text == ""


def test_an_example_listed_twice_is_refused_without_naming_it(probe: Probe) -> None:
    examples = dataset(60)
    with pytest.raises(PrivacyError, match="more than once") as caught:
        clipped_profile(probe, [*examples, examples[7]], PublicMap(mechanism(probe)), SecureNoise())
    assert "example-7" not in str(caught.value)


def test_another_probe_than_the_agreed_one_is_refused(probe: Probe) -> None:
    public_map = PublicMap(mechanism(probe))
    with pytest.raises(MechanismError, match="fingerprint"):
        clipped_profile(open_probe(tiny_model(seed=1)), dataset(60), public_map, SecureNoise())
    with pytest.raises(MechanismError, match=r"\(32, 24\)"):
        clipped_profile(open_probe(tiny_model(hidden=32)), dataset(60), public_map, SecureNoise())
