"""Biases that merging made, and a configuration that describes them.

Q becomes a bias of the merged linear module. Most decoders have none there, and `from_pretrained` drops what
a configuration does not describe. Llama's describes biases on all its linear modules, and Qwen2 and Mistral
without a sliding window are Llamas but for the name; the modules that Q did not touch get biases of zero.
"""

import copy
from collections.abc import Iterator
from typing import Any, Final, cast

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

_FLAGS: Final = ("attention_bias", "mlp_bias")
_LLAMAS: Final = frozenset({"qwen2", "mistral"})


def with_described_biases(model: nn.Module) -> nn.Module | None:
    """A model of the same weights whose configuration describes every bias that it has.

    The merged model itself, its configuration changed, or a `LlamaForCausalLM` that its tensors are handed
    on to; None, and nothing was changed, where no architecture is known that describes these biases.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        return None
    has = {name for name, _ in model.named_parameters()}
    for architecture, candidate in _candidates(type(model), config):
        with torch.device("meta"):
            described = architecture(candidate)
        lacking = {name for name, _ in described.named_parameters()} ^ has
        if any(name in has or not name.endswith(".bias") for name in lacking):
            continue
        for name in lacking:
            linear = cast(nn.Linear, model.get_submodule(name.removesuffix(".bias")))
            linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features), requires_grad=False)
        if architecture is type(model):
            _set_flags(config)
            return model
        return _handed_on(model, described)
    return None


def _candidates(architecture: Any, config: PretrainedConfig) -> Iterator[tuple[Any, PretrainedConfig]]:
    flagged = copy.deepcopy(config)
    _set_flags(flagged)
    yield architecture, flagged
    if config.model_type not in _LLAMAS or _slides(config):
        return
    known, given = LlamaConfig().to_dict(), config.to_dict()
    kept = {name: given[name] for name in known if name in given and name not in ("model_type", *_FLAGS)}
    yield LlamaForCausalLM, LlamaConfig(**kept, attention_bias=True, mlp_bias=True)


def _slides(config: PretrainedConfig) -> bool:
    """Whether any layer attends to a window, which Llama's do not."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    by_kind = kinds is not None and {*kinds} != {"full_attention"}
    return by_kind or (kinds is None and window is not None and window < config.max_position_embeddings)


def _set_flags(config: PretrainedConfig) -> None:
    text = config.get_text_config()
    for flag in _FLAGS:
        if hasattr(text, flag):
            setattr(text, flag, True)


def _handed_on(model: Any, described: Any) -> nn.Module:
    described.load_state_dict(model.state_dict(), assign=True)
    described.tie_weights()
    for name, values in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        described.get_submodule(owner)._buffers[leaf] = values
    described.config.dtype = model.config.dtype
    described.generation_config = model.generation_config
    described.requires_grad_(False)
    converted: nn.Module = described.train(model.training)
    return converted
