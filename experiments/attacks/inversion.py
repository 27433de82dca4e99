"""Gradient inversion for the shared adapter: texts, word by word, from an update of P and Q.

The easiest case for the attacker: the update is of one text or a few, each of which the model learns to write
but for its first words, and the attacker knows the model, the starting point, the first words and the length.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from fedmosaic.client.colora import read_shared
from fedmosaic.client.dp.engine import clip_and_sum, example_gradient, only_shared_branch
from fedmosaic.client.dp.training import noisy_sum
from fedmosaic.client.model.examples import IGNORED, EncodedExample, padding_token
from fedmosaic.client.model.loss import training_mode
from fedmosaic.client.model.training import TrainingSettings, train_local
from fedmosaic.experiments.attacks.profile import noise_multiplier
from fedmosaic.experiments.attacks.statistics import pursuit
from fedmosaic.experiments.attacks.statistics.results import AttackResult, Figure, Setting
from fedmosaic.experiments.attacks.terms import NextTerms, TermReader, atoms
from fedmosaic.experiments.attacks.text import LIKELY_TOKENS, OWN_GUESS
from fedmosaic.privacy.mechanism.noise import NoiseSource
from fedmosaic.protos.errors import ConfigurationError

INVERSION: Final = "Texts from a P, Q update: gradient inversion"
EPSILON: Final = 8.0
STEPS: Final = 4
_BEAMS: Final = 3
_PUBLIC_TOKENS: Final = 48
_FLOOR: Final = 1e-4
_RESAMPLES: Final = 2000
_NOTE: Final = (
    "the easiest case for the attacker: texts that the model learns to write. Texts that it only reads "
    "(prompts) were not decoded, which is no evidence that they cannot be. What leaves in a run is an update "
    "over all of a client's texts, so that the rows with several texts are nearer to it. The authors' code "
    "sends P and Q as they are, so that the rows without sanitiser are theirs too. Intervals resample the "
    "texts, and have no width where all fare alike. A lower bound: a better search recovers more"
)
# A normal number of which only the sign is left: the best linear guess, and what that misses.
_SIGN_MEAN: Final = math.sqrt(2.0 / math.pi)
_SIGN_REST: Final = math.sqrt(1.0 - 2.0 / math.pi)


class Unknown(NamedTuple):
    """What the attacker knows of one text: how it begins and how long it is."""

    known: tuple[int, ...]
    length: int


class Guess(NamedTuple):
    """A continuation, and what it explains of the release: (D,) in the background's coordinates."""

    tokens: tuple[int, ...]
    explained: pursuit.FloatArray
    log_probability: float
    score: float


def decode(
    reader: TermReader,
    background: pursuit.Background,
    left: pursuit.FloatArray | None,
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
    background: pursuit.Background,
    left: pursuit.FloatArray | None,
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
        scores = scores + pursuit.log_likelihoods(
            left - path.explained, directions, signals, background, remaining
        )
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
    reader: TermReader,
    background: pursuit.Background,
    release: pursuit.FloatArray,
    texts: Sequence[Unknown],
    beams: int,
) -> list[Guess]:
    """Every text of a (D,) sum of all tokens' terms, each with what those before explain taken off."""
    left = background.coordinates(release)
    guesses: list[Guess] = []
    for number, text in enumerate(texts):
        later = sum(other.length for other in texts[number + 1 :])
        # Errors in the texts that are decoded already leave terms behind.
        wrong = max(0.0, pursuit.unexplained_terms(left, background) - text.length - later) if number else 0.0
        decoded = sum(other.length for other in texts[:number])
        guesses.append(decode(reader, background, left, text, later + min(wrong, decoded), beams))
        left = left - guesses[-1].explained
    return guesses


class Material(NamedTuple):
    """What is attacked, and what the attacker knows.

    The client's texts are of one length, their first words not supervised; the first `attacked` ≥ 2 of them
    are to be recovered, the others stand beside them in the larger batch. There are two texts of other
    contributors, of the same length, and (T,) tokens of public ones.
    """

    texts: tuple[EncodedExample, ...]
    others: tuple[EncodedExample, ...]
    public: tuple[torch.Tensor, ...]
    attacked: int
    training: TrainingSettings


