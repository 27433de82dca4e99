"""Parts of the baselines: several ordinary LoRA adapters on one model, switched, read and written."""

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedmosaic.client.colora import find_decoder_layers
from fedmosaic.client.model.load import load_model, without_rename_notice
from fedmosaic.client.model.loss import logits_at
from fedmosaic.client.settings import ModelSettings
from fedmosaic.client.vision.projector import has_tower
from fedmosaic.privacy.federation.terms import AdapterTerms
from fedmosaic.protos.errors import ModelError

Vector = np.ndarray[tuple[int], np.dtype[np.float32]]


def load_with_lora(
    settings: ModelSettings,
    terms: AdapterTerms,
    names: Sequence[str],
    rank: int,
    seed: int,
    *,
    alike: bool = True,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load a base model and put LoRA adapters on it that add nothing at first (B = 0).

    α over rank is that of the terms. The seed is of the initial A; with `alike` all adapters start with the
    same one.
    """
    base, tokenizer = load_model(settings)
    config = LoraConfig(
        r=rank,
        lora_alpha=terms.alpha / terms.rank * rank,  # type: ignore[arg-type]  # PEFT divides it only
        lora_dropout=0.0,
        target_modules=list(terms.target_modules),
        exclude_modules=_outside_language_part(base) if has_tower(base) else None,
        task_type=TaskType.CAUSAL_LM,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with without_rename_notice():
                model = get_peft_model(base, config, adapter_name=names[0])
        except ValueError as error:
            raise ModelError(f"{settings.path} cannot carry LoRA: {error}") from error
        if not isinstance(model, PeftModel):
            raise ModelError(f"{settings.path} gave a {type(model).__name__}, not a single PEFT model")
        for name in names[1:]:
            model.add_adapter(name, config)
    for name in names[1:] if alike else ():
        write_adapter(model, name, read_adapter(model, names[0]))
    return model, tokenizer


def _outside_language_part(model: nn.Module) -> str:
    """Pattern of all modules that are not in the decoder's layers, such as those of a vision tower."""
    return rf"(?!{re.escape(find_decoder_layers(model)[0])}\.).*"


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """Adapted modules by name, in the fixed order of all vectors."""
    return sorted(
        ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)),
        key=lambda item: item[0],
    )


def factors(model: nn.Module, adapter: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(A (r, d_in), B (d_out, r)) of every adapted module: the parameters themselves."""
    pairs = []
    for _, layer in lora_layers(model):
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        if not isinstance(down, torch.Tensor) or not isinstance(up, torch.Tensor):
            raise ModelError(f"the adapter {adapter!r} is not ordinary LoRA")
        pairs.append((down, up))
    return pairs


def read_adapter(model: nn.Module, adapter: str) -> Vector:
    """All A and B of an adapter, end to end; a copy, float32."""
    parts = [part.detach().reshape(-1).float().cpu() for pair in factors(model, adapter) for part in pair]
    return torch.cat(parts).numpy()


@torch.no_grad()
def write_adapter(model: nn.Module, adapter: str, vector: Vector) -> None:
    """Write what `read_adapter` reads; `ModelError` for another length, or values that are not finite."""
    tensors = [part for pair in factors(model, adapter) for part in pair]
    size = sum(tensor.numel() for tensor in tensors)
    if vector.shape != (size,) or not np.isfinite(vector).all():
        raise ModelError(f"the adapter takes {size} finite values, got {vector.shape} or some not finite")
    start = 0
    for tensor in tensors:
        tensor.copy_(torch.from_numpy(vector[start : start + tensor.numel()]).view_as(tensor))
        start += tensor.numel()


@contextmanager
def using(
    model: PeftModel, active: Collection[str], trainable: Collection[str] = (), scale: float = 1.0
) -> Iterator[None]:
    """Let some adapters take part in the forward pass, and train some of them; switches back afterwards."""
    layers = [layer for _, layer in lora_layers(model)]
    before = [(list(layer.active_adapters), dict(layer.scaling)) for layer in layers]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for layer in layers:
            layer._active_adapter = list(active)
            for name in active:
                layer.scaling[name] = layer.scaling[name] * scale
            for name in layer.lora_A:
                layer.lora_A[name].requires_grad_(name in trainable)
                layer.lora_B[name].requires_grad_(name in trainable)
        yield
    finally:
        for layer, (names, scaling) in zip(layers, before, strict=True):
            layer._active_adapter = names
            layer.scaling.update(scaling)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@dataclass
class _Output:
    logits: torch.Tensor


class SummedLogits(nn.Module):
    """A model whose logits are the sum of its logits with each of several adapters alone (FedSim)."""

    def __init__(self, model: PeftModel, adapters: Sequence[str], trainable: Collection[str] = ()) -> None:
        super().__init__()
        self.inner = model
        self.config: Any = model.config
        self._adapters, self._trainable = tuple(adapters), tuple(trainable)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: torch.Tensor,
        use_cache: bool = False,
    ) -> _Output:
        """Logits (B, K, V) at the chosen positions; nothing is cached between adapters."""
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        parts = []
        for adapter in self._adapters:
            with using(self.inner, [adapter], self._trainable):
                parts.append(logits_at(self.inner, batch, logits_to_keep).float())
        return _Output(torch.stack(parts).sum(dim=0))
