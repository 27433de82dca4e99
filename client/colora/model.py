"""Injection of Co-LoRA into a base model, and a configuration that describes the biases of merging.

Q becomes a bias of the merged linear module. Most decoders have none there, and `from_pretrained` drops what
a configuration does not describe. Llama's describes biases on all its linear modules, and Qwen2 and Mistral
without a sliding window are Llamas but for the name; the modules that Q did not touch get biases of zero.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Final, cast

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

from fedmosaic.client.colora.config import CoLoraConfig
from fedmosaic.client.colora.layer import CoLoraLayer
from fedmosaic.client.colora.linear import BranchedLoraLinear, CoLoraLinear
from fedmosaic.client.colora.placement import (
    Placement,
    find_decoder_layers,
    plan_placements,
    target_layers,
)
from fedmosaic.protos.errors import ModelError


class CoLoraModel(BaseTuner):
    """Puts Co-LoRA on shared and LoRA on other layers; what it resolved is written into the configuration."""

    prefix = "colora_"
    tuner_layer_cls = CoLoraLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # declared by PEFT

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False, state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Adapt the modules that the configuration names; ModelError if it does not fit the model."""
        self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        config = _as_colora(peft_config)
        depth = len(find_decoder_layers(model)[1])
        if config.model_depth not in (None, depth):
            raise ModelError(
                f"The adapter belongs to a model of {config.model_depth} decoder layers, this one has "
                f"{depth}. Load the base model it was made for, or make a new adapter."
            )
        layers = config.shared_layers or target_layers(depth, config.blocks, config.layer_rule)
        plan = plan_placements(model, layers, config.target_modules, family=config.other_layers == "lora")
        self._check_against_other_adapters(model, plan)
        config.shared_layers = list(layers)
        config.target_modules = sorted({placement.module for placement in plan.values()})
        config.model_depth = depth
        config.basis_label = config.basis_label or f"seed:{config.basis_seed}"
        self._plan = plan

    @staticmethod
    def _check_against_other_adapters(model: nn.Module, plan: Mapping[str, Placement]) -> None:
        for name, placement in plan.items():
            existing, shared = model.get_submodule(name), placement.kind == "shared"
            if isinstance(existing, CoLoraLayer) and isinstance(existing, CoLoraLinear) != shared:
                raise ModelError(
                    f"{name} carries Co-LoRA in one adapter and ordinary LoRA in another. "
                    "Give all adapters of a model the same blocks, layer_rule and shared_layers."
                )

    # PEFT matches names against lists or patterns; here the plan has decided already.
    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool:  # type: ignore[override]  # static there, called on the instance
        return key in self._plan

    def _create_and_replace(
        self, peft_config: PeftConfig, adapter_name: str, target: nn.Module, target_name: str,
        parent: nn.Module, current_key: str, parameter_name: str | None = None,
    ) -> None:  # fmt: skip
        config, placement = _as_colora(peft_config), self._plan[current_key]
        if isinstance(target, CoLoraLayer):
            target.update_layer(adapter_name, config, placement)
            return
        layer_class = CoLoraLinear if placement.kind == "shared" else BranchedLoraLinear
        adapted = layer_class(target, adapter_name, config, placement)
        if adapter_name not in self.active_adapters:
            adapted.requires_grad_(False)
        self._replace_module(parent, target_name, adapted, target)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()  # type: ignore[no-untyped-call]  # PEFT leaves it untyped
        # Ask every module before any is changed, so that a refusal leaves the model whole.
        for module in self.model.modules():
            if isinstance(module, CoLoraLayer):
                module.check_mergeable()

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT annotates None but returns the model
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        had_no_bias = {
            name
            for name, module in self.model.named_modules()
            if isinstance(module, CoLoraLinear) and module.linear.bias is None
        }
        super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        unloaded: nn.Module = self.model
        if not merge or all(unloaded.get_submodule(name).bias is None for name in had_no_bias):
            return unloaded
        described = with_described_biases(unloaded)
        if described is None:
            warnings.warn(
                f"Merging Q gave biases to linear modules that have none in a {type(unloaded).__name__}. The "
                "merged model works as it is, but from_pretrained would drop them after a save_pretrained. "
                "Store the base model and the adapter instead.",
                UserWarning,
                stacklevel=3,
            )
        return described or unloaded


def _as_colora(peft_config: PeftConfig) -> CoLoraConfig:
    if not isinstance(peft_config, CoLoraConfig):
        raise ModelError(f"Co-LoRA needs a CoLoraConfig, got {type(peft_config).__name__}.")
    return peft_config


_FLAGS: Final = ("attention_bias", "mlp_bias")
_LLAMAS: Final = frozenset({"qwen2", "mistral"})


def with_described_biases(model: nn.Module) -> nn.Module | None:
    """The model, or a Llama of its tensors, whose configuration describes every bias, or None."""
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
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    # Whether any layer attends to a window, which Llama's do not.
    slides = kinds is not None and {*kinds} != {"full_attention"}
    slides |= kinds is None and window is not None and window < config.max_position_embeddings
    if config.model_type not in _LLAMAS or slides:
        return
    known, given = LlamaConfig().to_dict(), config.to_dict()
    kept = {name: given[name] for name in known if name in given and name not in ("model_type", *_FLAGS)}
    yield LlamaForCausalLM, LlamaConfig(**kept, attention_bias=True, mlp_bias=True)


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