def inversion_results(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, material: Material, noise: NoiseSource, seed: int
) -> Iterator[AttackResult]:
    """Recover texts from gradients, from updates by several steps, from an aggregate and under DP.

    The model has a fresh adapter, and is put back to that afterwards; the seed is of the intervals'
    resamples. `ConfigurationError` if there are too few texts.
    """
    if material.attacked < 2 or len(material.texts) < material.attacked or len(material.others) < 2:
        raise ConfigurationError(
            f"gradient inversion needs at least 2 texts of the client and 2 of others that are long enough; "
            f"there are {len(material.texts)} and {len(material.others)}"
        )
    pad = padding_token(tokenizer)
    attacked = material.texts[: material.attacked]
    updates = [_update(model, [text], material.training, pad) for text in attacked]
    together = _update(model, material.texts, material.training, pad)
    with only_shared_branch(model) as cores, training_mode(model, False):
        reader = TermReader(model, cores)
        rows, others = (
            torch.stack([example_gradient(model, cores, text).cpu() for text in texts])
            for texts in (material.texts, material.others)
        )
        public = reader.public_terms([tokens[:_PUBLIC_TOKENS] for tokens in material.public])
        attack = _Attack(reader, material, public, rows.double().numpy(), others.double().numpy())
        for words, adversary, setting, epsilon, decoded in attack.cases(updates, together, noise):
            yield AttackResult(
                attack=INVERSION,
                adversary=f"{adversary}, knowing how the texts begin and how long they are",
                sees="P and Q of the first round, or their gradient; model, bases and starting point are "
                "public",
                statistic="exact terms of every next token in the last adapted layer, background of public "
                "texts, language model, beam",
                release=words,
                setting=setting,
                epsilon=epsilon,
                figures=_figures(attacked, decoded(), seed),
                note=_NOTE,
            )


