"""Attacks on the shared adapter: membership and words from P, Q updates, per protection mode.

The public starting point gives every candidate's gradient, so an update is a sum over a known dictionary.
Attacked are the update itself (`none`), a recipient's aggregate (`none`, `encrypted`), and one step of DP-SGD
(`dp`).
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch

from fedmosaic.client.dp.engine import clip_and_sum, example_gradient, only_shared_branch
from fedmosaic.client.dp.training import noisy_sum
from fedmosaic.client.model.adapted import load_adapted
from fedmosaic.client.model.examples import Example, encode_examples
from fedmosaic.client.model.loss import training_mode
from fedmosaic.client.settings import ModelSettings
from fedmosaic.experiments.attacks.profile import EPSILONS, noise_multiplier
from fedmosaic.experiments.attacks.statistics import membership
from fedmosaic.experiments.attacks.statistics.results import AttackResult, Figure, Setting
from fedmosaic.experiments.attacks.statistics.roc import Ceiling
from fedmosaic.experiments.scenario.metrics import area_under_curve
from fedmosaic.privacy.federation.terms import AdapterTerms
from fedmosaic.privacy.mechanism.noise import NoiseSource

MEMBERSHIP: Final = "Membership in a P, Q update"
WORDS: Final = "Words of the training texts from a P, Q update"


class AdapterRows(NamedTuple):
    """(N, D) float32 gradients of P and Q, one per example, at the public starting point; and the texts."""

    rows: np.ndarray
    texts: tuple[str, ...]


def adapter_rows(
    settings: ModelSettings, terms: AdapterTerms, groups: Sequence[Sequence[Example]], max_length: int
) -> list[AdapterRows]:
    """Gradients of groups of examples by P and Q of a fresh adapter, which every observer can compute."""
    model, tokenizer = load_adapted(settings.model_copy(update={"dtype": "float32"}), terms)
    found = []
    with only_shared_branch(model) as cores, training_mode(model, False):
        for examples in groups:
            encoded = encode_examples(tokenizer, examples, max_length)
            rows = torch.stack([example_gradient(model, cores, example) for example in encoded])
            found.append(AdapterRows(rows.cpu().numpy(), tuple(example.prompt for example in examples)))
    return found


def membership_results(
    candidates: AdapterRows,
    others: AdapterRows,
    noise: NoiseSource,
    *,
    releases: int,
    rate: float,
    seed: int,
    epsilons: Sequence[float] = EPSILONS,
) -> Iterator[AttackResult]:
    """Who was in a full-batch step on P and Q, as each protection mode shows it.

    A candidate of the victim is in one of the simulated updates with chance `rate`; the others' examples are
    those of the other contributors of an aggregate; `epsilons` are of one DP step.
    """
    generator = np.random.default_rng(seed)
    rows = candidates.rows.astype(np.float64)
    gram = rows @ rows.T
    members = membership.draw_members(releases, len(rows), rate, generator)
    inner = membership.simulated_inner_products(gram, members, 0.0, generator)
    scores = membership.dictionary_scores(inner, gram, 0.0, rate)
    yield _membership(scores, members, "none: the update itself", "server", "no_sanitiser")
    # A recipient sees the victim's update beside two others', whose examples are noise to the attacker.
    foreign = others.rows.astype(np.float64)
    chosen = membership.draw_members(releases, len(foreign), rate, generator)
    crossed = rows @ foreign.T
    spread = math.sqrt(float(np.mean(np.var(crossed, axis=1))) * rate * len(foreign)) / math.sqrt(
        float(np.mean(np.diag(gram)))
    )
    aggregate = inner + chosen @ crossed.T - rate * crossed.sum(axis=1)
    words = "none or encrypted: an aggregate with equal weight of other contributors"
    scores = membership.dictionary_scores(aggregate, gram, spread, rate)
    yield _membership(scores, members, words, "recipient", "product")
    norms = np.linalg.norm(rows, axis=1)
    bound = float(np.quantile(norms, 0.5))
    clipped, scaled = membership.clipped_gram(gram, bound), rows * np.minimum(1.0, bound / norms)[:, None]
    for epsilon in epsilons:
        sigma = noise_multiplier(epsilon)
        inner = np.stack([_dp_step(candidates.rows[row], bound, sigma, noise) @ scaled.T for row in members])
        scores = membership.likelihood_ratio_scores(inner, clipped, members, sigma * bound)
        words = f"dp: one step at ε = {epsilon:g}"
        yield _membership(scores, members, words, "server or recipient", "variant", epsilon, sigma)


def word_results(
    public: AdapterRows, victim: AdapterRows, noise: NoiseSource, *, size: int, updates: int, seed: int
) -> list[AttackResult]:
    """Which words occur in the texts of an update: a ridge map from gradients to words, learnt in public.

    Counts of words add up over examples as gradients do, so a map learnt on single examples reads the words
    of a sum of `size` of them. Compared with guessing the words that are frequent in public texts.
    """
    generator = np.random.default_rng(seed)
    told, kept = (Counter(w for text in side.texts for w in _words(text)) for side in (public, victim))
    # Words that occur in public and in private texts, in neither of them nearly always.
    usual, most = 0.5 * len(public.texts), 0.5 * len(victim.texts)
    vocabulary = sorted(w for w, count in told.items() if 3 <= count <= usual and 1 <= kept[w] <= most)
    shown, hidden = _presence(public.texts, vocabulary), _presence(victim.texts, vocabulary)
    rows = public.rows.astype(np.float64)
    mean, prior = rows.mean(axis=0), shown.mean(axis=0)
    centred = rows - mean
    gram = centred @ centred.T
    ridge = float(np.trace(gram)) / len(gram)
    mapped = np.linalg.solve(gram + ridge * np.eye(len(gram)), shown - prior)
    bound = float(np.quantile(np.linalg.norm(rows, axis=1), 0.5))
    sigma = noise_multiplier(8.0)
    areas: dict[str, list[float]] = {"update": [], "dp": [], "prior": []}
    for _ in range(updates):
        chosen = generator.permutation(len(victim.rows))[:size]
        occurs = np.asarray(hidden[chosen].any(axis=0))
        if not occurs.any() or occurs.all():
            continue
        exact = victim.rows[chosen].astype(np.float64).sum(axis=0)
        private = _dp_step(victim.rows[chosen], bound, sigma, noise)
        for name, vector in (("update", exact), ("dp", private)):
            scores = size * prior + centred @ (vector - size * mean) @ mapped
            areas[name].append(area_under_curve(scores[occurs], scores[~occurs]))
        areas["prior"].append(area_under_curve(prior[occurs], prior[~occurs]))
    cases: list[tuple[list[float], str, Setting, float | None]] = [
        (areas["update"], "none: the update itself", "no_sanitiser", math.inf),
        (areas["dp"], "dp: one step at ε = 8", "variant", 8.0),
        (areas["prior"], "no update at all: frequent words of public texts", "no_sanitiser", None),
    ]
    return [
        AttackResult(
            attack=WORDS,
            adversary="server or recipient with public texts of the same kind",
            sees=f"the sum of the gradients of {size} texts; the base model is public",
            statistic="ridge map from gradients to words, learnt on public texts",
            release=release,
            setting=setting,
            epsilon=epsilon,
            figures=(Figure.mean("AUC over words", found),),
            note=f"{len(vocabulary)} words; compare with the row without any update",
        )
        for found, release, setting, epsilon in cases
    ]


def _dp_step(rows: np.ndarray, bound: float, sigma: float, noise: NoiseSource) -> np.ndarray:
    """One noisy sum by the product's own code."""
    total = clip_and_sum(torch.from_numpy(np.ascontiguousarray(rows)), bound)
    return np.asarray(noisy_sum(total, bound, sigma, noise).numpy())


def _membership(
    scores: np.ndarray,
    members: np.ndarray,
    words: str,
    adversary: str,
    setting: Setting,
    epsilon: float = math.inf,
    sigma: float = 0.0,
) -> AttackResult:
    """The result of a likelihood ratio if there is a noise σ, of least squares over a dictionary if not."""
    figures, curve = membership.scored(scores, members, Ceiling.of_noise(sigma))
    return AttackResult(
        attack=MEMBERSHIP,
        adversary=f"{adversary}, knowing all other members" if sigma else adversary,
        sees="a full-batch step on P and Q from the public starting point",
        statistic="likelihood ratio" if sigma else "dictionary least squares",
        release=words,
        setting=setting,
        epsilon=epsilon,
        figures=figures,
        curve=curve if sigma else (),
        note="with `encrypted` alone the server holds a ciphertext, and nothing here applies to it",
    )


def _words(text: str) -> set[str]:
    kept = "".join(letter if letter.isalpha() else " " for letter in text.lower())
    return {word for word in kept.split() if len(word) >= 4}


def _presence(texts: Sequence[str], vocabulary: Sequence[str]) -> np.ndarray:
    found = [_words(text) for text in texts]
    return np.array([[word in words for word in vocabulary] for words in found], dtype=np.float64)
