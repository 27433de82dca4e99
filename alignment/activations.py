"""Moments of what goes in and out of the adapted modules of two models, streamed over public text.

Memory does not grow with the amount of text: it holds one batch of activations and, per adapted module,
second moments of inputs, outputs and (on request) gradients by the outputs.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedmosaic.alignment.moments import Moments, MomentSums
from fedmosaic.alignment.pairing import PairedBatch, Progress, Reading, Spans, paired_batches, run_decoder
from fedmosaic.alignment.tokens import PublicText
from fedmosaic.client.colora.placement import plan_placements
from fedmosaic.client.model.examples import IGNORED
from fedmosaic.client.model.loss import Batch, logits_at, on_device_of
from fedmosaic.protos.errors import ModelError

ModuleKey = tuple[int, str]
"""Block and name within the decoder layer: what corresponds across architectures."""


@dataclass(frozen=True, eq=False)
class Side:
    """One model of a pair, without adapters and in evaluation mode.

    It has its shared layers, one per block, and the full name of each adapted module.
    """

    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    layers: tuple[int, ...]
    names: Mapping[ModuleKey, str] = field(repr=False)

    def linear(self, key: ModuleKey) -> nn.Linear:
        """The adapted linear module."""
        module = self.model.get_submodule(self.names[key])
        if not isinstance(module, nn.Linear):
            raise ModelError(f"{self.names[key]} is a {type(module).__name__}, not a torch.nn.Linear.")
        return module


@dataclass(frozen=True, eq=False)
class PairMoments:
    """Second moments of a pair of models, by adapted module, over aligned positions of some texts.

    Outputs, and gradients of the loss by them, are empty unless asked for.
    """

    inputs: Mapping[ModuleKey, Moments] = field(repr=False)
    outputs: Mapping[ModuleKey, Moments] = field(repr=False)
    gradients: Mapping[ModuleKey, Moments] = field(repr=False)
    texts: int
    positions: int

    @property
    def centred_outputs(self) -> Mapping[ModuleKey, Moments]:
        """Covariances of the outputs."""
        return {key: moments.centred() for key, moments in self.outputs.items()}


def open_side(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[int],
    target_modules: Sequence[str] | None = None,
) -> Side:
    """Name the adapted modules (None: all linear ones) of a model's shared layers, one per block."""
    plan = plan_placements(model, layers, target_modules, family=False)
    names = {(place.block or 0, place.module): name for name, place in plan.items()}
    return Side(model, tokenizer, tuple(layers), names)


def collect(
    anchor: Side,
    model: Side,
    texts: Sequence[PublicText],
    reading: Reading,
    *,
    outputs: bool = True,
    gradients: bool = False,
    progress: Progress | None = None,
) -> PairMoments:
    """Read public text with both models and accumulate the moments of their adapted modules.

    The anchor as its own model gives moments of the anchor alone. Differentiating the loss by the outputs is
    about three times the work. `ModelError` if the models do not have the same modules, share no characters
    on the text, or give activations that are not finite.
    """
    if set(anchor.names) != set(model.names):
        differing = sorted({f"block {b}: {m}" for b, m in set(anchor.names) ^ set(model.names)})
        raise ModelError(
            f"The models differ in their adapted modules: {', '.join(differing[:8])}. Restrict "
            "--target-modules to modules that all models have."
        )
    sums = _Sums(tuple(anchor.names), outputs=outputs)
    for batch in paired_batches(anchor.tokenizer, model.tokenizer, texts, reading, progress):
        left = _read(anchor, batch.anchor, gradients=gradients)
        right = left if model is anchor else _read(model, batch.model, gradients=gradients)
        sums.update(batch, left, right)
    return sums.finish(len(texts))


@dataclass(frozen=True, eq=False)
class _Captured:
    inputs: dict[ModuleKey, torch.Tensor] = field(default_factory=dict)
    outputs: dict[ModuleKey, torch.Tensor] = field(default_factory=dict)
    gradients: dict[ModuleKey, torch.Tensor] = field(default_factory=dict)


