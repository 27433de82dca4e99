"""Attacks on the task profile: membership with references, the run's own release, and empirical ε."""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Final

import numpy as np

from fedmosaic.experiments.attacks.statistics import empirical, membership
from fedmosaic.experiments.attacks.statistics.results import DELTA, AttackResult, Setting
from fedmosaic.experiments.attacks.statistics.roc import Ceiling, membership_figures
from fedmosaic.privacy.accounting.calibrate import noise_multiplier_for
from fedmosaic.privacy.mechanism.gaussian import GRID, ClippedSum, clip
from fedmosaic.privacy.mechanism.noise import Float64Array, NoiseSource
from fedmosaic.privacy.mechanism.profile import Float32Array, ProfileMechanism, clipped_sum, release
from fedmosaic.privacy.mechanism.projection import GradientFactors, PublicMap

EPSILONS: Final = (8.0, 3.0, 1.0)
AUTHORS_SHARE: Final = 0.4
AUTHORS_NOISE: Final = 1e-4
MEMBERSHIP: Final = "Membership in the task profile"
BY_TASK: Final = "Membership in the task profile, by task and probe"
OWN_RELEASE: Final = "Membership in the run's own profile release"
AUDIT: Final = "Empirical ε of the task profile"

_SEES: Final = "the release; probe model and map are public, so every candidate's gradient can be recomputed"
_DICTIONARY: Final = "dictionary least squares over all candidates"
_CORRELATION: Final = "plain correlation"
_SERVER: Final = "server with a pool of candidates"
_STRONGEST: Final = "adversary of DP: knows all other members"
_WEAK: Final = "sees mostly the task; too weak to be evidence of protection"


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
    brief: str = "",
) -> Iterator[AttackResult]:
    """Membership in the profile: without sanitiser, the authors', their map under DP, and the product.

    Each candidate is in a simulated release with chance `rate`. `brief` names task and probe, for four
    settings and the two strong statistics under a heading of their own.
    """
    generator = np.random.default_rng(seed)
    members = membership.draw_members(releases, len(factors), rate, generator)
    results = list(_references(factors, members, rate, generator, () if brief else EPSILONS))
    rows, own = public_map.rows(factors), public_map.mechanism
    for epsilon in EPSILONS[: 1 if brief else None]:
        mechanism = own.model_copy(update={"noise_multiplier": noise_multiplier(epsilon)})
        results += _of_mechanism(rows, mechanism, members, rate, noise, "variant")
    results += _of_mechanism(rows, own, members, rate, noise, "product")
    for result in results:
        changes = {"attack": BY_TASK, "release": f"{brief}: {result.release}", "curve": ()}
        if not brief or result.statistic != _CORRELATION:
            yield result.model_copy(update=changes if brief else {})


def own_release_result(
    released: Float32Array, rows: Float64Array, is_member: np.ndarray, mechanism: ProfileMechanism
) -> AttackResult:
    """Dictionary least squares on the (k,) bytes that the run released, for (N, k) standardised rows."""
    values = clip(rows, mechanism.clipping_norm)[0] * (mechanism.clipping_norm / GRID)
    inner = np.asarray(values @ released.astype(np.float64), dtype=np.float64)[None]
    deviation, prior = mechanism.noise_standard_deviation, float(is_member.mean())
    scores = membership.dictionary_scores(inner, values @ values.T, deviation, prior)[0]
    sigma = mechanism.noise_multiplier
    return AttackResult(
        attack=OWN_RELEASE,
        adversary=_SERVER,
        sees=_SEES,
        statistic=_DICTIONARY,
        release=f"stored bytes, σ = {sigma:g}",
        setting="product",
        epsilon=empirical.epsilon_of_noise(sigma),
        figures=membership_figures(scores, is_member, Ceiling.of_noise(sigma))[:1],
        note="one draw of the noise; the interval takes scores for independent, so it is a little narrow",
    )


