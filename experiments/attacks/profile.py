"""Attacks on the task profile: membership with references, the run's own release, and empirical ε."""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Final

import numpy as np

from fedmosaic.experiments.attacks.statistics.empirical import (
    audit_figures,
    gaussian_epsilon,
    repeat_releases,
)
from fedmosaic.experiments.attacks.statistics.membership import (
    clipped_gram,
    correlation_scores,
    dictionary_scores,
    draw_members,
    gram_matrix,
    likelihood_ratio_scores,
    scored_candidates,
    simulated_inner_products,
)
from fedmosaic.experiments.attacks.statistics.results import AttackResult, Setting
from fedmosaic.experiments.attacks.statistics.roc import Ceiling, membership_figures, roc_points
from fedmosaic.privacy.accounting.calibrate import noise_multiplier_for
from fedmosaic.privacy.mechanism.gaussian import GRID, ClippedSum, clip
from fedmosaic.privacy.mechanism.noise import Float64Array, NoiseSource
from fedmosaic.privacy.mechanism.profile import Float32Array, ProfileMechanism, clipped_sum, release
from fedmosaic.privacy.mechanism.projection import GradientFactors, PublicMap

DELTA: Final = 1e-5
EPSILONS: Final = (8.0, 3.0, 1.0)
AUTHORS_SHARE: Final = 0.4
AUTHORS_NOISE: Final = 1e-4
MEMBERSHIP: Final = "Membership in the task profile"
BY_TASK: Final = "Membership in the task profile, by task and probe"
OWN_RELEASE: Final = "Membership in the run's own profile release"
AUDIT: Final = "Empirical ε of the task profile"

_SEES: Final = "the release; probe model and map are public, so every candidate's gradient can be recomputed"
_SCORED: Final = 16
_DICTIONARY: Final = "dictionary least squares over all candidates"
_RATIO: Final = "likelihood ratio"
_CORRELATION: Final = "plain correlation"
_SERVER: Final = "server with a pool of candidates"
_STRONGEST: Final = "adversary of DP: knows all other members"
_WEAK: Final = "server with one candidate"
_WEAK_NOTE: Final = "sees mostly the task; too weak to be evidence of protection"


@lru_cache
def noise_multiplier(epsilon: float) -> float:
    """σ of one full-batch release with this ε at `DELTA`; 0 for infinity."""
    return 0.0 if math.isinf(epsilon) else noise_multiplier_for(epsilon, DELTA, (), 1.0, 1)


def membership_results(
    factors: Sequence[GradientFactors],
    public_map: PublicMap,
    noise: NoiseSource,
    *,
    releases: int,
    rate: float,
    seed: int,
) -> list[AttackResult]:
    """Membership in the profile: without sanitiser, the authors', their map under DP, and the product.

    Args:
        factors: gradients of N candidates.
        public_map: the product's map with its σ.
        noise: of the product's releases.
        releases: simulated releases per setting.
        rate: chance of a candidate to be in one release.
        seed: of memberships and of the references' noise.

    Returns:
        One result per setting and attack.
    """
    generator = np.random.default_rng(seed)
    members = draw_members(releases, len(factors), rate, generator)
    results = list(_references(factors, members, rate, generator))
    rows = public_map.rows(factors)
    own = public_map.mechanism
    for epsilon in EPSILONS:
        mechanism = own.model_copy(update={"noise_multiplier": noise_multiplier(epsilon)})
        results += _of_mechanism(rows, mechanism, members, rate, noise, "variant")
    return [*results, *_of_mechanism(rows, own, members, rate, noise, "product")]


