"""Moments of what goes in and out of the adapted modules of two models, streamed over public text.

Memory does not grow with the amount of text: it holds one batch of activations and, per adapted module,
second moments of its inputs and, on request, of its outputs or of gradients by them.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedmosaic.alignment.moments import Moments, MomentSums
from fedmosaic.alignment.pairing import PairedBatch, Progress, Reading, Spans, paired_batches, run_decoder
from fedmosaic.alignment.tokens import PublicText
from fedmosaic.client.colora.placement import plan_placements
from fedmosaic.client.model.examples import answer_tokens
from fedmosaic.client.model.loss import Batch
from fedmosaic.protos.errors import ModelError

Method = Literal["random", "weights", "activations", "cotangents"]
METHODS: Final[tuple[Method, ...]] = get_args(Method)
ModuleKey = tuple[int, str]
"""Block and name within the decoder layer: what corresponds across architectures."""
_WORD: Final = re.compile(r"[A-Za-z]+")
_MOST_WORDS: Final = 4000
_CONTRASTED: Final = 11


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

    Effects are what B is aligned on: outputs without their mean, or cotangents with it, for it matters there;
    empty if neither was asked for.
    """

    inputs: Mapping[ModuleKey, Moments] = field(repr=False)
    effects: Mapping[ModuleKey, Moments] = field(repr=False)
    texts: int
    positions: int


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
    method: Method | None,
    progress: Progress | None = None,
) -> PairMoments:
    """Read public text with both models and accumulate the moments of their adapted modules.

    The anchor as its own model gives moments of the anchor alone. `cotangents` takes what comes back to the
    modules, about three times the work, another method what they write; without one only inputs are read.
    `ModelError` if the models do not have the same modules, share no characters on the text, or give
    activations that are not finite.
    """
    if set(anchor.names) != set(model.names):
        differing = sorted({f"block {b}: {m}" for b, m in set(anchor.names) ^ set(model.names)})
        raise ModelError(
            f"The models differ in their adapted modules: {', '.join(differing[:8])}. Restrict "
            "--target-modules to modules that all models have."
        )
    gradients = method == "cotangents"
    sums = _Sums(tuple(anchor.names), method)
    words = shared_words(anchor.tokenizer, model.tokenizer, texts) if gradients else ((), ())
    generator = torch.Generator().manual_seed(0)
    for batch in paired_batches(anchor.tokenizer, model.tokenizer, texts, reading, progress):
        picks_GK = None
        if gradients:
            shape = (batch.anchor_spans.count, _CONTRASTED)
            picks_GK = torch.randint(len(words[0]), shape, generator=generator)
        left = _read(anchor, batch.anchor, batch.anchor_spans, words[0], picks_GK)
        right = left
        if model is not anchor:
            right = _read(model, batch.model, batch.model_spans, words[1], picks_GK)
        sums.update(batch, left, right)
    return sums.finish(len(texts))


@dataclass(frozen=True, eq=False)
class _Captured:
    inputs: dict[ModuleKey, torch.Tensor] = field(default_factory=dict)
    effects: dict[ModuleKey, torch.Tensor] = field(default_factory=dict)


class _Sums:
    """Sums of every module; modules that read the same tensor share the sums of their inputs."""

    def __init__(self, keys: Sequence[ModuleKey], method: Method | None) -> None:
        self._keys = keys
        self._gradients = method == "cotangents"
        self._inputs: dict[ModuleKey, MomentSums] = {}
        self._effects = {key: MomentSums() for key in keys} if method else {}
        self._leader: dict[ModuleKey, ModuleKey] = {}

    def update(self, batch: PairedBatch, left: _Captured, right: _Captured) -> None:
        if not self._leader:
            self._leader = _leaders(self._keys, left, right)
            self._inputs = {key: MomentSums() for key in set(self._leader.values())}
        for key in self._keys:
            if key in self._inputs:
                _add(self._inputs[key], batch, left.inputs[key], right.inputs[key], Spans.mean)
            if key in self._effects:
                pool = Spans.sum if self._gradients else Spans.mean
                _add(self._effects[key], batch, left.effects[key], right.effects[key], pool)

    def finish(self, texts: int) -> PairMoments:
        inputs = {key: sums.finish() for key, sums in self._inputs.items()}
        effects = {}
        for key, sums in self._effects.items():
            moments = sums.finish()
            effects[key] = moments if self._gradients else moments.centred()
        return PairMoments(
            inputs={key: inputs[self._leader[key]] for key in self._keys},
            effects=effects,
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


def shared_words(
    left: PreTrainedTokenizerBase, right: PreTrainedTokenizerBase, texts: Sequence[PublicText]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens of both models for the words of public text that are one token in each, with or without a space.

    `ModelError` if there are fewer than a contrast needs.
    """
    found: dict[int, int] = {}
    counts = Counter(word for text in texts for word in _WORD.findall(f"{text.prompt} {text.text}"))
    for word, _ in counts.most_common(_MOST_WORDS):
        for spoken in (word, f" {word}"):
            one, other = (answer_tokens(tokenizer, spoken) for tokenizer in (left, right))
            if len(one) == len(other) == 1 and other[0] not in found.values():
                found.setdefault(one[0], other[0])
    if len(found) < _CONTRASTED:
        raise ModelError(
            f"The two models have {len(found)} words of the public text as one token each, too few to send "
            "the same signals back through both; give more text, or method 'activations'."
        )
    return tuple(found), tuple(found.values())


def _read(
    side: Side, batch: Batch, spans: Spans, words: Sequence[int], picks_GK: torch.Tensor | None
) -> _Captured:
    """Activations, and with picks the gradients of random contrasts of the logits of shared words.

    At each span the contrast is of the first word picked against the mean of the others. What is sent back is
    the same for every model, whatever it has learnt to say.
    """
    with (
        _tapped(side, gradients=picks_GK is not None) as captured,
        torch.set_grad_enabled(picks_GK is not None),
    ):
        states_BTH = run_decoder(side.model, batch)
        if picks_GK is not None:
            head = side.model.get_output_embeddings()
            head_WH = head.weight[list(words)]
            rows_GH = spans.last(states_BTH)
            logits_GK = torch.einsum("gh,gkh->gk", rows_GH, head_WH[picks_GK.to(head_WH.device)]).float()
            (logits_GK[:, 1:].mean(1) - logits_GK[:, 0]).sum().backward()
    return captured


@contextmanager
def _tapped(side: Side, *, gradients: bool) -> Iterator[_Captured]:
    captured = _Captured()

    def tap(key: ModuleKey) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
            # Detached: the output's own hook reaches what is captured, and a cycle would keep whole graphs.
            captured.inputs[key] = arguments[0].detach()
            if not gradients:
                captured.effects[key] = output.detach()
            else:
                if not output.requires_grad:
                    # All weights are frozen, so the first adapted module starts the graph.
                    output.requires_grad_()
                output.register_hook(keep(key))

        return hook

    def keep(key: ModuleKey) -> Callable[[torch.Tensor], None]:
        def hook(gradient: torch.Tensor) -> None:
            captured.effects[key] = gradient

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
