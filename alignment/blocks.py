"""Which decoder layers of two models correspond, and the evidence: linear CKA between all layer pairs.

Axes: L layers of the anchor, M layers of the other model, N rows of a minibatch, H coordinates.

Reference: Kornblith et al., "Similarity of Neural Network Representations Revisited", arXiv 1905.00414
(linear CKA); Nguyen et al., arXiv 2010.15327, §3.1 (minibatches with the unbiased estimator of HSIC);
arXiv 2506.11024, "block-wise aggregation" (equal relative depth).
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedmosaic.alignment.pairing import Progress, Reading, Spans, paired_batches, run_decoder
from fedmosaic.alignment.tokens import PublicText
from fedmosaic.client.colora import find_decoder_layers, target_layers
from fedmosaic.client.model.loss import Batch
from fedmosaic.protos.errors import ConfigurationError, ModelError

CKA_RULE: Final = "cka"
PAIR_RULES: Final = ("relative_depth", "authors", CKA_RULE, "late")
_MINIBATCH_ROWS: Final = 256
_FEWEST_ROWS: Final = 4


@dataclass(frozen=True, eq=False)
class LayerSimilarity:
    """Linear CKA of all layer pairs of two models, (L, M) float64, over aligned positions.

    It is at most 1; an unbiased estimate may fall slightly below 0.
    """

    cka_LM: torch.Tensor = field(repr=False)

    def mean_deviation(self) -> float:
        """Mean distance between the most similar layer and equal relative depth, in [0, 1].

        For each layer of the anchor, relative depths are (index + 1) / number of layers.
        """
        left, right = self.cka_LM.shape
        best_L = self.cka_LM.argmax(dim=1).double()
        own_L = (torch.arange(left, dtype=torch.float64) + 1) / left
        return float(((best_L + 1) / right - own_L).abs().mean())

    def of_pairs(self, anchor: Sequence[int], model: Sequence[int]) -> tuple[float, ...]:
        """CKA of chosen pairs of layers."""
        return tuple(float(self.cka_LM[a, m]) for a, m in zip(anchor, model, strict=True))


def choose_layers(
    depth: int, anchor_layers: Sequence[int], rule: str, similarity: LayerSimilarity | None = None
) -> tuple[int, ...]:
    """One layer per block of a model, strictly increasing, for the anchor's shared layers.

    `relative_depth`, `authors` or `late` (see `fedmosaic.client.colora.target_layers`), or `cka`, which needs
    the similarity: the layers with the largest sum of CKA, by dynamic programming. `ModelError` if the model
    has fewer layers than blocks.
    """
    if rule not in PAIR_RULES:
        raise ConfigurationError(f"The layer rule is {rule!r}; choose one of {', '.join(PAIR_RULES)}.")
    if rule != CKA_RULE:
        return target_layers(depth, len(anchor_layers), rule)
    if similarity is None:
        raise ConfigurationError("The layer rule cka needs the similarity of the layers; measure it first.")
    if depth < len(anchor_layers):
        raise ModelError(f"The model has {depth} decoder layers, fewer than the {len(anchor_layers)} blocks.")
    return _best_increasing(similarity.cka_LM[list(anchor_layers)])


def _best_increasing(score_KM: torch.Tensor) -> tuple[int, ...]:
    blocks, depth = score_KM.shape
    best = torch.full((blocks, depth), -torch.inf, dtype=torch.float64)
    origin = torch.zeros(blocks, depth, dtype=torch.int64)
    best[0] = score_KM[0]
    for k in range(1, blocks):
        before, where = torch.cummax(best[k - 1], dim=0)
        best[k, 1:] = score_KM[k, 1:] + before[:-1]
        origin[k, 1:] = where[:-1]
    chosen = [int(best[-1].argmax())]
    for k in range(blocks - 1, 0, -1):
        chosen.append(int(origin[k, chosen[-1]]))
    return tuple(reversed(chosen))


def measure_similarity(
    anchor: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    model: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    texts: Sequence[PublicText],
    reading: Reading,
    progress: Progress | None = None,
) -> LayerSimilarity:
    """Linear CKA between the states after all layers of two models, averaged over minibatches.

    Both are a model and its tokenizer. `ModelError` if too few positions of the two can be paired.
    """
    total = HsicSums()
    for batch in paired_batches(anchor[1], model[1], texts, reading, progress):
        left = _layer_states(anchor[0], batch.anchor, batch.anchor_spans)
        right = _layer_states(model[0], batch.model, batch.model_spans)
        total.update(left, right)
    return total.finish()


class HsicSums:
    """Running sums of unbiased HSIC within and between the layers of two models."""

    def __init__(self) -> None:
        self._sums: list[torch.Tensor] = []

    def update(self, left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> None:
        """Add (G, H) states of the same positions after each of L layers of the anchor and M of the model."""
        rows = len(left[0])
        for start in range(0, rows, _MINIBATCH_ROWS):
            size = min(_MINIBATCH_ROWS, rows - start)
            # The estimator divides by n(n − 3); small minibatches are weighted by the same number.
            if size < (_MINIBATCH_ROWS // 4 if start else _FEWEST_ROWS):
                continue
            self._add(
                torch.stack([_hollow_gram(states[start : start + size]) for states in left]),
                torch.stack([_hollow_gram(states[start : start + size]) for states in right]),
            )

    def _add(self, left_LNN: torch.Tensor, right_MNN: torch.Tensor) -> None:
        own_L, own_M = (
            torch.stack([_hsic(gram[None], gram[None])[0, 0] for gram in grams])
            for grams in (left_LNN, right_MNN)
        )
        parts = [_hsic(left_LNN, right_MNN), own_L, own_M]
        if not self._sums:
            self._sums = parts
            return
        for total, part in zip(self._sums, parts, strict=True):
            total += part

    def finish(self) -> LayerSimilarity:
        """CKA; `ModelError` if no minibatch was large enough, or a layer's states do not vary."""
        if not self._sums:
            raise ModelError(
                "Too few positions of the two models could be paired to compare layers; give more text."
            )
        between_LM, left_L, right_M = self._sums
        if not bool((left_L > 0).all()) or not bool((right_M > 0).all()):
            raise ModelError("The states after a layer do not vary on the public text; give other text.")
        return LayerSimilarity(between_LM / torch.sqrt(torch.outer(left_L, right_M)))