def brief_results(
    factors: Sequence[GradientFactors],
    public_map: PublicMap,
    noise: NoiseSource,
    *,
    words: str,
    releases: int,
    rate: float,
    seed: int,
) -> list[AttackResult]:
    """`membership_results` in four settings and by the two strong statistics, under its own heading.

    Args:
        factors: gradients of N candidates.
        public_map: the product's map with its σ.
        noise: of the product's releases.
        words: task and probe.
        releases: simulated releases per setting.
        rate: chance of a candidate to be in one release.
        seed: of memberships and of the references' noise.
    """
    generator = np.random.default_rng(seed)
    members = draw_members(releases, len(factors), rate, generator)
    results = list(_unprotected(factors, members, rate, generator))
    rows = public_map.rows(factors)
    own = public_map.mechanism
    strict = own.model_copy(update={"noise_multiplier": noise_multiplier(EPSILONS[0])})
    results += _of_mechanism(rows, strict, members, rate, noise, "variant")
    results += _of_mechanism(rows, own, members, rate, noise, "product")
    return [
        result.model_copy(update={"attack": BY_TASK, "release": f"{words}: {result.release}", "curve": ()})
        for result in results
        if result.statistic != _CORRELATION
    ]


def own_release_result(
    released: Float32Array, rows: Float64Array, is_member: np.ndarray, mechanism: ProfileMechanism
) -> AttackResult:
    """Dictionary least squares on the bytes that the run really released: one draw of the noise.

    Args:
        released: (k,) the release.
        rows: (N, k) standardised rows of the candidates.
        is_member: (N,) who is in it.
        mechanism: of the release.
    """
    units, _ = clip(rows, mechanism.clipping_norm)
    values = units * (mechanism.clipping_norm / GRID)
    gram = values @ values.T
    inner = np.asarray(values @ released.astype(np.float64), dtype=np.float64)[None]
    scores = dictionary_scores(inner, gram, mechanism.noise_standard_deviation, float(is_member.mean()))[0]
    mu = 1.0 / mechanism.noise_multiplier if mechanism.noise_multiplier else math.inf
    return AttackResult(
        attack=OWN_RELEASE,
        adversary=_SERVER,
        sees=_SEES,
        statistic=_DICTIONARY,
        release=f"stored bytes, σ = {mechanism.noise_multiplier:g}",
        setting="product",
        epsilon=gaussian_epsilon(mu, DELTA),
        delta=DELTA,
        figures=membership_figures(scores, is_member, _ceiling(mechanism.noise_multiplier))[:1],
        note="one draw of the noise; the interval takes scores for independent, so it is a little narrow",
    )


def audit_result(
    public_map: PublicMap,
    others: Sequence[GradientFactors],
    noise: NoiseSource,
    *,
    releases: int,
    setting: Setting = "product",
) -> AttackResult:
    """Repeat the product's release with and without a canary that fills the clipping bound.

    Args:
        public_map: the map under audit.
        others: the rest of the data set, in every release.
        noise: what the release draws from.
        releases: number of releases.
        setting: what the result is filed under.
    """
    mechanism = public_map.mechanism
    rest = clipped_sum(public_map.rows(others), mechanism)
    canary_row = _canary_row(rest, mechanism)
    canary = clipped_sum(canary_row[None], mechanism)

    def once(with_canary: bool) -> Float32Array:
        return release(rest + canary if with_canary else rest, mechanism, noise)

    sigma = mechanism.noise_multiplier
    claimed = gaussian_epsilon(1.0 / sigma if sigma else math.inf, DELTA)
    scores = repeat_releases(once, canary_row, releases)
    return AttackResult(
        attack=AUDIT,
        adversary=_STRONGEST,
        sees=f"{releases:,} releases of the same data, half of them with a canary of norm C",
        statistic="projection of the release on the canary",
        release=f"σ = {sigma:.3g}",
        setting=setting,
        epsilon=claimed,
        delta=DELTA,
        figures=audit_figures(scores, claimed, DELTA),
        note="value: certified at 95 %; low: certified at 99.99 %, which decides; high: most that could be "
        "certified by so many releases",
    )


def _canary_row(rest: ClippedSum, mechanism: ProfileMechanism) -> Float64Array:
    """A row of norm above C, orthogonal to the sum of the rest, so that clipping brings it to C."""
    direction = np.zeros(mechanism.dimensions)
    direction[int(np.argmin(np.abs(rest.units)))] = 1.0
    mean = rest.units / max(1.0, float(np.linalg.norm(rest.units)))
    direction -= mean * float(mean @ direction)
    return np.asarray(direction / np.linalg.norm(direction) * (2.0 * mechanism.clipping_norm))


