"""A member's part of a group's sum, and what one example or one person can move in it."""

from dataclasses import replace

import numpy as np
import pytest

from builders import tiny_mechanism
from fedmosaic.client.dp.training import group_share
from fedmosaic.client.ledger import AdapterPlan, group_grid
from fedmosaic.client.model.training import TrainingSettings
from fedmosaic.client.progress import Progress
from fedmosaic.client.records import ClippingRecord
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.federation.terms import AdapterTerms, Terms
from fedmosaic.privacy.mechanism.noise import SeededTestNoise
from fedmosaic.protos.errors import ConfigurationError, PrivacyError
from tiny import random_texts, tiny_colora

SIGMA = 2.0
TEXTS = [
    replace(text, person=person)
    for text, person in zip(random_texts([6, 7, 5, 6, 8, 6, 7]), "aabbbcd", strict=True)
]


class Silent:
    """Noise of zero, so that what is left is the clipped sum."""

    is_test = True

    def words(self, size):
        return SeededTestNoise(0).words(size)

    def gaussian(self, size, standard_deviation):
        return np.zeros(size)


class Releases:
    """What `group_share` asks of a client's releases, every example in the sample."""

    def __init__(self, path, sigma=SIGMA):
        self.receive_only, self.randomness, self.charged = False, Silent(), []
        self.adapter_plan = AdapterPlan(sigma, 1.0)
        self.clipping = ClippingRecord(path / "clipping")

    def release_adapter(self, round_number, event, total, noise, store):
        summed = total()
        self.charged.append(event)
        return noise(summed)


def terms(unit):
    return Terms.model_validate(
        {
            "adapter": AdapterTerms(rank=4, alpha=8, blocks=2, protection="distributed-dp"),
            "adapter_privacy": {"steps_per_round": 1, "expected_batch_size": 7, "clipping_norm": 0.3},
            "group_sums": {"minimum_contributors": 6, "noise_multiplier": SIGMA, "unit": unit},
            "profile": tiny_mechanism(),
            "encryption": {"backend": "plain"},
        }
    )


@pytest.fixture(scope="module")
def model():
    return tiny_colora(initializer_range=0.3)


def share(model, tmp_path, unit, texts, **changes):
    releases = Releases(tmp_path, **changes)
    found = group_share(
        model, texts, terms(unit), TrainingSettings(), members=6, releases=releases, round_number=2,
        progress=Progress(),
    )  # fmt: skip
    assert releases.charged == [GaussianEvent(SIGMA, 1.0, 1)]
    return found / group_grid(terms(unit), 6).steps


@pytest.mark.parametrize("person", "abcd")
def test_all_records_of_a_person_move_the_sum_by_one_clipping_norm_at_most(model, tmp_path, person):
    everybody = share(model, tmp_path, "person", TEXTS)
    others = share(model, tmp_path, "person", [text for text in TEXTS if text.person != person])
    assert np.linalg.norm(everybody - others) <= 1.0
    # By examples, one with several moves it by more: the bound of the person is not there by chance.
    by_example = share(model, tmp_path, "example", TEXTS)
    moved = np.linalg.norm(
        by_example - share(model, tmp_path, "example", [text for text in TEXTS if text.person != person])
    )
    records = sum(text.person == person for text in TEXTS)
    assert (moved > 1.2) == (records > 1)
    assert moved <= records


def test_an_example_without_a_person_is_refused_before_anything_is_charged(model, tmp_path):
    releases = Releases(tmp_path)
    with pytest.raises(ConfigurationError, match="training example 3 names no person"):
        group_share(
            model, [*TEXTS[:2], replace(TEXTS[2], person="")], terms("person"), TrainingSettings(), members=6,
            releases=releases, round_number=2, progress=Progress(),
        )  # fmt: skip
    assert not releases.charged


def test_a_plan_with_another_noise_than_the_terms_is_refused(model, tmp_path):
    with pytest.raises(PrivacyError, match=r"charged for σ = 3.0, the roster's sums have 2.0"):
        share(model, tmp_path, "example", TEXTS, sigma=3.0)
