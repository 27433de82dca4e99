"""Batches of public text for two models at once, and rows of activations that belong together.

Axes: B texts, T positions, G aligned spans, H coordinates.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from fedmosaic.alignment.tokens import PublicText, Rendering, SpanPair, align, render
from fedmosaic.client.model.examples import IGNORED, length_buckets, padding_token


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Texts as one model reads them, padded on the right.

    Attributes:
        input_ids: (B, T) int64.
        attention_mask: (B, T) int64.
        labels: (B, T) int64, `IGNORED` where the model is not to predict.
    """

    input_ids: torch.Tensor = field(repr=False)
    attention_mask: torch.Tensor = field(repr=False)
    labels: torch.Tensor = field(repr=False)


@dataclass(frozen=True, eq=False)
class Spans:
    """Which positions of a batch make up each aligned span.

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

    def sum(self, states_BTH: torch.Tensor) -> torch.Tensor:
        """Sum over each span's positions, (G, H) float32; what a gradient needs."""
        flat = states_BTH.detach().float().flatten(0, 1).cpu()
        total = flat.new_zeros(self.count, flat.shape[1])
        return total.index_add_(0, self.owners, flat[self.positions])


@dataclass(frozen=True, eq=False)
class PairedBatch:
    """The same texts for two models, and their aligned spans.

    Attributes:
        anchor: As the anchor reads them.
        model: As the other model reads them.
        anchor_spans: Positions of the anchor.
        model_spans: Positions of the other model, span by span the same characters.
        texts: Number of texts.
    """

    anchor: TokenBatch
    model: TokenBatch
    anchor_spans: Spans
    model_spans: Spans
    texts: int


def paired_batches(
    anchor: PreTrainedTokenizerBase,
    model: PreTrainedTokenizerBase,
    texts: Sequence[PublicText],
    *,
    max_length: int,
    batch_size: int,
) -> Iterator[PairedBatch]:
    """Tokenise texts for two models, texts of similar length together.

    Args:
        anchor: The anchor's tokenizer.
        model: The other model's tokenizer; may be the same.
        texts: Public texts.
        max_length: Most tokens per text, for each model.
        batch_size: Texts per batch.

    Yields:
        Batches, in an order fixed by the lengths.
    """
    lengths = [len(text.prompt) + len(text.text) for text in texts]
    for bucket in length_buckets(lengths, batch_size):
        left = [render(anchor, texts[i], max_length) for i in bucket]
        right = [render(model, texts[i], max_length) for i in bucket]
        pairs = [align(texts[i], a, m) for i, a, m in zip(bucket, left, right, strict=True)]
        yield PairedBatch(
            anchor=token_batch(left, padding_token(anchor)),
            model=token_batch(right, padding_token(model)),
            anchor_spans=_spans(pairs, 0, max(len(row.input_ids) for row in left)),
            model_spans=_spans(pairs, 1, max(len(row.input_ids) for row in right)),
            texts=len(bucket),
        )


def token_batch(rows: Sequence[Rendering], pad_token_id: int) -> TokenBatch:
    """Pad renderings on the right; the model is to predict what follows the prompt.

    Args:
        rows: At least one rendering.
        pad_token_id: Token to fill with.
    """
    shape = (len(rows), max(len(row.input_ids) for row in rows))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids = torch.tensor(row.input_ids, dtype=torch.int64)
        input_ids[index, : len(ids)] = ids
        attention_mask[index, : len(ids)] = 1
        labels[index, row.supervised_from : len(ids)] = ids[row.supervised_from :]
    return TokenBatch(input_ids, attention_mask, labels)


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
