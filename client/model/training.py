"""Plain local fine-tuning, without differential privacy: what it trains must not leave unprotected."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from torch import nn

from fedmosaic.client.colora.layer import CoLoraLayer
from fedmosaic.client.colora.linear import CoLoraLinear
from fedmosaic.client.model.examples import EncodedExample, collate
from fedmosaic.client.model.fingerprint import base_model
from fedmosaic.client.model.loss import (
    Batch,
    ExampleLosses,
    example_losses,
    in_bfloat16,
    on_device_of,
    training_mode,
)
from fedmosaic.client.settings import Role
from fedmosaic.client.settings import TrainingSettings as TrainingSettings
from fedmosaic.protos.errors import ConfigurationError, ModelError, StateError, TrainingError

_STATE: Final = ("size", "seed", "epoch", "position")


class EpochSampler:
    """Walks over all examples in a fresh random order per epoch, and can be stopped and resumed."""

    def __init__(self, size: int, seed: int) -> None:
        """Begin over `size` examples; equal seeds give equal orders."""
        if size < 1 or seed < 0:
            raise ConfigurationError(
                f"a sampler over {size} examples with seed {seed}; give at least one and a seed of 0 or more"
            )
        self._size, self._seed, self._epoch, self._position = size, seed, 0, 0

    def take(self, count: int) -> list[int]:
        """The next ``count`` indices; an epoch's end inside them is stepped over."""
        taken: list[int] = []
        while len(taken) < count:
            order = np.random.default_rng([self._seed, self._epoch]).permutation(self._size)
            part = order[self._position : self._position + count - len(taken)].tolist()
            taken += part
            self._position += len(part)
            if self._position == self._size:
                self._epoch, self._position = self._epoch + 1, 0
        return taken

    def state_dict(self) -> dict[str, int]:
        """Where the walk stands, as plain integers."""
        values = (self._size, self._seed, self._epoch, self._position)
        return dict(zip(_STATE, values, strict=True))

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where another sampler stood; over another number of examples, with the next epoch."""
        values = [state.get(name) for name in _STATE] if isinstance(state, dict) else []
        if not values or any(type(value) is not int or value < 0 for value in values):
            raise StateError(f"the sampler's state must hold {', '.join(_STATE)}, none below 0")
        size, seed, epoch, position = (state[name] for name in _STATE)
        if position >= size:
            raise StateError(f"the sampler's state is at example {position} of {size}")
        # Their order within the epoch that was left says nothing about the examples that there are now.
        self._seed = seed
        self._epoch, self._position = (epoch, position) if size == self._size else (epoch + 1, 0)


Progress = Callable[[int, int, float], None]
"""Called after every optimizer step with the step (from 1), the planned steps and the step's mean loss.

