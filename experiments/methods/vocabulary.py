"""From the tokens of one vocabulary to those of another, for predictions that cross tokenizers."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fedmosaic.alignment.tokens import SpanPair, align_ranges
from fedmosaic.protos.errors import ModelError

_SPACES: Final = str.maketrans({"▁": " ", "Ġ": " ", "Ċ": "\n"})
_LONGEST: Final = 16
"""Characters; longer tokens are only ever matched exactly."""


class VocabularyMap:
    """Maps each token to the same text in another vocabulary, or to the one with the least edit distance.

    Reference: FedMKT (arXiv 2406.02224), section 3.2: minimum edit distance.
    """

    def __init__(self, source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> None:
        self._source, self._target = source, target
        texts = _texts(target, range(len(target)))
        self._place = {text: token for token, text in reversed(list(enumerate(texts)))}
        short = [token for token, text in enumerate(texts) if 0 < len(text) <= _LONGEST]
        self._short = np.array(short)
        self._letters = np.zeros((len(short), _LONGEST), dtype=np.int32)
        self._lengths = np.array([len(texts[token]) for token in short])
        for row, token in enumerate(short):
            self._letters[row, : len(texts[token])] = [ord(letter) for letter in texts[token]]
        self._known: dict[int, int] = {}
        if isinstance(source.eos_token_id, int) and isinstance(target.eos_token_id, int):
            self._known[source.eos_token_id] = target.eos_token_id

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens of the source, int64 of any shape, as tokens of the target."""
        flat = [int(token) for token in tokens.reshape(-1)]
        missing = sorted(set(flat) - self._known.keys())
        for token, text in zip(missing, _texts(self._source, missing), strict=True):
            self._known[token] = self._place[text] if text in self._place else self._nearest(text)
        return torch.tensor([self._known[token] for token in flat], dtype=torch.int64).view(tokens.shape)

    def _nearest(self, text: str) -> int:
        if not len(self._short):
            raise ModelError("the other vocabulary has no token to map to")
        distances = edit_distances(text, self._letters, self._lengths)
        return int(self._short[int(np.argmin(distances))])


def edit_distances(text: str, letters: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Levenshtein's distance (N,) of a text to others: (N, L) code points, zeros behind, and (N,) lengths."""
    count, longest = letters.shape
    row = np.tile(np.arange(longest + 1), (count, 1))
    for number, letter in enumerate(text, start=1):
        below = np.empty_like(row)
        below[:, 0] = number
        differs = letters != ord(letter)
        for place in range(longest):
            below[:, place + 1] = np.minimum(
                np.minimum(row[:, place + 1], below[:, place]) + 1, row[:, place] + differs[:, place]
            )
        row = below
    found: np.ndarray = row[np.arange(count), lengths]
    return found


def answer_spans(
    source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, answer: str
) -> list[SpanPair]:
    """Which tokens of an answer stand for the same characters in two vocabularies.

    Pairs of positions, from 0 at the answer's first token, without the end of sequence. `ModelError` if one
    is slow.
    """
    ranges = []
    for tokenizer in (source, target):
        if not tokenizer.is_fast:
            raise ModelError("distillation across tokenizers needs fast tokenizers (a tokenizer.json)")
        offsets = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        ranges.append([(start, end) if end > start else None for start, end in offsets])
    return align_ranges(answer, *ranges)


def _texts(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    found = tokenizer.convert_ids_to_tokens(list(tokens))
    return [str(text).translate(_SPACES) for text in found]
