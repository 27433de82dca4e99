"""Attacks on the federation as a whole: colluding recipients, copied profiles, Sybils, task inference."""

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from fedmosaic.experiments.attacks.profile import EPSILONS, noise_multiplier
from fedmosaic.experiments.attacks.statistics import collusion
from fedmosaic.experiments.attacks.statistics.empirical import epsilon_of_noise
from fedmosaic.experiments.attacks.statistics.results import AttackResult, Figure, Setting
from fedmosaic.privacy.coalitions import SOLVED, estimate_errors
from fedmosaic.privacy.federation.terms import RelevanceTerms
from fedmosaic.privacy.mechanism.gaussian import ClippedSum, clip
from fedmosaic.privacy.mechanism.noise import NoiseSource
from fedmosaic.privacy.mechanism.profile import ProfileMechanism, release
from fedmosaic.privacy.policy import (
    AggregationPolicy,
    cap_weights,
    check_row,
    integer_weights,
    spread_weights,
)
from fedmosaic.protos.messages import Profile, WeightRow
from fedmosaic.server.round import relations
from fedmosaic.server.round.relevance import relevance
from fedmosaic.server.round.weights import Group, plan

Rows = Mapping[str, Mapping[str, float]]
"""Shares of an aggregate by recipient and contributor."""

COLLUSION: Final = "Collusion: solving for another member's adapter"
SPOOFING: Final = "Relevance spoofing: pulling or poisoning a victim's aggregate"
TASK: Final = "Task inference from the profile"
_BITS: Final = 12


def weight_matrix(rows: Rows, members: Sequence[str]) -> np.ndarray:
    """(N, N) shares; row i is what member i received."""
    return np.array([[rows.get(i, {}).get(j, 0.0) for j in members] for i in members])


def simulated_weights(
    members: int, rounds: int, terms: RelevanceTerms, policy: AggregationPolicy, seed: int
) -> list[np.ndarray]:
    """Weight matrices that the real planning makes of random profiles, a new one every round."""
    generator = np.random.default_rng(seed)
    names, matrices = [f"member-{number}" for number in range(members)], []
    for _ in range(rounds - 1):
        vectors = generator.standard_normal((members, 64)) + 0.7 * generator.standard_normal(64)
        rows = planned_rows(dict(zip(names, vectors, strict=True)), 0.0, terms, policy)
        matrices.append(weight_matrix(rows, names))
    return matrices


def planned_rows(
    vectors: Mapping[str, np.ndarray], variance: float, terms: RelevanceTerms, policy: AggregationPolicy
) -> dict[str, dict[str, float]]:
    """Shares that the server's own code gives, by recipient and contributor."""
    names = list(vectors)
    profiles = [Profile(vector.astype(np.float32), variance, 1) for vector in vectors.values()]
    group = Group("shared", "", 1, frozenset(names), frozenset(names))
    similar = relevance(profiles, terms.similarity)
    found = plan(group, names, similar, temperature=terms.temperature, policy=policy, bits=_BITS)
    return relations.shares({group.label: found.rows})[group.label]


def collusion_results(
    weights: Sequence[np.ndarray],
    policy: AggregationPolicy,
    *,
    source: str,
    dp_noise: float | None,
    trials: int = 20,
    seed: int = 0,
) -> list[AttackResult]:
    """What coalitions of every size recover, for adapters that move little or much between rounds.

    The weights are what every member received, per round, from some source. `dp_noise` is the least noise of
    a DP adapter over its signal; None leaves that case out. All coalitions are tried in small federations.
    """
    members, rounds = len(weights[0]), len(weights)
    cases: list[tuple[str, float, float, Setting]] = [
        ("adapters at rest", 0.0, 0.0, "product"),
        ("adapters that move 30 % a round", 0.3, 0.0, "product"),
    ]
    if dp_noise is not None:
        cases.append(("adapters at rest, trained with DP", 0.0, dp_noise, "variant"))
    results = []
    for words, movement, noise, setting in cases:
        figures = [
            Figure.spread(
                f"error, {size} of {members}, {count} aggregate(s) each",
                [_recovery_error(weights[:count], size, movement, noise, [seed, n]) for n in range(trials)],
            )
            for size in range(1, members)
            for count in sorted({1, rounds})
        ]
        results.append(_collusion(source, words, figures, setting))
    figures = []
    for k in range(1, members):
        held = collusion.equations(weights, [np.eye(members)] * rounds, range(k))
        count = collusion.independent_equations(held.weights_EU)
        figures.append(Figure.exact(f"independent rows, {k} of {members} ({members - k} unknown)", count))
    results.append(_collusion(source, "exact count of independent rows", figures))
    if members <= 12:
        figures = []
        for words, rows in (("one round", weights[:1]), (f"{rounds} rounds, adapters at rest", weights)):
            least = collusion.smallest_coalition(rows)
            name = "recipients that suffice" if least else "coalitions of any size that suffice"
            figures.append(Figure.exact(f"{name}, {words}", least or 0))
        note = f"all coalitions tried; solved is an error below {SOLVED:g}, adapters taken for unrelated"
        words = "smallest coalition that solves for an adapter"
        results.append(_collusion(source, words, figures, note=note))
    return [*results, _chosen_rows(members - 1, policy)]