The loss is a function of private examples: show it to the client's own people, send it nowhere.
"""
_AVERAGED_STEPS: Final = 10


@dataclass(frozen=True)
class TrainingReport:
    """What one call of `train_local` did. Losses and counts depend on private data and stay here.

    Attributes:
        first_loss: Mean loss (nats per token) of the first steps, at most ten and at most half of all.
        last_loss: Mean loss of as many last steps.
        weights_unmoved: Names of the trainable tensors that did not change.
    """

    first_loss: float = field(repr=False)
    last_loss: float = field(repr=False)
    weights_unmoved: tuple[str, ...]


def trainable_by_role(model: nn.Module) -> dict[Role, dict[str, nn.Parameter]]:
    """Sort every trainable tensor, by name, into one group of learning rate; ModelError if there is none.

    The groups follow the tensors themselves, not their names: a module named ``gate_proj`` is no gate.
    """
    roles: dict[int, Role] = {}
    for module in model.modules():
        if isinstance(module, CoLoraLayer):
            if isinstance(module, CoLoraLinear):
                cores = (getattr(module, name) for name in module.adapter_layer_names)
                roles |= {id(p): "shared" for core in cores for p in core.parameters()}
            roles |= {id(p): "gate" for p in module.colora_gate.parameters()}
    groups: dict[Role, dict[str, nn.Parameter]] = {"adapter": {}, "shared": {}, "gate": {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[roles.get(id(parameter), "adapter")][name] = parameter
    if not any(groups.values()):
        raise ModelError("nothing in the model is trainable; add an adapter or call set_trainable first")
    return groups


def train_local(
    model: nn.Module,
    examples: Sequence[EncodedExample],
    settings: TrainingSettings,
    *,
    pad_token_id: int,
    sampler: EpochSampler | None = None,
    losses: ExampleLosses = example_losses,
    progress: Progress | None = None,
) -> TrainingReport:
    """Fine-tune whatever is trainable in the model with AdamW; deterministic by seed.

    The tensors are changed in place, the training mode is restored. The examples come in the order of the
    sampler, which is moved on, or of a fresh one of the settings' seed. ConfigurationError without an
    example; ModelError if nothing is trainable; TrainingError if a loss or gradient is not finite, or no
    weight changed: nothing is put back.
    """
    if not examples:
        raise ConfigurationError("there is no example to train on; give at least one")
    order = EpochSampler(len(examples), settings.seed) if sampler is None else sampler
    groups = trainable_by_role(model)
    optimizer = _optimizer(groups, settings)
    rising = max(1, settings.warmup)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / rising))
    trained = {name: parameter for group in groups.values() for name, parameter in group.items()}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    loss_of = in_bfloat16(losses) if settings.bf16 else losses
    history: list[float] = []
    recomputed = checkpointing(model, settings.gradient_checkpointing)
    with training_mode(model, True), recomputed, _seeded(settings.seed, order, model):
        for step in range(1, settings.steps + 1):
            batches = (
                collate([examples[i] for i in order.take(settings.per_device_train_batch_size)], pad_token_id)
                for _ in range(settings.gradient_accumulation_steps)
            )
            history.append(_accumulate(model, batches, settings, loss_of, step))
            norm = torch.nn.utils.clip_grad_norm_([*trained.values()], settings.max_grad_norm or math.inf)
            _check_finite("gradient", norm, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            warmup.step()
            if progress is not None:
                progress(step, settings.steps, history[-1])
    return _report(trained, before, history)


@contextmanager
def checkpointing(model: nn.Module, active: bool) -> Iterator[None]:
    """Recompute activations while the body runs (not the reentrant kind, which hooks cannot see through)."""
    if not active:
        yield
        return
    base = base_model(model)
    # The older name goes with transformers 6, the newer one is not in all that may be installed here.
    name = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    try:
        getattr(base, f"{name}_checkpointing_enable")({"use_reentrant": False})
    except (AttributeError, ValueError) as error:
        raise ModelError(
            f"{type(base).__name__} cannot recompute its activations ({error}); set "
            "training.gradient_checkpointing = false, and lower training.per_device_train_batch_size instead"
        ) from error
    try:
        yield
    finally:
        getattr(base, f"{name}_checkpointing_disable")()


def _optimizer(groups: dict[Role, dict[str, nn.Parameter]], settings: TrainingSettings) -> torch.optim.AdamW:
    parts = [
        {
            "params": list(group.values()),
            "lr": settings.learning_rate_of(role),
            # Decay would pull a gate's logit towards 0, that is its weight towards one half.
            "weight_decay": 0.0 if role == "gate" else settings.weight_decay,
        }
        for role, group in groups.items()
        if group
    ]
    # An adapter is hundreds of small tensors: one kernel each, in place of ten.
    return torch.optim.AdamW(parts, fused=True)


@contextmanager
def _seeded(seed: int, order: EpochSampler, model: nn.Module) -> Iterator[None]:
    # Another place in the data gives other dropout masks, so that rounds do not repeat theirs.
    state = order.state_dict()
    sequence = np.random.SeedSequence([seed, state["epoch"], state["position"]])
    device = next(model.parameters()).device
    devices, kind = ([], "cuda") if device.type == "cpu" else ([device.index or 0], device.type)
    with torch.random.fork_rng(devices=devices, device_type=kind):
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))
        yield


def _accumulate(
    model: nn.Module, batches: Iterable[Batch], settings: TrainingSettings, losses: ExampleLosses, step: int
) -> float:
    total = 0.0
    for batch in batches:
        loss = losses(model, on_device_of(model, batch)).mean() / settings.gradient_accumulation_steps
        _check_finite("loss", loss, step)
        loss.backward()
        total += float(loss.detach())
    return total


def _check_finite(what: str, value: torch.Tensor, step: int) -> None:
    if not bool(torch.isfinite(value)):
        raise TrainingError(
            f"the {what} of step {step} is not finite; lower the learning rates, or switch bf16 off", step
        )


def _report(
    trained: dict[str, nn.Parameter], before: dict[str, torch.Tensor], history: list[float]
) -> TrainingReport:
    unmoved = tuple(name for name, parameter in trained.items() if torch.equal(parameter, before[name]))
    if len(unmoved) == len(trained):
        raise TrainingError(
            f"training changed none of the {len(trained)} trainable tensors; check that the adapter is "
            "active and its branches take part in the forward pass",
            len(history),
        )
    count = max(1, min(_AVERAGED_STEPS, len(history) // 2))
    return TrainingReport(
        first_loss=math.fsum(history[:count]) / count,
        last_loss=math.fsum(history[-count:]) / count,
        weights_unmoved=unmoved,
    )
