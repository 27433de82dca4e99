"""The training loss, one number per example.

The loss of an example is the mean over that example's own answer tokens and never a mean over the
tokens of the batch. Its gradient then depends on that example alone, which is what clipping per
example needs; the plain training uses the same loss so that both optimise one objective.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional

from fedmosaic.client.model.examples import IGNORED
from fedmosaic.protos.errors import ModelError

Batch = Mapping[str, torch.Tensor]
ExampleLosses = Callable[[nn.Module, Batch], torch.Tensor]
"""Maps a model and a batch of B examples to (B,) float32 losses, the i-th of example i alone."""


def example_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross entropy of each example's answer tokens given what stands before them.

    Args:
        model: Causal language model of ``transformers`` (or wrapped by PEFT).
        batch: ``input_ids``, ``attention_mask`` and ``labels``, (B, T) int64 each, labels ``IGNORED``
            outside the answer, and whatever else the model's forward takes.

    Returns:
        (B,) float32 losses in nats per token.

    Raises:
        ModelError: An example has no answer token to predict.
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
    """Logits of the next token at chosen positions of every row.

    Args:
        model: Causal language model.
        batch: Inputs of its forward, (B, T) each; ``labels`` is left out.
        positions: (K,) int64 positions in 0…T−1.

    Returns:
        (B, K, V) logits in the model's dtype.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    # The vocabulary is the widest axis by far: positions that carry no loss are worth leaving out.
    if _can_choose_positions(model):
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
    """Run the body with the model in one mode and gives every module its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _can_choose_positions(model: nn.Module) -> bool:
    get_base_model = getattr(model, "get_base_model", None)
    base = get_base_model() if callable(get_base_model) else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