def spoofing_results(
    profiles: Mapping[str, np.ndarray],
    variance: float,
    terms: RelevanceTerms,
    policy: AggregationPolicy,
    tasks: Mapping[str, str] | None = None,
    clip_bound: float | None = None,
) -> AttackResult:
    """How much of a victim's aggregate clients get that copy its profile, with the server's own planning.

    The variance is that of the profiles' noise. Without tasks, honest clients are not told apart;
    `clip_bound` is the largest absolute value of an uploaded number, if it is known.
    """
    shares: dict[int, list[float]] = {1: [], 2: [], 3: []}
    honest, strangers = [], []
    for victim in profiles:
        if tasks is not None:
            row = planned_rows(profiles, variance, terms, policy).get(victim, {})
            strangers += [share for name, share in row.items() if tasks[name] != tasks[victim]]
            honest += [share for name, share in row.items() if tasks[name] == tasks[victim]]
        for count, found in shares.items():
            sybils = {f"sybil-{number}": profiles[victim] for number in range(count)}
            rows = planned_rows({**profiles, **sybils}, variance, terms, policy)
            found.append(sum(rows.get(victim, {}).get(name, 0.0) for name in sybils))
    told = {"honest client of another task": strangers, "honest client of the same task": honest}
    figures = [Figure.spread(name, found) for name, found in told.items() if found]
    for count, found in shares.items():
        name = "one copy of the victim's profile" if count == 1 else f"{count} copies (Sybils)"
        figure = Figure.spread(name, found)
        # Shares with Σ w² ≤ s sum to at most √(count · s); rounding may lift one above the cap by one unit.
        bound = min(1.0, count * (policy.weight_cap + 2.0**-_BITS), math.sqrt(count * policy.squares_cap))
        figures.append(figure.model_copy(update={"bound": bound, "broken": figure.high > bound + 1e-9}))
    note = (
        "value: mean over victims; low and high: least and most. The cap bounds one client, not a party that "
        "enrolled several: who may enrol is for the consortium"
    )
    if clip_bound is not None:
        note += (
            f". Every uploaded number is clipped to ±{clip_bound:g}, so s of an attacker's share moves each "
            f"number by at most {clip_bound:g}·s"
        )
    return AttackResult(
        attack=SPOOFING,
        adversary="clients that know or guess the victim's profile",
        sees="the victim's released profile (worst case: told by the server)",
        statistic="share of the victim's aggregate",
        release=f"temperature {terms.temperature:g}, weight cap {policy.weight_cap:g}, squares cap "
        f"{policy.squares_cap:g}",
        setting="product",
        figures=tuple(figures),
        note=note,
    )


def task_results(
    rows_by_task: Mapping[str, np.ndarray],
    reference_by_task: Mapping[str, np.ndarray],
    mechanism: ProfileMechanism,
    noise: NoiseSource,
    *,
    size: int,
    releases: int,
    seed: int,
) -> list[AttackResult]:
    """Which task a client has, from one release: the nearest of the tasks' public mean profiles.

    Rows are (n, k), standardised: of the clients' examples, and of public examples of the same tasks.
    """
    generator = np.random.default_rng(seed)
    names = list(rows_by_task)
    means = np.stack([clip(reference_by_task[n], mechanism.clipping_norm)[0].mean(axis=0) for n in names])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    units = {name: clip(rows, mechanism.clipping_norm)[0] for name, rows in rows_by_task.items()}
    settings: list[tuple[float, Setting]] = [(0.0, "no_sanitiser")]
    settings += [(noise_multiplier(epsilon), "variant") for epsilon in EPSILONS]
    settings += [(mechanism.noise_multiplier, "product")]
    results = []
    for sigma, setting in settings:
        agreed = mechanism.model_copy(update={"noise_multiplier": sigma})
        right = 0
        for number, name in enumerate(names):
            for _ in range(releases):
                chosen = generator.permutation(len(units[name]))[:size]
                total = ClippedSum(units[name][chosen].sum(axis=0), 0, 0, len(chosen))
                right += int(np.argmax(means @ release(total, agreed, noise)) == number)
        examples = min(size, *map(len, units.values()))
        results.append(
            AttackResult(
                attack=TASK,
                adversary="server, or whoever sees a profile",
                sees="one release, and public examples of the candidate tasks",
                statistic="largest cosine with the tasks' mean profiles",
                release=f"{examples} examples, " + (f"σ = {sigma:.3g}" if sigma else "no noise"),
                setting=setting,
                epsilon=epsilon_of_noise(sigma),
                figures=(
                    Figure.share("right guesses", right, releases * len(names)),
                    Figure.exact("chance", 1 / len(names)),
                ),
                by_design=True,
                note="the task is what a profile is released for; ε protects single examples, not the task",
            )
        )
    return results


