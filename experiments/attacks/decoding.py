"""Decoding texts from an update of P and Q: a beam over tokens, scored by what their terms explain."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedmosaic.experiments.attacks.statistics.pursuit import (
    Background,
    FloatArray,
    log_likelihoods,
    unexplained_terms,
)
from fedmosaic.experiments.attacks.terms import NextTerms, TermReader, atoms
from fedmosaic.experiments.attacks.text import LIKELY_TOKENS


@dataclass(frozen=True)
class Unknown:
    """What the attacker knows of one text: how it begins and how long it is."""

    known: tuple[int, ...]
    length: int


@dataclass(frozen=True, eq=False)
class Guess:
    """A continuation, and what it explains of the release: (D,) in the background's coordinates."""

    tokens: tuple[int, ...]
    explained: FloatArray
    log_probability: float
    score: float


def decode(
    reader: TermReader,
    background: Background,
    left: FloatArray | None,
    text: Unknown,
    others: float,
    beams: int,
) -> Guess:
    """The most plausible continuation of a text, given what is left of a release.

    `left` is (D,) in the coordinates of the background of unknown terms, with `others` tokens of other texts
    in it; None guesses without a release.
    """
    paths = [Guess((), np.zeros(len(background.mean)), 0.0, 0.0)]
    for step in range(text.length):
        remaining = text.length - step - 1 + others
        after = reader.after([[*text.known, *path.tokens] for path in paths])
        grown = [
            longer
            for path, terms in zip(paths, after, strict=True)
            for longer in _grown(reader, background, left, path, terms, remaining, beams)
        ]
        paths = sorted(grown, key=lambda path: -path.score)[:beams]
    return paths[0]


def _grown(
    reader: TermReader,
    background: Background,
    left: FloatArray | None,
    path: Guess,
    terms: NextTerms,
    remaining: float,
    beams: int,
) -> list[Guess]:
    """The best ways to go on with one path."""
    count = min(LIKELY_TOKENS, len(terms.log_probabilities))
    kept = torch.topk(terms.log_probabilities, count)
    scores = path.log_probability + kept.values.double().numpy()
    signals, directions = np.zeros((count, 0)), np.zeros((0, len(background.mean)))
    if left is not None:
        signals, directions = reader.coefficients(terms, kept.indices), atoms(terms.inputs, background)
        scores = scores + log_likelihoods(left - path.explained, directions, signals, background, remaining)
    return [
        Guess(
            (*path.tokens, int(kept.indices[index])),
            path.explained + signals[index] @ directions,
            path.log_probability + float(kept.values[index]),
            float(scores[index]),
        )
        for index in np.argsort(-scores)[:beams]
    ]


def decode_all(
    reader: TermReader, background: Background, release: FloatArray, texts: Sequence[Unknown], beams: int
) -> list[Guess]:
    """Every text of a (D,) sum of all tokens' terms, each with what those before explain taken off."""
    left = background.coordinates(release)
    guesses: list[Guess] = []
    for number, text in enumerate(texts):
        later = sum(other.length for other in texts[number + 1 :])
        # Errors in the texts that are decoded already leave terms behind.
        wrong = max(0.0, unexplained_terms(left, background) - text.length - later) if number else 0.0
        decoded = sum(other.length for other in texts[:number])
        guesses.append(decode(reader, background, left, text, later + min(wrong, decoded), beams))
        left = left - guesses[-1].explained
    return guesses
