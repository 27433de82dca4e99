"""The training loss, one number per example, and the model under all wrappers.

The loss of an example is the mean over that example's own answer tokens and never a mean over the tokens of
the batch. Its gradient then depends on that example alone, which is what clipping per example needs; the
plain training uses the same loss so that both optimise one objective.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fedmosaic.client.model.examples import IGNORED
from fedmosaic.protos.errors import ModelError


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's own weights by their bfloat16 value, adapters and wrappers left out."""
    base = base_model(model)
    adapted = tuple(f"{name}." for name, module in base.named_modules() if hasattr(module, "base_layer"))
    digest = hashlib.sha256(b"fedmosaic probe 1\n")
    weights = dict(base.named_parameters())
    for name in sorted(weights, key=lambda full: full.replace(".base_layer.", ".")):
        if name.startswith(adapted) and ".base_layer." not in name:
            continue
        weight = weights[name].detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name.replace('.base_layer.', '.')} {list(weight.shape)}\n".encode())
        digest.update(weight.view(torch.int16).numpy().astype("<i2", copy=False).data)
    return digest.hexdigest()


def base_model(model: nn.Module) -> Any:
    """The transformers model inside a peft wrapper; its methods are found at run time only."""
    find: Any = getattr(model, "get_base_model", None)
    return model if find is None else find()


Batch = Mapping[str, torch.Tensor]
ExampleLosses = Callable[[nn.Module, Batch], torch.Tensor]
"""Maps a model and a batch of B examples to (B,) float32 losses, the i-th of example i alone."""


def example_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross entropy (B,) of each example's answer tokens given what stands before them, nats per token.

    The batch has ``input_ids``, ``attention_mask`` and ``labels``, (B, T) int64 each, labels ``IGNORED``
    outside the answer, and whatever else the model's forward takes. An example without an answer is a
    ModelError.
    """
    targets_BT = batch["labels"][:, 1:]
    supervised_BT = targets_BT != IGNORED
    tokens_B = supervised_BT.sum(dim=1)
    if not bool((tokens_B > 0).all()):
        raise ModelError("an example has no answer token to learn; encode it with encode_examples")
    positions_K = supervised_BT.any(dim=0).nonzero().squeeze(1)
    targets_BK = targets_BT[:, positions_K]
    logits_BKV = logits_at(model, batch, positions_K)
    losses_BK = functional.cross_entropy(
        logits_BKV.flatten(0, 1).float(), targets_BK.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(targets_BK)
    return losses_BK.sum(dim=1) / tokens_B


def logits_at(model: nn.Module, batch: Batch, positions: torch.Tensor) -> torch.Tensor:
    """Logits (B, K, V) of the next token at positions (K,) of every row, in the model's dtype."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    # The vocabulary is the widest axis by far: positions that carry no loss are worth leaving out.
    if "logits_to_keep" in inspect.signature(base_model(model).forward).parameters:
        logits = model(**inputs, use_cache=False, logits_to_keep=positions).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, positions]
    if not isinstance(logits, torch.Tensor):
        raise ModelError(f"{type(model).__name__} returned no logits; use a causal language model")
    return logits


def on_device_of(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """The batch on the device of the model's first parameter."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def in_bfloat16(losses: ExampleLosses = example_losses) -> ExampleLosses:
    """The same losses with the model's wide products in bfloat16 (autocast); Co-LoRA stays in float32."""

    def narrow(model: nn.Module, batch: Batch) -> torch.Tensor:
        device = next(model.parameters()).device
        with torch.autocast(device_type=device.type, dtype=torch.bfloat16):
            return losses(model, batch)

    return narrow


@contextmanager
def training_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Run the body with the model in one mode, and give every module its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def cut_at(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Make every output of a module a leaf of the graph, and collect it: gradients are taken at these."""
    leaves: list[torch.Tensor] = []

    def cut(_module: nn.Module, _arguments: object, output: torch.Tensor) -> torch.Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    handle = module.register_forward_hook(cut)
    try:
        yield leaves
    finally:
        handle.remove()
