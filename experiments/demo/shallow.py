"""Shallow models: the first layers of a deeper one, with an output head refitted to them.

Behind an earlier layer the head of a language model says next to nothing: a few huge coordinates drown all
others (the loss of SmolLM2-135M cut to 8 of 30 layers is about 30 nats per token). A linear map from the
earlier state to the last one, fitted on public text, gives the head something to read; together they are a
head of its own.

Axes: N tokens, H hidden, V vocabulary.

Reference: Belrose et al., "Eliciting Latent Predictions from Transformers with the Tuned Lens", arXiv
2303.08112; here the map is linear and the ridge solution.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from fedmosaic.client.colora import find_decoder_layers
from fedmosaic.client.model.examples import EncodedExample, collate, length_buckets
from fedmosaic.protos.errors import ConfigurationError

_BATCH = 16


@dataclass(frozen=True, eq=False)
class Readout:
    """How a state is read: (H,) gain of the final norm, (H, H) map of a normed row to the head's input."""

    norm_H: torch.Tensor
    map_HH: torch.Tensor


def fit_readouts(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], depths: Sequence[int], *, ridge: float = 0.1
) -> dict[int, Readout]:
    """Fits a readout for each depth, all in one pass over the public texts of at least two tokens each.

    The first token of a sequence is left out: it is an attention sink, whose state is unlike any other. The
    whole model is in float32 with an RMS norm before its head; `ridge` > 0 weighs the penalty per token,
    relative to coordinates of mean square one. `ConfigurationError` if a depth makes no sense, or there are
    no tokens to fit to.
    """
    name, layers = find_decoder_layers(model)
    for depth in depths:
        _check_depth(depth, len(layers))
    decoder = model.get_submodule(name.rpartition(".")[0])
    texts = [EncodedExample("", ids, ids) for sequence in sequences if len(ids := torch.tensor(sequence)) > 1]
    if not texts:
        raise ConfigurationError("there is no text of at least two tokens to fit a readout to; give some")
    targets: list[torch.Tensor] = []
    collected: dict[int, list[torch.Tensor]] = {depth: [] for depth in depths}
    with torch.no_grad():
        for bucket in length_buckets([len(text.input_ids) for text in texts], _BATCH):
            batch = collate([texts[index] for index in bucket], 0)
            read = batch["attention_mask"].bool()
            del batch["labels"]
            output = decoder(**batch, use_cache=False, output_hidden_states=True)
            read[:, 0] = False
            targets.append(output.last_hidden_state[read])
            for depth, states in collected.items():
                state_NH = output.hidden_states[depth][read]
                square_N = state_NH.pow(2).mean(1, keepdim=True)
                states.append(state_NH * torch.rsqrt(square_N + float(model.config.rms_norm_eps)))
    target_NH = torch.cat(targets)
    return {
        depth: _ridge_solution(torch.cat(states), target_NH, ridge) for depth, states in collected.items()
    }


def cut_model(model: PreTrainedModel, depth: int, readout: Readout) -> PreTrainedModel:
    """The first `depth` layers of a Llama-like model in float32 as a model with a head of its own.

    It shares no weights with the whole model. `ConfigurationError` if the depth makes no sense.
    """
    _check_depth(depth, len(find_decoder_layers(model)[1]))
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = depth
    config.tie_word_embeddings = False
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:depth]
    shallow = type(model)(config)
    state = dict(model.state_dict())
    # The state holds the head under its own name also where it is tied to the embedding.
    state["lm_head.weight"] = state["lm_head.weight"] @ readout.map_HH.T
    state["model.norm.weight"] = readout.norm_H
    shallow.load_state_dict({name: state[name] for name in shallow.state_dict()})
    shallow.train(False)
    return shallow


def _ridge_solution(states_NH: torch.Tensor, target_NH: torch.Tensor, ridge: float) -> Readout:
    """Solves min_W |X W − Y|² + ridge·N·|W|² in float64, X scaled to mean square one per coordinate."""
    norm_H = states_NH.double().pow(2).mean(0).clamp_min(1e-12).rsqrt()
    scaled_NH = states_NH.double() * norm_H
    count, hidden = scaled_NH.shape
    moment_HH = scaled_NH.T @ scaled_NH + ridge * count * torch.eye(hidden, dtype=torch.float64)
    map_HH = torch.linalg.solve(moment_HH, scaled_NH.T @ target_NH.double())
    return Readout(norm_H=norm_H.float(), map_HH=map_HH.float())


def _check_depth(depth: int, layers: int) -> None:
    if not 1 <= depth < layers:
        raise ConfigurationError(f"depth is {depth}; the model has {layers} layers, choose 1 to {layers - 1}")
