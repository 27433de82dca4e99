"""Per-example gradients of the shared branch's cores, clipped and summed.

A core is a linear module r → r with weight P and bias Q. With u_it its input and e_it the gradient of
example i's loss with respect to its output at position t,

    ∂L_i/∂P = Σ_t e_it u_itᵀ          ∂L_i/∂Q = Σ_t e_it

so two hooks per core give every example's exact gradient in one backward pass, without a tensor as
wide as the model. Legend of axes: B examples, T positions, I and J coordinates of the core, D all
numbers of all cores.

Both engines hand over the same rows (B, D). Clipping is done once, by `fedmosaic.privacy.mechanism`:
each row is brought to an integer grid within the clipping norm, a row that is not finite becomes zero
(its contribution is then within the bound like any other's, and no NaN can reach the release). Sums
of integers are exact, so neither the split into physical batches nor their order changes a bit of it.

Reference:
    Goodfellow, "Efficient per-example gradient computations", arXiv 1510.01799; Abadi et al., "Deep
    learning with differential privacy", CCS 2016, algorithm 1.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Final, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from opacus import GradSampleModule
from torch import nn

from fedmosaic.client.loss import Batch, ExampleLosses, example_losses, on_device_of
from fedmosaic.privacy.mechanism import ClippedSum, clip
from fedmosaic.protos.errors import ModelError

EngineName = Literal["closed_form", "opacus"]

MAXIMUM_DIMENSIONS: Final = 2**20
"""Most coordinates for which the clipping's rounding margin is proved (`fedmosaic.privacy.mechanism`)."""

_CLIPPED_AT_ONCE: Final = 2**22


@runtime_checkable
class GradientEngine(Protocol):
    """Computes the gradient of every example of a batch by itself."""

    cores: Mapping[str, nn.Linear]

    def example_gradients(self, batch: Batch) -> torch.Tensor:
        """Gradient of each example's loss with respect to all cores.

        Args:
            batch: B ≥ 1 collated examples.

        Returns:
            (B, D) float32; columns are the cores in order, P row by row, then Q.

        Raises:
            ModelError: A core takes no part in the loss, or its first axis is not the examples'.
        """
        ...


class ClosedFormEngine:
    """Gradients from the cores' inputs and back-signals; the default.

    Args:
        model: Model that holds the cores, its other parameters frozen.
        cores: The cores by name; the order fixes the order of the coordinates.
        losses: Loss of each example, of that example alone.
    """

    def __init__(
        self, model: nn.Module, cores: Mapping[str, nn.Linear], losses: ExampleLosses = example_losses
    ) -> None:
        self.cores: Mapping[str, nn.Linear] = check_cores(cores)
        self._model = model
        self._losses = losses

    def example_gradients(self, batch: Batch) -> torch.Tensor:
        """See `GradientEngine.example_gradients`."""
        names: list[str] = []
        inputs: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []

        def keep(name: str, received: torch.Tensor, produced: torch.Tensor) -> None:
            # The recomputation of a checkpointed forward runs the hooks again, outside this graph.
            if collecting and produced.requires_grad:
                names.append(name)
                inputs.append(received.detach())
                outputs.append(produced)

        collecting = True
        with _hooked(self.cores, keep):
            losses_B = self._losses(self._model, on_device_of(self._model, batch))
            collecting = False
            check_losses(losses_B, batch)
            # Asked for the back-signals alone, autograd never forms the sums over the batch.
            signals = torch.autograd.grad(losses_B.sum(), outputs, allow_unused=True) if outputs else ()
        missing = set(self.cores) - {
            name for name, signal in zip(names, signals, strict=True) if signal is not None
        }
        if missing:
            raise ModelError(_unused(missing))
        return self._rows(names, inputs, signals, len(losses_B))

    def _rows(
        self,
        names: list[str],
        inputs: list[torch.Tensor],
        signals: tuple[torch.Tensor | None, ...],
        examples: int,
    ) -> torch.Tensor:
        parts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, received, signal in zip(names, inputs, signals, strict=True):
            if signal is None:
                continue
            if received.shape[0] != examples or received.dim() < 2:
                raise ModelError(
                    f"core {name} received {tuple(received.shape)} for a batch of {examples}; its first axis "
                    "must be the examples, or their gradients cannot be told apart"
                )
            u_BTJ = received.float().reshape(examples, -1, received.shape[-1])
            e_BTI = signal.float().reshape(examples, -1, signal.shape[-1])
            weight_BIJ, bias_BI = torch.bmm(e_BTI.transpose(1, 2), u_BTJ), e_BTI.sum(dim=1)
            if name in parts:
                weight_BIJ, bias_BI = weight_BIJ + parts[name][0], bias_BI + parts[name][1]
            parts[name] = (weight_BIJ, bias_BI)
        return torch.cat([tensor.flatten(1) for name in self.cores for tensor in parts[name]], dim=1)