def audit_result(
    mechanism: ProfileMechanism,
    others: Float64Array,
    noise: NoiseSource,
    *,
    releases: int,
    setting: Setting = "product",
) -> AttackResult:
    """Repeat the product's release, of the (n, k) rows of others, with and without a canary of norm C."""
    rest = clipped_sum(others, mechanism)
    # A row of norm above C, orthogonal to the sum of the rest, so that clipping brings it to C.
    direction = np.zeros(mechanism.dimensions)
    direction[int(np.argmin(np.abs(rest.units)))] = 1.0
    mean = rest.units / max(1.0, float(np.linalg.norm(rest.units)))
    direction -= mean * float(mean @ direction)
    canary_row = np.asarray(direction / np.linalg.norm(direction) * (2.0 * mechanism.clipping_norm))
    canary = clipped_sum(canary_row[None], mechanism)

    def once(with_canary: bool) -> Float32Array:
        return release(rest + canary if with_canary else rest, mechanism, noise)

    claimed = empirical.epsilon_of_noise(mechanism.noise_multiplier)
    return AttackResult(
        attack=AUDIT,
        adversary=_STRONGEST,
        sees=f"{releases:,} releases of the same data, half of them with a canary of norm C",
        statistic="projection of the release on the canary",
        release=f"σ = {mechanism.noise_multiplier:.3g}",
        setting=setting,
        epsilon=claimed,
        figures=empirical.audit_figures(empirical.repeat_releases(once, canary_row, releases), claimed),
        note="value: certified at 95 %; low: certified at 99.99 %, which decides; high: most that could be "
        "certified by so many releases",
    )


def _references(
    factors: Sequence[GradientFactors],
    members: np.ndarray,
    rate: float,
    generator: np.random.Generator,
    epsilons: Sequence[float],
) -> Iterator[AttackResult]:
    """The mean gradient as it is, under the authors' sanitiser, and under DP of some ε in its place."""
    whole, kept = membership.gram_matrix(factors), membership.gram_matrix(factors, AUTHORS_SHARE)
    inner = membership.simulated_inner_products(whole, members, 0.0, generator)
    yield from _attacks(inner, whole, members, 0.0, rate, "raw mean gradient", "no_sanitiser")
    # The mean over n draws of N(0, 1e-4²), multiplied by n again.
    counts = members.sum(axis=1)
    inner = membership.simulated_inner_products(kept, members, AUTHORS_NOISE * np.sqrt(counts), generator)
    spread = AUTHORS_NOISE * math.sqrt(float(counts.mean()))
    words = "first 40 % of rows, noise 1e-4, no clipping"
    yield from _attacks(inner, kept, members, spread, rate, words, "authors")
    bound = float(np.quantile(np.sqrt(np.diag(kept)), 0.1))
    clipped = membership.clipped_gram(kept, bound)
    for epsilon in epsilons:
        sigma = noise_multiplier(epsilon)
        inner = membership.simulated_inner_products(clipped, members, sigma * bound, generator)
        words = f"first 40 % of rows, clipped, ε = {epsilon:g}"
        yield from _attacks(inner, clipped, members, sigma * bound, rate, words, "variant", epsilon, sigma)


def _of_mechanism(
    rows: Float64Array,
    mechanism: ProfileMechanism,
    members: np.ndarray,
    rate: float,
    noise: NoiseSource,
    setting: Setting,
) -> Iterator[AttackResult]:
    units, _ = clip(rows, mechanism.clipping_norm)
    values, sigma = units * (mechanism.clipping_norm / GRID), mechanism.noise_multiplier
    sums = [ClippedSum(units[chosen].sum(axis=0), 0, 0, int(chosen.sum())) for chosen in members]
    released = np.stack([release(total, mechanism, noise) for total in sums]).astype(np.float64)
    words = f"{mechanism.reduction.kind}, {mechanism.dimensions} numbers, σ = {sigma:.3g}"
    inner, gram, deviation = released @ values.T, values @ values.T, mechanism.noise_standard_deviation
    epsilon = empirical.epsilon_of_noise(sigma)
    yield from _attacks(inner, gram, members, deviation, rate, words, setting, epsilon, sigma)


def _attacks(
    inner: np.ndarray,
    gram: np.ndarray,
    members: np.ndarray,
    deviation: float,
    rate: float,
    words: str,
    setting: Setting,
    epsilon: float = math.inf,
    sigma: float = 0.0,
) -> Iterator[AttackResult]:
    ratios = membership.likelihood_ratio_scores(inner, gram, members, deviation)
    found = (
        (_STRONGEST, "likelihood ratio", ratios, ""),
        (_SERVER, _DICTIONARY, membership.dictionary_scores(inner, gram, deviation, rate), ""),
        ("server with one candidate", _CORRELATION, membership.correlation_scores(inner, gram), _WEAK),
    )
    for adversary, statistic, scores, note in found:
        figures, curve = membership.scored(scores, members, Ceiling.of_noise(sigma))
        yield AttackResult(
            attack=MEMBERSHIP,
            adversary=adversary,
            sees=_SEES,
            statistic=statistic,
            release=words,
            setting=setting,
            epsilon=epsilon,
            figures=figures,
            curve=() if note else curve,
            note=note,
        )
