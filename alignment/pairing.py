"""Batches of public text for two models at once, and rows of activations that belong together.

Axes: B texts, T positions, G aligned spans, H coordinates.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedmosaic.alignment.tokens import PublicText, Rendering, SpanPair, align, render
from fedmosaic.client.colora import find_decoder_layers
from fedmosaic.client.model.examples import IGNORED, EncodedExample, collate, length_buckets, padding_token
from fedmosaic.client.model.loss import Batch, on_device_of

Progress = Callable[[int, int], None]
"""Called with the number of texts done and of all texts."""


@dataclass(frozen=True)
class Reading:
    """How public text is read: most tokens per text, and texts per forward pass."""

    max_length: int = 96
    batch_size: int = 16


@dataclass(frozen=True, eq=False)
class Spans:
    """Which positions of a batch make up each of G aligned spans.

    Attributes:
        positions: (K,) int64 indices into the B·T positions.
        owners: (K,) int64 span of each, in 0…G−1.
        count: G.
    """

    positions: torch.Tensor = field(repr=False)
    owners: torch.Tensor = field(repr=False)
    count: int

    def mean(self, states_BTH: torch.Tensor) -> torch.Tensor:
        """Mean over each span's positions, (G, H) float32."""
        lengths_G = torch.bincount(self.owners, minlength=self.count).clamp_min(1)
        return self.sum(states_BTH) / lengths_G.unsqueeze(1)

    def last(self, states_BTH: torch.Tensor) -> torch.Tensor:
        """State at each span's last position, (G, H), differentiable: what predicts the token after it."""
        last_G = self.positions.new_zeros(self.count)
        last_G.scatter_reduce_(0, self.owners, self.positions, "amax")
        return states_BTH.flatten(0, 1)[last_G.to(states_BTH.device)]

    def sum(self, states_BTH: torch.Tensor) -> torch.Tensor:
        """Sum over each span's positions, (G, H) float32; what a gradient needs."""
        flat = states_BTH.detach().float().flatten(0, 1).cpu()
        total = flat.new_zeros(self.count, flat.shape[1])
        return total.index_add_(0, self.owners, flat[self.positions])


@dataclass(frozen=True, eq=False)
class PairedBatch:
    """The same texts for two models, padded on the right, and the positions that are the same characters."""

    anchor: Batch
    model: Batch
    anchor_spans: Spans
    model_spans: Spans


def paired_batches(
    anchor: PreTrainedTokenizerBase,
    model: PreTrainedTokenizerBase,
    texts: Sequence[PublicText],
    reading: Reading,
    progress: Progress | None = None,
) -> Iterator[PairedBatch]:
    """Tokenise texts for two models, texts of similar length together; tell progress after each batch."""
    lengths = [len(text.prompt) + len(text.text) for text in texts]
    done = 0
    for bucket in length_buckets(lengths, reading.batch_size):
        left = [render(anchor, texts[i], reading.max_length) for i in bucket]
        right = [render(model, texts[i], reading.max_length) for i in bucket]
        pairs = [align(texts[i], a, m) for i, a, m in zip(bucket, left, right, strict=True)]
        yield PairedBatch(
            anchor=collate([_encoded(row) for row in left], padding_token(anchor)),
            model=collate([_encoded(row) for row in right], padding_token(model)),
            anchor_spans=_spans(pairs, 0, max(len(row.input_ids) for row in left)),
            model_spans=_spans(pairs, 1, max(len(row.input_ids) for row in right)),
        )
        done += len(bucket)
        if progress is not None:
            progress(done, len(texts))


def run_decoder(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Final states (B, T, H) of a model, without its output head: a vocabulary is the widest axis by far."""
    decoder = model.get_submodule(find_decoder_layers(model)[0].rpartition(".")[0])
    inputs = on_device_of(model, batch)
    found = decoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
    states: torch.Tensor = found.last_hidden_state
    return states


def _encoded(rendering: Rendering) -> EncodedExample:
    """The model is to predict what follows the prompt."""
    ids = torch.tensor(rendering.input_ids, dtype=torch.int64)
    labels = ids.clone()
    labels[: rendering.supervised_from] = IGNORED
    return EncodedExample("", ids, labels)


def _spans(pairs: Sequence[Sequence[SpanPair]], side: int, width: int) -> Spans:
    positions: list[int] = []
    owners: list[int] = []
    count = 0
    for row, spans in enumerate(pairs):
        for span in spans:
            positions.extend(row * width + position for position in span[side])
            owners.extend([count] * len(span[side]))
            count += 1
    return Spans(torch.tensor(positions, dtype=torch.int64), torch.tensor(owners, dtype=torch.int64), count)
