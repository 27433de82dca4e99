"""The same function in other coordinates: what an alignment must find again, with a known right answer.

The outputs of a Llama-like model stay as they are, while its residual stream, values and gated units are
turned or reordered: its states look like another model's. Random bases share nothing with a model and its
turned copy; a right alignment carries everything.

Reference: Ashkboos et al., "SliceGPT", arXiv 2401.15024 (RMS norm commutes with rotations once its gain is
part of the next matrix).
"""

import torch
from transformers import PreTrainedModel

from fedmosaic.client.colora import find_decoder_layers
from fedmosaic.client.colora.linear import draw_orthonormal


@torch.no_grad()
def turn_model(model: PreTrainedModel, seed: int) -> None:
    """Turn the coordinates of a Llama-like model in place; its head must not be tied to the embedding."""
    name, layers = find_decoder_layers(model)
    decoder = name.rpartition(".")[0]
    weights = {key.removesuffix(".weight"): tensor for key, tensor in model.state_dict().items()}
    turn_HH = _turn(model.config.hidden_size, seed)
    _set(weights[f"{decoder}.embed_tokens"], weights[f"{decoder}.embed_tokens"].double() @ turn_HH)
    _read_turned(turn_HH, weights[f"{decoder}.norm"], weights["lm_head"])
    for index in range(len(layers)):
        drawn = 1000 * (seed + index + 1)
        prefix = f"{name}.{index}."
        own = {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
        values, output = own["self_attn.v_proj"], own["self_attn.o_proj"]
        _turn_values(values, output, model.config.head_dim, drawn)
        gate, up, down = (own[f"mlp.{part}_proj"] for part in ("gate", "up", "down"))
        order = torch.randperm(len(gate), generator=torch.Generator().manual_seed(drawn))
        for reordered, found in ((gate, gate[order]), (up, up[order]), (down, down[:, order])):
            _set(reordered, found)
        queries, keys = own["self_attn.q_proj"], own["self_attn.k_proj"]
        _read_turned(turn_HH, own["input_layernorm"], queries, keys, values)
        _read_turned(turn_HH, own["post_attention_layernorm"], gate, up)
        for written in (output, down):
            _set(written, turn_HH.T @ written.double())


def _turn(size: int, seed: int) -> torch.Tensor:
    return draw_orthonormal(size, size, seed).double()


def _read_turned(turn_HH: torch.Tensor, gain_H: torch.Tensor, *weights: torch.Tensor) -> None:
    """Let matrices read turned states; the gain of the norm before them becomes part of them."""
    for weight in weights:
        _set(weight, (weight.double() * gain_H.double()) @ turn_HH)
    gain_H.fill_(1.0)


def _turn_values(values: torch.Tensor, output: torch.Tensor, size: int, seed: int) -> None:
    """Turn what every head of some size passes on; heads that share values share the turn."""
    shared, heads = len(values) // size, output.shape[1] // size
    turns = [_turn(size, seed + index) for index in range(shared)]
    for index, turn in enumerate(turns):
        rows = slice(index * size, (index + 1) * size)
        _set(values[rows], turn.T @ values[rows].double())
    for head in range(heads):
        columns = slice(head * size, (head + 1) * size)
        _set(output[:, columns], output[:, columns].double() @ turns[head * shared // heads])


def _set(target: torch.Tensor, found: torch.Tensor) -> None:
    target.copy_(found.to(target.dtype))
