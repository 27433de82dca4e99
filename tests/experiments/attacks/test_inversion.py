"""Gradient inversion on tiny random models: exact terms, texts without noise, nothing under DP."""

import numpy as np
import pytest
import torch
from peft import PeftModel

from fedmosaic.client.colora import CoLoraConfig, read_shared
from fedmosaic.client.dp.engine import example_gradient, only_shared_branch
from fedmosaic.client.model.examples import IGNORED, EncodedExample
from fedmosaic.client.model.load import adapt
from fedmosaic.client.model.loss import training_mode
from fedmosaic.client.model.training import TrainingSettings
from fedmosaic.experiments.attacks.inversion import Material, Unknown, decode, inversion_results
from fedmosaic.experiments.attacks.statistics.pursuit import fit_background
from fedmosaic.experiments.attacks.terms import TermReader
from fedmosaic.privacy.mechanism.noise import SeededTestNoise
from fedmosaic.protos.errors import ConfigurationError, ModelError
from tiny import random_texts, tiny_llama

KNOWN, LENGTH = 3, 5


class Pad:
    """What of a tokenizer the attack needs."""

    pad_token_id = 0
    eos_token_id = 1


def tiny(rank: int = 12) -> PeftModel:
    base = tiny_llama(hidden_size=32, intermediate_size=48, num_hidden_layers=2, initializer_range=0.3)
    return adapt(base, CoLoraConfig(r=rank, blocks=2))


def texts(count: int, seed: int) -> tuple[EncodedExample, ...]:
    return tuple(random_texts([KNOWN + LENGTH] * count, seed, LENGTH))


def public(count: int = 60) -> tuple[torch.Tensor, ...]:
    return tuple(text.input_ids for text in random_texts([20] * count, 7))


def test_only_cores_that_act_on_their_own_position_are_read() -> None:
    model = tiny()
    with only_shared_branch(model) as cores, training_mode(model, False):
        found = TermReader(model, cores).cores
    assert all(".layers.1." in name for name in found)
    kinds = sorted(name.rsplit(".", 1)[1] for name in found)
    assert kinds == ["down_proj", "gate_proj", "o_proj", "q_proj", "up_proj"]


def test_the_terms_of_a_text_add_up_to_the_products_own_gradient() -> None:
    model, (text,) = tiny(), texts(1, 1)
    with only_shared_branch(model) as cores, training_mode(model, False):
        reader = TermReader(model, cores)
        gradient = example_gradient(model, cores, text).numpy()
        total = np.zeros(len(reader.columns))
        ids = text.input_ids.tolist()
        for place in range(KNOWN, KNOWN + LENGTH):
            (terms,) = reader.after([ids[:place]])
            (signal,) = reader.coefficients(terms, torch.tensor([ids[place]]))
            parts = np.split(signal, len(terms.inputs))
            total += np.concatenate(
                [
                    np.concatenate([np.outer(e, u).ravel(), e])
                    for e, u in zip(parts, terms.inputs, strict=True)
                ]
            )
    np.testing.assert_allclose(total / LENGTH, gradient[reader.columns], atol=2e-5 * np.abs(gradient).max())


def test_public_terms_are_in_the_same_order_as_the_gradient() -> None:
    """All terms of a text but the first two, by hand, against the gradient of just those predictions."""
    model, (tokens,) = tiny(), public(1)
    labels = tokens.clone()
    labels[:2] = IGNORED
    text = EncodedExample("a", tokens, labels)
    with only_shared_branch(model) as cores, training_mode(model, False):
        reader = TermReader(model, cores)
        terms = reader.public_terms([tokens, tokens[:2]])
        gradient = example_gradient(model, cores, text).numpy()
    assert terms.shape == (18, len(reader.columns))
    np.testing.assert_allclose(
        terms.mean(axis=0), gradient[reader.columns], atol=2e-5 * np.abs(gradient).max()
    )


def test_without_a_release_decoding_is_the_models_own_guess() -> None:
    model = tiny()
    with only_shared_branch(model) as cores, training_mode(model, False):
        reader = TermReader(model, cores)
        background = fit_background(reader.public_terms(public(4)), np.ones(len(reader.columns)))
        guess = decode(reader, background, None, Unknown((5, 6, 7), 1), 0.0, beams=2)
        logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1]
    assert guess.tokens == (int(logits.argmax()),)
    assert not guess.explained.any()


def test_texts_are_recovered_without_noise_and_not_under_dp() -> None:
    """Random models know nothing of random texts: what is found comes from the gradient alone."""
    model = tiny()
    before = read_shared(model)
    training = TrainingSettings(shared_learning_rate=1e-3)
    material = Material(texts(5, 1), texts(2, 2), public(), attacked=2, training=training)
    results = list(inversion_results(model, Pad(), material, SeededTestNoise(0), 0))  # type: ignore[arg-type]
    single, pair, batch, update, together, aggregate, private, guess = results
    in_place = {result.release: result.figures[0].value for result in results}
    assert single.figures[0].value == single.figures[1].value == single.figures[2].value == 1.0, in_place
    assert min(pair.figures[0].value, update.figures[0].value, aggregate.figures[0].value) > 0.5, in_place
    assert max(batch.figures[0].value, together.figures[0].value) < single.figures[0].value, in_place
    assert aggregate.setting == "product"
    assert private.epsilon == 8.0
    assert private.figures[0].value < 0.3, in_place
    assert guess.figures[0].value < 0.3, in_place
    np.testing.assert_array_equal(read_shared(model), before)


def test_too_few_texts_are_refused() -> None:
    material = Material(texts(1, 1), texts(2, 2), public(2), attacked=2, training=TrainingSettings())
    with pytest.raises(ConfigurationError, match="there are 1 and 2"):
        list(inversion_results(tiny(), Pad(), material, SeededTestNoise(0), 0))  # type: ignore[arg-type]


def test_a_model_whose_last_layers_are_not_adapted_is_refused() -> None:
    model = tiny()
    with only_shared_branch(model) as cores, training_mode(model, False):
        first = {name: core for name, core in cores.items() if ".layers.0." in name}
        with pytest.raises(ModelError, match="own position alone"):
            TermReader(model, first)
