"""Attacks on the shared adapter: membership and words from P, Q updates, per protection mode.

The public starting point of a run gives every candidate's gradient with respect to P and Q, so an update is a
sum over a known dictionary, as the profile is. What is attacked: the update itself (protection `none`,
seen by the server), a recipient's aggregate of several updates (`none` and `encrypted`), and one step of
DP-SGD (`dp`, seen by server and recipients). With `encrypted` the server sees a ciphertext only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from fedmosaic.client.dp.branch import only_shared_branch
from fedmosaic.client.dp.engine import clip_and_sum, example_gradient
from fedmosaic.client.dp.training import noisy_sum
from fedmosaic.client.model.adapted import load_adapted
from fedmosaic.client.model.examples import Example, encode_examples
from fedmosaic.client.model.loss import training_mode
from fedmosaic.client.settings import ModelSettings
from fedmosaic.experiments.attacks.profile import DELTA, noise_multiplier
from fedmosaic.experiments.attacks.statistics.membership import (
    clipped_gram,
    dictionary_scores,
    draw_members,
    likelihood_ratio_scores,
    scored_candidates,
    simulated_inner_products,
)
from fedmosaic.experiments.attacks.statistics.results import AttackResult, Figure, Setting
from fedmosaic.experiments.attacks.statistics.roc import (
    Ceiling,
    membership_figures,
    roc_points,
)
from fedmosaic.experiments.scenario.metrics import area_under_curve
from fedmosaic.privacy.federation.roster import AdapterTerms
from fedmosaic.privacy.mechanism.noise import NoiseSource

MEMBERSHIP: Final = "Membership in a P, Q update"
WORDS: Final = "Words of the training texts from a P, Q update"
_SCORED: Final = 16
_RIDGE: Final = 1.0
_LEAST_WORD_LENGTH: Final = 4


@dataclass(frozen=True, eq=False)
class AdapterRows:
    """Per-example gradients of P and Q at the public starting point.

    Attributes:
        rows: (N, D) float32.
        texts: the examples.
    """

    rows: np.ndarray
    texts: tuple[str, ...]


def adapter_rows(
    settings: ModelSettings, terms: AdapterTerms, groups: Sequence[Sequence[Example]], max_length: int
) -> list[AdapterRows]:
    """Gradients of examples with respect to P and Q of a fresh adapter, as every observer can compute them.

    Args:
        settings: the client's base model, public.
        terms: the run's adapter.
        groups: lists of examples; one result each.
        max_length: tokens per example.
    """
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
    epsilons: Sequence[float],
    seed: int,
) -> list[AttackResult]:
    """Who was in a full-batch step on P and Q, as each protection mode shows it.

    Args:
        candidates: the victim's candidates.
        others: examples of the other contributors of an aggregate.
        noise: of the DP steps.
        releases: simulated updates per mode.
        rate: chance of a candidate to be in one update.
        epsilons: of one DP step.
        seed: of the memberships.
    """
    generator = np.random.default_rng(seed)
    rows = candidates.rows.astype(np.float64)
    gram = rows @ rows.T
    members = draw_members(releases, len(rows), rate, generator)
    inner = simulated_inner_products(gram, members, 0.0, generator)
    results = [
        _membership(
            inner, gram, members, 0.0, rate, "none: the update itself", "server", "no_sanitiser", math.inf
        )
    ]
    # A recipient sees the victim's update beside two others', whose examples are noise to the attacker.
    foreign = others.rows.astype(np.float64)
    chosen = draw_members(releases, len(foreign), rate, generator)
    crossed = rows @ foreign.T
    spread = math.sqrt(float(np.mean(np.var(crossed, axis=1))) * rate * len(foreign)) / math.sqrt(
        float(np.mean(np.diag(gram)))
    )
    aggregate = inner + chosen @ crossed.T - rate * crossed.sum(axis=1)
    results.append(
        _membership(
            aggregate, gram, members, spread, rate,
            "none or encrypted: an aggregate with equal weight of other contributors", "recipient",
            "product", math.inf,
        )
    )  # fmt: skip
    bound = float(np.quantile(np.linalg.norm(rows, axis=1), 0.5))
    clipped = clipped_gram(gram, bound)
    scaled = rows * np.minimum(1.0, bound / np.linalg.norm(rows, axis=1))[:, None]
    for epsilon in epsilons:
        sigma = noise_multiplier(epsilon)
        inner = np.stack(
            [_dp_step(candidates.rows[chosen_], bound, sigma, noise) @ scaled.T for chosen_ in members]
        )
        results.append(
            _membership(
                inner, clipped, members, sigma * bound, rate, f"dp: one step at ε = {epsilon:g}",
                "server or recipient", "variant", epsilon, Ceiling(mu=1.0 / sigma),
            )
        )  # fmt: skip
    return results


def word_results(
    public: AdapterRows, victim: AdapterRows, noise: NoiseSource, *, size: int, updates: int, seed: int
) -> list[AttackResult]:
    """Which words occur in the texts of an update: a ridge map from gradients to words, learnt in public.

    Counts of words add up over examples as gradients do, so a linear map learnt on single examples reads the
    words of a sum. Compared with guessing the words that are frequent in public texts.

    Args:
        public: gradients and texts of a public set of the same kind.
        victim: of the client.
        noise: of the DP step.
        size: examples per update.
        updates: number of updates.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    vocabulary = _vocabulary(public.texts, victim.texts)
    shown, hidden = _presence(public.texts, vocabulary), _presence(victim.texts, vocabulary)
    rows = public.rows.astype(np.float64)
    mean, prior = rows.mean(axis=0), shown.mean(axis=0)
    centred = rows - mean
    gram = centred @ centred.T
    ridge = _RIDGE * float(np.trace(gram)) / len(gram)
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
    cases: list[tuple[str, str, Setting, float | None]] = [
        ("update", "none: the update itself", "no_sanitiser", math.inf),
        ("dp", "dp: one step at ε = 8", "variant", 8.0),
        ("prior", "no update at all: frequent words of public texts", "no_sanitiser", None),
    ]
    return [
        AttackResult(
            attack=WORDS,
            adversary="server or recipient with public texts of the same kind",
            sees=f"the sum of the gradients of {size} texts; the base model is public",
            statistic="ridge map from gradients to words, learnt on public texts",
            release=words,
            setting=setting,
            epsilon=epsilon,
            delta=DELTA if epsilon is not None else None,
            figures=(_mean_figure("AUC over words", areas[name]),),
            note=f"{len(vocabulary)} words; compare with the row without any update",
        )
        for name, words, setting, epsilon in cases
    ]