class OpacusEngine:
    """Gradients from Opacus's hooks, an independent implementation of the same rows.

    Opacus wraps the cores alone: their hooks fire wherever the model calls them, and the model keeps
    its names, its buffers and its mode. Use it as a context manager, or call `close`.

    Args:
        model: Model that holds the cores, its other parameters frozen.
        cores: The cores by name; the order fixes the order of the coordinates.
        losses: Loss of each example, of that example alone.
    """

    def __init__(
        self, model: nn.Module, cores: Mapping[str, nn.Linear], losses: ExampleLosses = example_losses
    ) -> None:
        self.cores: Mapping[str, nn.Linear] = check_cores(cores)
        self._model = model
        self._losses = losses
        self._wrapped = GradSampleModule(nn.ModuleList(self.cores.values()), loss_reduction="sum")
        self._wrapped.disable_hooks()

    def __enter__(self) -> "OpacusEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take Opacus's hooks and attributes off the cores again."""
        self._wrapped.to_standard_module()

    def example_gradients(self, batch: Batch) -> torch.Tensor:
        """See `GradientEngine.example_gradients`."""
        # Opacus captures nothing from modules in evaluation mode; a linear module has no other difference.
        modes = {core: core.training for core in self.cores.values()}
        try:
            self._wrapped.train()
            self._wrapped.enable_hooks()
            losses_B = self._losses(self._model, on_device_of(self._model, batch))
            check_losses(losses_B, batch)
            losses_B.sum().backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped
            return self._rows(len(losses_B))
        finally:
            self._wrapped.disable_hooks()
            for core, training in modes.items():
                core.train(training)
            self._forget()

    def _forget(self) -> None:
        # What is left in .grad and .grad_sample is private and has no noise; what a failed call left
        # behind would be taken for the next call's.
        self._wrapped.zero_grad(set_to_none=True)
        for core in self.cores.values():
            for leftover in ("activations", "max_batch_len"):
                if hasattr(core, leftover):
                    delattr(core, leftover)
            for parameter in core.parameters():
                if hasattr(parameter, "_current_grad_sample"):
                    del parameter._current_grad_sample
                parameter._forward_counter = 0  # type: ignore[attr-defined]  # Opacus's own

    def _rows(self, examples: int) -> torch.Tensor:
        samples = {
            name: [getattr(parameter, "grad_sample", None) for parameter in (core.weight, core.bias)]
            for name, core in self.cores.items()
        }
        missing = {name for name, pair in samples.items() if any(sample is None for sample in pair)}
        if missing:
            raise ModelError(_unused(missing))
        rows = [
            sample.float().flatten(1) for pair in samples.values() for sample in pair if sample is not None
        ]
        if any(len(row) != examples for row in rows):
            raise ModelError(
                f"the cores' first axis has {sorted({len(row) for row in rows})} entries for a batch of "
                f"{examples}; it must be the examples, or their gradients cannot be told apart"
            )
        return torch.cat(rows, dim=1)


def clip_and_sum(rows: torch.Tensor, max_grad_norm: float) -> ClippedSum:
    """Clip every row to a norm of at most ``max_grad_norm`` and adds the rows up.

    Args:
        rows: (B, D) gradients, any values; a row that is not finite counts as zero.
        max_grad_norm: Bound C > 0 on the L2 norm of a row.

    Returns:
        The private sum in units of C / 2²⁴, D entries.
    """
    examples, dimensions = rows.shape
    values: npt.NDArray[np.float32] = rows.detach().float().cpu().numpy()
    total = ClippedSum.empty(dimensions)
    step = max(1, _CLIPPED_AT_ONCE // dimensions)
    for start in range(0, examples, step):
        part = values[start : start + step]
        units, shortened = clip(part, max_grad_norm)
        rejected = int((~np.isfinite(part).all(axis=1)).sum())
        total = total + ClippedSum(units.sum(axis=0), int(shortened.sum()), rejected, len(part))
    return total


def dimensions_of(cores: Mapping[str, nn.Linear]) -> int:
    """Number D of coordinates of all cores together."""
    return sum(parameter.numel() for core in cores.values() for parameter in core.parameters())


def check_cores(cores: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
    """Refuse cores that cannot be trained privately.

    Args:
        cores: Cores by name.

    Returns:
        A copy of the mapping.

    Raises:
        ModelError: There is none, one is no trainable float32 ``nn.Linear`` with a bias, two names share
            a core, or there are too many coordinates.
    """
    if not cores:
        raise ModelError("there is no core to train; add a Co-LoRA adapter to the model first")
    for name, core in cores.items():
        if type(core) is not nn.Linear or core.bias is None:
            raise ModelError(f"core {name} is a {type(core).__name__}; it must be nn.Linear with a bias")
        if not all(parameter.requires_grad for parameter in core.parameters()):
            raise ModelError(f"core {name} is frozen; make the shared branch trainable first")
        if any(parameter.dtype != torch.float32 for parameter in core.parameters()):
            raise ModelError(
                f"core {name} has dtype {core.weight.dtype}; keep cores in float32, whatever the model's"
            )
    if len({id(core) for core in cores.values()}) != len(cores):
        raise ModelError("two names stand for one core; name every core once")
    if dimensions_of(cores) > MAXIMUM_DIMENSIONS:
        raise ModelError(
            f"the cores have {dimensions_of(cores)} coordinates, more than {MAXIMUM_DIMENSIONS}; "
            "lower the rank"
        )
    return dict(cores)


def check_losses(losses: torch.Tensor, batch: Batch) -> None:
    """Refuse a loss that is not one number per example.

    Raises:
        ModelError: The losses' shape is not (B,).
    """
    examples = len(batch["input_ids"])
    if losses.shape != (examples,):
        raise ModelError(
            f"the loss has shape {tuple(losses.shape)} for {examples} examples; return one loss per example"
        )


@contextmanager
def _hooked(
    cores: Mapping[str, nn.Linear], keep: Callable[[str, torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    def observe(name: str, _: nn.Module, received: tuple[torch.Tensor, ...], produced: torch.Tensor) -> None:
        keep(name, received[0], produced)

    handles = [core.register_forward_hook(partial(observe, name)) for name, core in cores.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _unused(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return (
        f"{len(names)} core(s) take no part in the loss (first: {shown}); switch the adapter and its shared "
        "branch on, call cores as modules, and use no reentrant gradient checkpointing"
    )