_Decoded = list[tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class _Attack:
    """What all cases use: terms, and gradients of P and Q, each the mean over a text's tokens."""

    reader: TermReader
    material: Material
    public: pursuit.FloatArray
    rows: pursuit.FloatArray
    others: pursuit.FloatArray

    @cached_property
    def unknown(self) -> list[Unknown]:
        """What is known of the attacked texts."""
        split = [(t.input_ids, t.labels != IGNORED) for t in self.material.texts[: self.material.attacked]]
        return [Unknown(tuple(ids[~own].tolist()), int(own.sum())) for ids, own in split]

    @cached_property
    def totals(self) -> pursuit.FloatArray:
        """(texts, D) sums of each text's terms."""
        return np.asarray(self.unknown[0].length * self.rows[:, self.reader.columns])

    @cached_property
    def exact(self) -> pursuit.Background:
        """For a release without noise, but that of rounding."""
        floor = _FLOOR * float(np.sqrt(np.mean(self.public**2)))
        return pursuit.fit_background(self.public, np.full(self.public.shape[1], floor))

    def cases(
        self, updates: Sequence[np.ndarray], together: np.ndarray, noise: NoiseSource
    ) -> list[tuple[str, str, Setting, float | None, Callable[[], _Decoded]]]:
        """Every kind of release."""
        count, steps = len(self.rows), f"none: the update after {STEPS} steps of AdamW on"
        own = self.totals[: len(self.unknown)]
        unprotected: list[tuple[str, Callable[[], _Decoded]]] = [
            ("none: the gradient of one text", lambda: self._each(self.exact, own, 0.0)),
            ("none: the mean gradient of 2 texts", self.pairs),
            (f"none: the mean gradient of {count} texts", self.batch),
            (f"{steps} one text", lambda: self.signs(updates, 0)),
            (f"{steps} {count} texts", lambda: self.signs([together] * len(self.unknown), count - 1)),
        ]

        def guess() -> _Decoded:
            return [decode(self.reader, self.exact, None, text, 0.0, _BEAMS).tokens for text in self.unknown]

        mixed = "none or encrypted: an aggregate in which the gradient of one text has 0.5, two others' 0.25"
        private = f"dp: one step on one text at ε = {EPSILON:g}"
        return [
            *((words, "server", "no_sanitiser", math.inf, decoded) for words, decoded in unprotected),
            (mixed, "recipient", "product", math.inf, self.aggregate),
            (private, "server or recipient", "variant", EPSILON, lambda: self.private(noise)),
            (OWN_GUESS.format("update"), "server", "no_sanitiser", None, guess),
        ]

    def pairs(self) -> _Decoded:
        found: _Decoded = []
        for start in range(0, len(self.unknown), 2):
            # The last text of an odd number stands beside the first one.
            places = [start, start + 1 if start + 1 < len(self.unknown) else 0]
            texts = [self.unknown[place] for place in places]
            total = self.totals[places].sum(axis=0)
            found += [g.tokens for g in decode_all(self.reader, self.exact, total, texts, _BEAMS)]
        return found[: len(self.unknown)]

    def batch(self) -> _Decoded:
        total = np.tile(self.totals.sum(axis=0), (len(self.unknown), 1))
        return self._each(self.exact, total, float((len(self.rows) - 1) * self.unknown[0].length))

    def aggregate(self) -> _Decoded:
        """At half the weight, others' gradients have a quarter of the energy each."""
        length = self.unknown[0].length
        beside = 0.5 * length * self.others[:2, self.reader.columns].sum(axis=0)
        return self._each(self.exact, self.totals[: len(self.unknown)] + beside, 0.5 * length)

    def signs(self, updates: Sequence[np.ndarray], beside: int) -> _Decoded:
        """AdamW keeps little more of a gradient than its signs; there are `beside` other texts."""
        tokens = self.unknown[0].length * (1 + beside)
        energy = tokens * self.public.var(axis=0) + (tokens * self.public.mean(axis=0)) ** 2
        size = np.sqrt(np.maximum(energy, _FLOOR**2 * energy.mean()))
        background = pursuit.fit_background(self.public, _SIGN_REST * size)
        totals = _SIGN_MEAN * size * np.clip(np.stack(updates)[:, self.reader.columns], -1.0, 1.0)
        return self._each(background, totals, float(tokens - self.unknown[0].length))

    def private(self, noise: NoiseSource) -> _Decoded:
        """One step of DP-SGD that no text is shortened in."""
        length, sigma = self.unknown[0].length, noise_multiplier(EPSILON)
        rows = torch.from_numpy(self.rows[: len(self.unknown)]).float()
        bound = float(rows.norm(dim=1).max())
        seen = np.stack(
            [noisy_sum(clip_and_sum(row[None], bound), bound, sigma, noise).numpy() for row in rows]
        )
        deviation = np.full(len(self.reader.columns), length * sigma * bound)
        background = pursuit.fit_background(self.public, deviation)
        return self._each(background, length * seen[:, self.reader.columns], 0.0)

    def _each(self, background: pursuit.Background, totals: pursuit.FloatArray, others: float) -> _Decoded:
        return [
            decode(self.reader, background, background.coordinates(total), text, others, _BEAMS).tokens
            for total, text in zip(totals, self.unknown, strict=True)
        ]


def _update(
    model: PeftModel, texts: Sequence[EncodedExample], training: TrainingSettings, pad: int
) -> np.ndarray:
    """How far P and Q went uphill in the product's training, in units of its steps; (d,) within about ±1."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    before = {name: value.detach().clone() for name, value in trained.items()}
    start = read_shared(model).astype(np.float64)
    settings = training.model_copy(update={"steps": STEPS, "per_device_train_batch_size": len(texts)})
    train_local(model, texts, settings, pad_token_id=pad)
    moved = read_shared(model) - start
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(before[name])
    return np.asarray(-moved / (STEPS * settings.learning_rate_of("shared")))


def _figures(texts: Sequence[EncodedExample], found: _Decoded, seed: int) -> tuple[Figure, ...]:
    """Share of tokens in place, share of the bag of tokens, and texts that are right to the last token."""
    truths = [text.input_ids[text.labels != IGNORED].tolist() for text in texts]
    in_place = [float(np.mean(np.equal(t, f))) for t, f in zip(truths, found, strict=True)]
    # Both bags have one size, so that precision, recall and F1 are one number.
    bags = [(Counter(t) & Counter(f)).total() / len(t) for t, f in zip(truths, found, strict=True)]
    exact = sum(value == 1.0 for value in in_place)
    drawn = np.random.default_rng(seed).integers(0, len(texts), (_RESAMPLES, len(texts)))

    def mean(name: str, values: Sequence[float]) -> Figure:
        low, high = np.quantile(np.asarray(values)[drawn].mean(axis=1), [0.025, 0.975])
        return Figure(name=name, value=float(np.mean(values)), low=float(low), high=float(high))

    exactly = Figure.share(f"texts exact (of {len(texts)})", exact, len(texts))
    return mean("tokens in place", in_place), mean("bag of tokens, F1", bags), exactly