def _dp_step(rows: np.ndarray, bound: float, sigma: float, noise: NoiseSource) -> np.ndarray:
    """One noisy sum by the product's own code."""
    total = clip_and_sum(torch.from_numpy(np.ascontiguousarray(rows)), bound)
    return np.asarray(noisy_sum(total, bound, sigma, noise).numpy())


def _membership(
    inner: np.ndarray,
    gram: np.ndarray,
    members: np.ndarray,
    deviation: float,
    rate: float,
    words: str,
    adversary: str,
    setting: Setting,
    epsilon: float,
    ceiling: Ceiling | None = None,
) -> AttackResult:
    strongest = ceiling is not None
    if strongest:
        scores = likelihood_ratio_scores(inner, gram, members, deviation)
    else:
        scores = dictionary_scores(inner, gram, deviation, rate)
    used = scored_candidates(
        len(members), members.shape[1], _SCORED, np.random.default_rng([len(members), _SCORED])
    )
    flat, truth, groups = scores[used], members[used], np.nonzero(used)[0]
    return AttackResult(
        attack=MEMBERSHIP,
        adversary=f"{adversary}, knowing all other members" if strongest else adversary,
        sees="a full-batch step on P and Q from the public starting point",
        statistic="likelihood ratio" if strongest else "dictionary least squares",
        release=words,
        setting=setting,
        epsilon=epsilon,
        delta=DELTA,
        figures=membership_figures(flat, truth, ceiling or Ceiling(), groups),
        curve=roc_points(flat, truth) if strongest else (),
        note="with `encrypted` alone the server holds a ciphertext, and nothing here applies to it",
    )


def _vocabulary(public: Sequence[str], victim: Sequence[str]) -> list[str]:
    """Words that occur in public and in private texts, in neither of them nearly always."""
    counts: list[dict[str, int]] = []
    for texts in (public, victim):
        found: dict[str, int] = {}
        for text in texts:
            for word in _words(text):
                found[word] = found.get(word, 0) + 1
        counts.append(found)
    return sorted(
        word
        for word, count in counts[0].items()
        if 3 <= count <= 0.5 * len(public) and 1 <= counts[1].get(word, 0) <= 0.5 * len(victim)
    )


def _words(text: str) -> set[str]:
    kept = "".join(letter if letter.isalpha() else " " for letter in text.lower())
    return {word for word in kept.split() if len(word) >= _LEAST_WORD_LENGTH}


def _presence(texts: Sequence[str], vocabulary: Sequence[str]) -> np.ndarray:
    sets = [_words(text) for text in texts]
    return np.array([[word in words for word in vocabulary] for words in sets], dtype=np.float64)


def _mean_figure(name: str, values: Sequence[float]) -> Figure:
    if not values:
        return Figure(name=name, value=0.5, low=0.0, high=1.0)
    mean = float(np.mean(values))
    reach = 1.96 * float(np.std(values)) / math.sqrt(len(values))
    return Figure(name=name, value=mean, low=max(0.0, mean - reach), high=min(1.0, mean + reach))