def dp_noise_ratio(sigma: float, rate: float, steps: int, examples: int, dimensions: int) -> float:
    """Least noise of a DP adapter over its signal: noise σC√(D·T) against at most T·q·n·C of gradients."""
    return sigma * math.sqrt(dimensions) / (math.sqrt(steps) * rate * examples)


def _recovery_error(
    weights: Sequence[np.ndarray], size: int, movement: float, noise: float, seed: Sequence[int]
) -> float:
    """The least error of any adapter outside a random coalition, for random adapters of 256 numbers."""
    members, generator = len(weights[0]), np.random.default_rng(seed)
    coalition = sorted(generator.permutation(members)[:size].tolist())
    adapters = generator.standard_normal((members, 256))
    over_rounds = [adapters + noise * generator.standard_normal(adapters.shape)]
    for _ in weights[1:]:
        over_rounds.append(over_rounds[-1] + movement * generator.standard_normal(adapters.shape))
    estimate = collusion.solve(collusion.equations(weights, over_rounds, coalition), movement)
    outside = [index for index in range(members) if index not in coalition]
    return min(collusion.recovery_error(e, adapters[i]) for e, i in zip(estimate, outside, strict=True))


def _chosen_rows(others: int, policy: AggregationPolicy) -> AttackResult:
    """A server that chooses the rows itself, with and without the policy that clients enforce."""
    alone, first, second = _rows_against(others, policy)
    cases = (
        ("1 recipient's aggregate, no key, policy on", [alone]),
        ("1 recipient's aggregates of 2 rounds, adapters at rest, no key, policy on", [first, second]),
        ("2 recipients' aggregates, no key, policy on", [first, second]),
    )
    figures = [
        Figure.exact(f"server and {words}", float(estimate_errors(np.array(rows))[0]))
        for words, rows in cases
    ]
    figures.append(Figure.exact("server and 1 recipient's aggregate, no policy (one-hot row)", 0.0))
    return _collusion(
        "rows chosen by a malicious server; nobody gives it the group key",
        "what aggregates alone reveal, exact",
        figures,
        note="all rows with least squares are about what the aggregates alone reveal: the colluders pass on "
        "what they decrypted and keep their group key to themselves. Error 0: the victim's adapter is had "
        "exactly, from rows that each keep every rule: the others have equal weights in both, and the "
        "victim's differ. The policy holds against such a server with one recipient and one round, and no "
        "rule on single rows can hold against more: then only DP on the adapter protects",
    )


def _rows_against(others: int, policy: AggregationPolicy) -> list[list[float]]:
    """The most one-sided row that a client accepts, and two that differ in the victim's weight only."""
    total = 1 << _BITS
    heavy = spread_weights(
        cap_weights([1.0, *([1e-6] * (others - 1))], policy.weight_cap), policy.squares_cap, _BITS
    )
    even = total // others
    equal = [[total - (others - 1) * each, *([each] * (others - 1))] for each in (even, even - even // 8)]
    names = tuple(f"member-{number}" for number in range(others))
    found = []
    for weights in (integer_weights(np.array(heavy), _BITS).tolist(), *equal):
        check_row("recipient", WeightRow(names, tuple(weights), _BITS), policy)
        found.append([weight / total for weight in weights])
    return found


def _collusion(
    source: str, words: str, figures: Sequence[Figure], setting: Setting = "product", note: str = ""
) -> AttackResult:
    return AttackResult(
        attack=COLLUSION,
        adversary="colluding recipients",
        sees=f"their own adapters, aggregates and weight rows: {source}",
        statistic="least squares over all equations; relative error of the best recovered adapter",
        release=words,
        setting=setting,
        figures=tuple(figures),
        note=note or "value: mean over random adapters; low and high: least and most; 1 is a guess of zero",
    )