def _hollow_gram(states_NH: torch.Tensor) -> torch.Tensor:
    """K = X Xᵀ in float64 with a zero diagonal, as the unbiased estimator needs it."""
    # The estimator is invariant to a shift of all rows; taking the mean out first saves precision.
    centred_NH = states_NH.double() - states_NH.double().mean(0)
    gram_NN = centred_NH @ centred_NH.T
    return gram_NN.fill_diagonal_(0.0)


def _hsic(left_LNN: torch.Tensor, right_MNN: torch.Tensor) -> torch.Tensor:
    """Unbiased HSIC of all pairs, (L, M) (Song et al. 2012, eq. 5)."""
    count = left_LNN.shape[1]
    traces_LM = left_LNN.flatten(1) @ right_MNN.flatten(1).T
    left_rows, right_rows = left_LNN.sum(2), right_MNN.sum(2)
    means_LM = torch.outer(left_rows.sum(1), right_rows.sum(1)) / ((count - 1) * (count - 2))
    cross_LM = 2.0 * (left_rows @ right_rows.T) / (count - 2)
    hsic: torch.Tensor = (traces_LM + means_LM - cross_LM) / (count * (count - 3))
    return hsic


def _layer_states(model: PreTrainedModel, batch: Batch, spans: Spans) -> list[torch.Tensor]:
    """After each layer; by hooks, because a decoder's own `hidden_states` have the last one normalised."""
    states: list[torch.Tensor] = []

    def keep(_module: nn.Module, _arguments: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as stack, torch.no_grad():
        for layer in find_decoder_layers(model)[1]:
            stack.callback(layer.register_forward_hook(keep).remove)
        run_decoder(model, batch)
    return [spans.mean(found) for found in states]
