"""Shallow models: the refitted head is the ridge solution, and reads better than the head it replaces."""

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from fedmosaic.experiments.demo.shallow import Readout, cut_model, fit_readouts
from fedmosaic.protos.errors import ConfigurationError
from tiny import tiny_llama


def make_model(layers: int = 4, tied: bool = True) -> LlamaForCausalLM:
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 12, "intermediate_size": 24}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
    heads |= {"num_hidden_layers": layers, "tie_word_embeddings": tied}
    model = tiny_llama(1, initializer_range=0.3, **sizes, **heads)
    model.eval()
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.rand(12) + 0.5)
    return model


def texts(count: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 40, (2 + number % 9,), generator=generator).tolist() for number in range(count)]


def states_after(model: LlamaForCausalLM, sequence: list[int], depth: int) -> torch.Tensor:
    """RMS-normalised states (T − 1, H) after a layer, of a model that ends there, whose gains are one."""
    with torch.no_grad():
        shorter = LlamaForCausalLM(model.config)
        shorter.load_state_dict(model.state_dict())
        del shorter.model.layers[depth:]
        shorter.model.norm.weight.fill_(1.0)
        states: torch.Tensor = shorter.model(torch.tensor([sequence]), use_cache=False).last_hidden_state
        return states[0, 1:]


def test_the_readout_is_the_ridge_solution() -> None:
    model, sequences = make_model(), texts()
    readout = fit_readouts(model, sequences, [2], ridge=0.3)[2]
    states = torch.cat([states_after(model, sequence, 2) for sequence in sequences]).double()
    target = torch.cat([states_after(model, sequence, 4) for sequence in sequences]).double()
    target = target * model.model.norm.weight.detach().double()
    gain = states.pow(2).mean(0).rsqrt()
    assert torch.allclose(readout.norm_H.double(), gain, rtol=1e-4)
    scaled, solution = states * gain, readout.map_HH.double()
    # The gradient of the penalised squares vanishes at their minimum.
    gradient = scaled.T @ (scaled @ solution - target) + 0.3 * len(scaled) * solution
    assert gradient.abs().max() < 1e-3 * (scaled.T @ target).abs().max()


@pytest.mark.parametrize("tied", [True, False])
def test_a_cut_model_reads_its_last_layer_through_the_readout(tied: bool) -> None:
    model, sequences = make_model(tied=tied), texts()
    readout = fit_readouts(model, sequences, [3])[3]
    shallow = cut_model(model, 3, readout)
    assert (shallow.config.num_hidden_layers, shallow.config.tie_word_embeddings) == (3, False)
    for sequence in sequences[4:8]:
        with torch.no_grad():
            logits = shallow(torch.tensor([sequence])).logits[0, 1:]
        head = model.lm_head.weight.detach()
        expected = (states_after(model, sequence, 3) * readout.norm_H) @ readout.map_HH @ head.T
        assert torch.allclose(logits, expected, atol=1e-4)


def test_the_refitted_head_is_closer_to_the_whole_model() -> None:
    model, sequences = make_model(), texts(200)
    shallow = cut_model(model, 3, fit_readouts(model, sequences[:150], [3], ridge=0.01)[3])
    naive = cut_model(model, 3, Readout(norm_H=model.model.norm.weight.detach(), map_HH=torch.eye(12)))
    divergence = {"refitted": 0.0, "naive": 0.0}
    with torch.no_grad():
        for sequence in sequences[150:]:
            tokens = torch.tensor([sequence])
            whole = model(tokens).logits[0, 1:].log_softmax(-1)
            for name, candidate in (("refitted", shallow), ("naive", naive)):
                log_probabilities = candidate(tokens).logits[0, 1:].log_softmax(-1)
                divergence[name] += float((whole.exp() * (whole - log_probabilities)).sum())
    assert divergence["refitted"] < 0.9 * divergence["naive"]


def test_the_whole_model_is_left_alone() -> None:
    model, sequences = make_model(), texts()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shallow = cut_model(model, 1, fit_readouts(model, sequences, [1])[1])
    with torch.no_grad():
        for parameter in shallow.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.num_hidden_layers == 4


@pytest.mark.parametrize("depth", [0, -1, 4, 5])
def test_depths_that_make_no_sense_are_refused(depth: int) -> None:
    model = make_model()
    with pytest.raises(ConfigurationError, match="the model has 4 layers"):
        fit_readouts(model, texts(), [depth])
    with pytest.raises(ConfigurationError, match="the model has 4 layers"):
        cut_model(model, depth, Readout(norm_H=torch.ones(12), map_HH=torch.eye(12)))


@pytest.mark.parametrize("sequences", [[], [[]], [[1], [2]]])
def test_nothing_to_fit_to_is_refused(sequences: list[list[int]]) -> None:
    with pytest.raises(ConfigurationError, match="no text of at least two tokens"):
        fit_readouts(make_model(), sequences, [2])