def _references(
    factors: Sequence[GradientFactors], members: np.ndarray, rate: float, generator: np.random.Generator
) -> Iterator[AttackResult]:
    yield from _unprotected(factors, members, rate, generator)
    kept = gram_matrix(factors, AUTHORS_SHARE)
    bound = float(np.quantile(np.sqrt(np.diag(kept)), 0.1))
    clipped = clipped_gram(kept, bound)
    for epsilon in EPSILONS:
        deviation = noise_multiplier(epsilon) * bound
        inner = simulated_inner_products(clipped, members, deviation, generator)
        yield from _attacks(
            inner, clipped, members, deviation, rate, f"first 40 % of rows, clipped, ε = {epsilon:g}",
            "variant", epsilon, _ceiling(noise_multiplier(epsilon)),
        )  # fmt: skip


def _unprotected(
    factors: Sequence[GradientFactors], members: np.ndarray, rate: float, generator: np.random.Generator
) -> Iterator[AttackResult]:
    whole, kept = gram_matrix(factors), gram_matrix(factors, AUTHORS_SHARE)
    counts = members.sum(axis=1)
    inner = simulated_inner_products(whole, members, 0.0, generator)
    yield from _attacks(inner, whole, members, 0.0, rate, "raw mean gradient", "no_sanitiser", math.inf)
    # The mean over n draws of N(0, 1e-4²), multiplied by n again.
    inner = simulated_inner_products(kept, members, AUTHORS_NOISE * np.sqrt(counts), generator)
    spread = AUTHORS_NOISE * math.sqrt(float(counts.mean()))
    yield from _attacks(
        inner, kept, members, spread, rate, "first 40 % of rows, noise 1e-4, no clipping", "authors", math.inf
    )


def _of_mechanism(
    rows: Float64Array,
    mechanism: ProfileMechanism,
    members: np.ndarray,
    rate: float,
    noise: NoiseSource,
    setting: Setting,
) -> Iterator[AttackResult]:
    units, _ = clip(rows, mechanism.clipping_norm)
    values = units * (mechanism.clipping_norm / GRID)
    sums = [ClippedSum(units[chosen].sum(axis=0), 0, 0, int(chosen.sum())) for chosen in members]
    released = np.stack([release(total, mechanism, noise) for total in sums]).astype(np.float64)
    sigma = mechanism.noise_multiplier
    epsilon = gaussian_epsilon(1.0 / sigma if sigma else math.inf, DELTA)
    yield from _attacks(
        released @ values.T,
        values @ values.T,
        members,
        mechanism.noise_standard_deviation,
        rate,
        f"{mechanism.reduction.kind}, {mechanism.dimensions} numbers, σ = {sigma:.3g}",
        setting,
        epsilon,
        _ceiling(sigma),
    )


def _attacks(
    inner: np.ndarray,
    gram: np.ndarray,
    members: np.ndarray,
    deviation: float,
    rate: float,
    words: str,
    setting: Setting,
    epsilon: float,
    ceiling: Ceiling | None = None,
) -> Iterator[AttackResult]:
    # The same choice for every attack and setting, and independent of who is a member.
    used = scored_candidates(
        len(members), members.shape[1], _SCORED, np.random.default_rng([len(members), _SCORED])
    )
    groups = np.nonzero(used)[0]
    found = (
        (_STRONGEST, _RATIO, likelihood_ratio_scores(inner, gram, members, deviation), ""),
        (_SERVER, _DICTIONARY, dictionary_scores(inner, gram, deviation, rate), ""),
        (_WEAK, _CORRELATION, correlation_scores(inner, gram), _WEAK_NOTE),
    )
    for adversary, statistic, scores, note in found:
        flat, truth = scores[used], members[used]
        yield AttackResult(
            attack=MEMBERSHIP,
            adversary=adversary,
            sees=_SEES,
            statistic=statistic,
            release=words,
            setting=setting,
            epsilon=epsilon,
            delta=DELTA,
            figures=membership_figures(flat, truth, ceiling or Ceiling(), groups),
            curve=roc_points(flat, truth) if statistic != _CORRELATION else (),
            note=note,
        )


def _ceiling(sigma: float) -> Ceiling:
    return Ceiling(mu=1.0 / sigma) if sigma else Ceiling()