class _Sums:
    """Sums of every module; modules that read the same tensor share the sums of their inputs."""

    def __init__(self, keys: Sequence[ModuleKey], *, outputs: bool) -> None:
        self._keys = keys
        self._inputs: dict[ModuleKey, MomentSums] = {}
        self._outputs = {key: MomentSums() for key in keys} if outputs else {}
        self._gradients = {key: MomentSums() for key in keys}
        self._leader: dict[ModuleKey, ModuleKey] = {}

    def update(self, batch: PairedBatch, left: _Captured, right: _Captured) -> None:
        if not self._leader:
            self._leader = _leaders(self._keys, left, right)
            self._inputs = {key: MomentSums() for key in set(self._leader.values())}
        for key in self._keys:
            if key in self._inputs:
                _add(self._inputs[key], batch, left.inputs[key], right.inputs[key], Spans.mean)
            if key in self._outputs:
                _add(self._outputs[key], batch, left.outputs[key], right.outputs[key], Spans.mean)
            if key in left.gradients:
                _add(self._gradients[key], batch, left.gradients[key], right.gradients[key], Spans.sum)

    def finish(self, texts: int) -> PairMoments:
        inputs = {key: sums.finish() for key, sums in self._inputs.items()}
        return PairMoments(
            inputs={key: inputs[self._leader[key]] for key in self._keys},
            outputs={key: sums.finish() for key, sums in self._outputs.items()},
            gradients={key: sums.finish() for key, sums in self._gradients.items() if sums.count},
            texts=texts,
            positions=next(iter(inputs.values())).count,
        )


def _add(
    sums: MomentSums,
    batch: PairedBatch,
    left: torch.Tensor,
    right: torch.Tensor,
    pool: Callable[[Spans, torch.Tensor], torch.Tensor],
) -> None:
    rows = pool(batch.anchor_spans, left)
    # The very same tensor on both sides: moments of the anchor alone.
    sums.update(rows, rows if left is right else pool(batch.model_spans, right))


def _leaders(keys: Sequence[ModuleKey], left: _Captured, right: _Captured) -> dict[ModuleKey, ModuleKey]:
    """For each module the first one whose input is the very same tensor in both models."""
    # By address: all captured tensors are alive, so equal addresses mean one tensor.
    first: dict[tuple[int, int], ModuleKey] = {}
    return {
        key: first.setdefault((left.inputs[key].data_ptr(), right.inputs[key].data_ptr()), key)
        for key in keys
    }


def _read(side: Side, batch: Batch, *, gradients: bool) -> _Captured:
    with _tapped(side, gradients=gradients) as captured, torch.set_grad_enabled(gradients):
        if gradients:
            _loss(side.model, on_device_of(side.model, batch)).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        else:
            run_decoder(side.model, batch)
    return captured


def _loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Summed, not averaged, so that every token weighs alike whatever its text."""
    targets_BT = batch["labels"][:, 1:]
    positions_K = (targets_BT != IGNORED).any(dim=0).nonzero().squeeze(1)
    logits_BKV = logits_at(model, batch, positions_K)
    wanted_BK = targets_BT[:, positions_K]
    return functional.cross_entropy(
        logits_BKV.flatten(0, 1).float(), wanted_BK.flatten(), ignore_index=IGNORED, reduction="sum"
    )


@contextmanager
def _tapped(side: Side, *, gradients: bool) -> Iterator[_Captured]:
    captured = _Captured()

    def tap(key: ModuleKey) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
            # Detached: the output's own hook reaches what is captured, and a cycle would keep whole graphs.
            captured.inputs[key] = arguments[0].detach()
            captured.outputs[key] = output.detach()
            if gradients:
                if not output.requires_grad:
                    # All weights are frozen, so the first adapted module starts the graph.
                    output.requires_grad_()
                output.register_hook(keep(key))  # type: ignore[no-untyped-call]  # torch leaves it untyped

        return hook

    def keep(key: ModuleKey) -> Callable[[torch.Tensor], None]:
        def hook(gradient: torch.Tensor) -> None:
            captured.gradients[key] = gradient

        return hook

    frozen = [parameter for parameter in side.model.parameters() if parameter.requires_grad]
    with contextlib.ExitStack() as stack:
        for parameter in frozen:
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)
        for key, name in side.names.items():
            handle = side.model.get_submodule(name).register_forward_hook(tap(key))
            stack.callback(handle.remove)
        yield captured
