"""What must hold before the shared branch is trained privately.

Every check runs on public tokens, so that a refusal says nothing about the data and costs no budget.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedmosaic.client.dp_engine import GradientEngine
from fedmosaic.client.examples import IGNORED
from fedmosaic.client.loss import Batch, ExampleLosses, example_losses, on_device_of, training_mode
from fedmosaic.protos.errors import ModelError, PrivacyError

BATCH_GRADIENT_TOLERANCE: Final = 1e-4
"""Relative distance allowed between the rows' sum and autograd's gradient of the summed loss."""

_ALONE_TOLERANCE: Final = 1e-3
_ALONE_TOLERANCE_NARROW: Final = 0.1


def public_batch(model: nn.Module, lengths: Sequence[int] = (7, 4)) -> dict[str, torch.Tensor]:
    """Random token sequences of a fixed seed, right-padded, with the last two tokens as the answer.

    Args:
        model: Language model whose vocabulary is drawn from.
        lengths: Tokens per sequence, each at least 3.

    Returns:
        ``input_ids``, ``attention_mask``, ``labels``, (B, max length) int64 each.
    """
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]  # nn.Module hides it
    generator = torch.Generator().manual_seed(0)
    width = max(lengths)
    input_ids = torch.randint(0, vocabulary, (len(lengths), width), generator=generator)
    positions = torch.arange(width).expand(len(lengths), width)
    ends = torch.tensor(lengths).unsqueeze(1)
    attention_mask = (positions < ends).long()
    answer = (positions < ends) & (positions >= ends - 2)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": torch.where(answer, input_ids, IGNORED),
    }


def assert_only_shared_branch(
    model: nn.Module,
    cores: Mapping[str, nn.Linear],
    private_parameters: Mapping[str, nn.Parameter],
    *,
    batch: Batch | None = None,
    losses: ExampleLosses = example_losses,
) -> None:
    """Prove that nothing but the cores is trained and that no private tensor reaches the loss.

    The second part follows the data: the private tensors are made differentiable for one forward pass
    and must not appear in its graph, not even multiplied by zero.

    Args:
        model: The model as it is about to be trained.
        cores: Cores of the shared branch.
        private_parameters: Every tensor that was or will be trained without differential privacy
            (personal branch, other LoRA tensors, gates), by name.
        batch: Public tokens to try with; `public_batch` by default.
        losses: Loss of each example.

    Raises:
        PrivacyError: Another parameter is trainable, or a private tensor takes part in the forward pass.
    """
    of_cores = {id(parameter) for core in cores.values() for parameter in core.parameters()}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in of_cores]
    if others:
        raise PrivacyError(
            f"{len(others)} trainable tensor(s) outside the shared branch (first: {others[0]}); freeze them "
            "while P and Q are trained privately, and train them afterwards"
        )
    suspects = {name: p for name, p in private_parameters.items() if id(p) not in of_cores}
    if not suspects:
        return
    tried = on_device_of(model, public_batch(model) if batch is None else batch)
    with training_mode(model, False), _differentiable(suspects.values()):
        total = losses(model, tried).sum()
        if not total.requires_grad:
            return
        gradients = torch.autograd.grad(total, list(suspects.values()), allow_unused=True)
    inside = [name for name, gradient in zip(suspects, gradients, strict=True) if gradient is not None]
    if inside:
        raise PrivacyError(
            f"{len(inside)} tensor(s) trained without privacy take part in the forward pass (first: "
            f"{inside[0]}); switch those branches off and fix the gate while P and Q are trained privately"
        )


def check_engine(
    engine: GradientEngine,
    model: nn.Module,
    *,
    batch: Batch | None = None,
    losses: ExampleLosses = example_losses,
    narrow: bool = False,
) -> None:
    """Compare an engine's rows with autograd: added up, and one example at a time.

    The first comparison finds hooks that miss a core or a call; the second finds a loss or a layer that
    mixes examples, whose gradients no clipping can bound.

    Args:
        engine: The engine about to be used.
        model: The model as it is about to be trained.
        batch: At least two public examples of different lengths; `public_batch` by default.
        losses: Loss of each example.
        narrow: Whether the loss computes in less than float32, as the model itself may; see `is_narrow`.

    Raises:
        ModelError: A comparison fails, all gradients are zero, or a layer mixes examples while it trains.
    """
    mixing = next((name for name, m in model.named_modules() if isinstance(m, _BatchNorm)), None)
    if mixing is not None:
        raise ModelError(
            f"layer {mixing} normalises over the batch while it trains, so an example's gradient cannot be "
            "clipped alone; give a model without batch normalisation"
        )
    tried = on_device_of(model, public_batch(model) if batch is None else batch)
    with training_mode(model, False):
        rows_BD = engine.example_gradients(tried)
        expected_D = _batch_gradient(engine.cores, model, tried, losses)
        scale = float(expected_D.norm())
        if not scale > 0.0 or not torch.isfinite(rows_BD).all():
            raise ModelError(
                "the shared branch has no finite gradient other than zero, so training would move nothing; "
                "check the adapter's bases and the model's weights"
            )
        error = float((rows_BD.sum(dim=0) - expected_D).norm()) / scale
        if not error <= BATCH_GRADIENT_TOLERANCE:
            raise ModelError(
                f"per-example gradients do not add up to the batch gradient (relative error {error:.1e}, "
                f"allowed {BATCH_GRADIENT_TOLERANCE:.0e}); a core is called where the hooks cannot see it"
            )
        narrow = narrow or is_narrow(model, autocast=False)
        _check_alone(engine, tried, rows_BD, _ALONE_TOLERANCE_NARROW if narrow else _ALONE_TOLERANCE)


def is_narrow(model: nn.Module, *, autocast: bool) -> bool:
    """Whether a model computes in less than float32 somewhere.

    The rounding of such a product depends on the padding and on the rest of the batch, by up to per cents of
    an example's gradient and with one sign for all of them, so that the sum over a batch would move by more
    than the clipping norm when one example is added: examples have to be alone in their batch. The same
    holds for float32 products that PyTorch may compute in TF32 or bfloat16.

    Args:
        model: The model.
        autocast: Whether the loss runs under bfloat16 autocast.
    """
    fast = torch.get_float32_matmul_precision() != "highest"
    return autocast or fast or any(parameter.dtype.itemsize < 4 for parameter in model.parameters())


@contextmanager
def _differentiable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _batch_gradient(
    cores: Mapping[str, nn.Linear], model: nn.Module, batch: Batch, losses: ExampleLosses
) -> torch.Tensor:
    parameters = [parameter for core in cores.values() for parameter in (core.weight, core.bias)]
    gradients = torch.autograd.grad(losses(model, batch).sum(), parameters)
    return torch.cat([gradient.flatten() for gradient in gradients])


def _check_alone(engine: GradientEngine, batch: Batch, rows: torch.Tensor, tolerance: float) -> None:
    scale = float(rows.norm(dim=1).max())
    for index, row in enumerate(rows):
        alone = engine.example_gradients({name: tensor[index : index + 1] for name, tensor in batch.items()})
        error = float((alone[0] - row).norm()) / scale
        if not error <= tolerance:
            raise ModelError(
                f"an example's gradient changes by {error:.1e} (relative) with the rest of its batch, "
                f"allowed {tolerance:.0e}; a layer or the loss mixes examples, so none can be clipped alone"
            )
