"""Attacks on the federation as a whole: colluding recipients, copied profiles, Sybils, task inference."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from fedmosaic.experiments.attacks.profile import DELTA, EPSILONS, noise_multiplier
from fedmosaic.experiments.attacks.statistics.collusion import (
    equations,
    independent_equations,
    recovery_error,
    smallest_coalition,
    solve,
)
from fedmosaic.experiments.attacks.statistics.empirical import gaussian_epsilon
from fedmosaic.experiments.attacks.statistics.results import CONFIDENCE, AttackResult, Figure, Setting
from fedmosaic.experiments.attacks.statistics.roc import clopper_pearson
from fedmosaic.privacy.coalitions import SOLVED, estimate_errors
from fedmosaic.privacy.encryption.weights import integer_weights
from fedmosaic.privacy.federation.roster import RelevanceTerms
from fedmosaic.privacy.mechanism.noise import NoiseSource
from fedmosaic.privacy.mechanism.profile import (
    ClippedSum,
    ProfileMechanism,
    clip,
    release,
)
from fedmosaic.privacy.policy import (
    AggregationPolicy,
    cap_weights,
    check_row,
    spread_weights,
)
from fedmosaic.protos.messages import Profile, WeightRow
from fedmosaic.server.round.relevance import relevance
from fedmosaic.server.round.weights import Group, plan

COLLUSION: Final = "Collusion: solving for another member's adapter"
SPOOFING: Final = "Relevance spoofing: pulling or poisoning a victim's aggregate"
TASK: Final = "Task inference from the profile"
_BITS: Final = 12
_DIMENSIONS: Final = 256
_ALL_COALITIONS: Final = 12
"""Members up to which every coalition is tried."""
_PHRASE: Final = "share of the victim's aggregate"


def weights_of_run(server_run: Mapping[str, Any], members: Sequence[str]) -> list[np.ndarray]:
    """Weight matrices of the closed rounds of a run, rows are recipients; the last round's is never sent."""
    matrices = []
    for result in server_run.get("results", [])[:-1]:
        matrix = np.zeros((len(members), len(members)))
        for recipient, row in result["weights"].get("shared", {}).items():
            for contributor, share in row.items():
                matrix[members.index(recipient), members.index(contributor)] = share
        matrices.append(matrix)
    return matrices


def simulated_weights(
    members: int, rounds: int, terms: RelevanceTerms, policy: AggregationPolicy, seed: int
) -> list[np.ndarray]:
    """Weight matrices that the real planning makes of random profiles, a new one every round."""
    generator = np.random.default_rng(seed)
    names = [f"member-{number}" for number in range(members)]
    matrices = []
    for _ in range(rounds - 1):
        vectors = generator.standard_normal((members, 64)) + 0.7 * generator.standard_normal(64)
        rows = planned_rows(dict(zip(names, vectors, strict=True)), 0.0, terms, policy)
        matrices.append(np.array([[rows.get(i, {}).get(j, 0.0) for j in names] for i in names]))
    return matrices


def planned_rows(
    vectors: Mapping[str, np.ndarray], variance: float, terms: RelevanceTerms, policy: AggregationPolicy
) -> dict[str, dict[str, float]]:
    """Shares that the server's own code gives, by recipient and contributor."""
    names = list(vectors)
    profiles = [Profile(vector.astype(np.float32), variance, 1) for vector in vectors.values()]
    group = Group("shared", "", 1, frozenset(names), frozenset(names))
    found = plan(
        group,
        names,
        relevance(profiles, terms.similarity),
        round_number=1,
        temperature=terms.temperature,
        policy=policy,
        bits=_BITS,
    )
    return {
        name: {c: w / (1 << row.bits) for c, w in zip(row.contributors, row.weights, strict=True)}
        for name, row in found.rows.items()
    }


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

    Args:
        weights: per round, what every member received.
        policy: limits on rows.
        source: where the weights come from, in words.
        dp_noise: least noise of a DP adapter over its signal; None to leave that case out.
        trials: random adapters per case.
        seed: of the adapters.
    """
    members = len(weights[0])
    cases = [("adapters at rest", 0.0, 0.0), ("adapters that move 30 % a round", 0.3, 0.0)]
    if dp_noise is not None:
        cases.append(("adapters at rest, trained with DP", 0.0, dp_noise))
    results = []
    for words, movement, noise in cases:
        figures = []
        for size in range(1, members):
            for rounds in sorted({1, len(weights)}):
                errors = _recovery_errors(weights[:rounds], size, movement, noise, trials, seed)
                figures.append(_spread(f"error, {size} of {members}, {rounds} aggregate(s) each", errors))
        results.append(_collusion(source, words, figures, "product" if not noise else "variant"))
    figures = [
        _exact(
            f"independent rows, {size} of {members} ({members - size} unknown)", float(_rows(weights, size))
        )
        for size in range(1, members)
    ]
    results.append(_collusion(source, "exact count of independent rows", figures, "product"))
    if members <= _ALL_COALITIONS:
        results.append(_smallest(weights, source))
    return [*results, _chosen_rows(members - 1, policy)]


def spoofing_results(
    profiles: Mapping[str, np.ndarray],
    tasks: Mapping[str, str],
    mechanism: ProfileMechanism,
    terms: RelevanceTerms,
    policy: AggregationPolicy,
    clip_bound: float,
) -> list[AttackResult]:
    """How much of a victim's aggregate clients get that copy its profile, with the server's own planning.

    Args:
        profiles: released profiles by client.
        tasks: task by client.
        mechanism: for the noise variance.
        terms: similarity and temperature.
        policy: the caps.
        clip_bound: largest absolute value of an uploaded number.
    """
    shares: dict[int, list[float]] = {}
    honest, strangers = [], []
    for victim in profiles:
        row = planned_rows(profiles, mechanism.noise_variance, terms, policy).get(victim, {})
        strangers += [share for name, share in row.items() if tasks[name] != tasks[victim]]
        honest += [share for name, share in row.items() if tasks[name] == tasks[victim]]
        for count in (1, 2, 3):
            sybils = {f"sybil-{number}": profiles[victim] for number in range(count)}
            rows = planned_rows({**profiles, **sybils}, mechanism.noise_variance, terms, policy)
            shares.setdefault(count, []).append(sum(rows.get(victim, {}).get(name, 0.0) for name in sybils))
    figures = [_spread("honest client of another task", strangers)] if strangers else []
    figures += [_spread("honest client of the same task", honest)] if honest else []
    for count, found in shares.items():
        name = "one copy of the victim's profile" if count == 1 else f"{count} copies (Sybils)"
        figure = _spread(name, found)
        bound = _largest_share(count, policy)
        figures.append(figure.model_copy(update={"bound": bound, "broken": figure.high > bound + 1e-9}))
    return [
        AttackResult(
            attack=SPOOFING,
            adversary="clients that know or guess the victim's profile",
            sees="the victim's released profile (worst case: told by the server)",
            statistic=_PHRASE,
            release=f"temperature {terms.temperature:g}, weight cap {policy.weight_cap:g}, squares cap "
            f"{policy.squares_cap:g}",
            setting="product",
            figures=tuple(figures),
            note="value: mean over victims; low and high: least and most. The cap bounds one client, not a "
            "party that enrolled several: who may enrol is for the consortium. Every uploaded number is "
            f"clipped to ±{clip_bound:g}, so s of an attacker's share moves each number by at most "
            f"{clip_bound:g}·s",
        )
    ]


def _largest_share(count: int, policy: AggregationPolicy) -> float:
    """What so many contributors have at most together: shares with Σ w² ≤ s sum to at most √(count · s)."""
    # Rounding to integers may lift one share above the cap by one unit.
    cap = policy.weight_cap + 2.0**-_BITS
    return min(1.0, count * cap, math.sqrt(count * policy.squares_cap))


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

    Args:
        rows_by_task: (n, k) standardised rows of the clients' examples.
        reference_by_task: (n, k) rows of public examples of the same tasks.
        mechanism: the product's.
        noise: of the releases.
        size: examples per release.
        releases: releases per task and setting.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    names = list(rows_by_task)
    means = np.stack([_clipped_mean(reference_by_task[name], mechanism) for name in names])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    units = {name: clip(rows, mechanism.clipping_norm)[0] for name, rows in rows_by_task.items()}
    results = []
    settings: list[tuple[float, Setting]] = [(0.0, "no_sanitiser")]
    settings += [(noise_multiplier(epsilon), "variant") for epsilon in EPSILONS]
    settings += [(mechanism.noise_multiplier, "product")]
    for sigma, setting in settings:
        agreed = mechanism.model_copy(update={"noise_multiplier": sigma})
        right = 0
        for number, name in enumerate(names):
            for _ in range(releases):
                chosen = generator.permutation(len(units[name]))[:size]
                total = ClippedSum(units[name][chosen].sum(axis=0), 0, 0, len(chosen))
                right += int(np.argmax(means @ release(total, agreed, noise)) == number)
        tried = releases * len(names)
        low, high = clopper_pearson(right, tried, CONFIDENCE)
        figures = (
            Figure(name="right guesses", value=right / tried, low=low, high=high),
            Figure(name="chance", value=1 / len(names), low=1 / len(names), high=1 / len(names)),
        )
        epsilon = gaussian_epsilon(1.0 / sigma if sigma else math.inf, DELTA)
        results.append(_task(sigma, setting, epsilon, figures, min(size, *map(len, units.values()))))
    return results


def dp_noise_ratio(sigma: float, rate: float, steps: int, examples: int, dimensions: int) -> float:
    """Least noise of a DP adapter over its signal: noise σC√(D·T) against at most T·q·n·C of gradients."""
    return sigma * math.sqrt(dimensions) / (math.sqrt(steps) * rate * examples)


def _rows(weights: Sequence[np.ndarray], size: int) -> int:
    members = len(weights[0])
    coalition, identity = list(range(size)), np.eye(members)
    return independent_equations(equations(weights, [identity] * len(weights), coalition).weights_EU)


def _recovery_errors(
    weights: Sequence[np.ndarray], size: int, movement: float, noise: float, trials: int, seed: int
) -> list[float]:
    members = len(weights[0])
    errors = []
    for trial in range(trials):
        generator = np.random.default_rng([seed, trial])
        coalition = sorted(generator.permutation(members)[:size].tolist())
        adapters = generator.standard_normal((members, _DIMENSIONS))
        released = adapters + noise * generator.standard_normal(adapters.shape)
        over_rounds = [released]
        for _ in weights[1:]:
            over_rounds.append(over_rounds[-1] + movement * generator.standard_normal(adapters.shape))
        estimate = solve(equations(weights, over_rounds, coalition), movement)
        outside = [index for index in range(members) if index not in coalition]
        errors.append(min(recovery_error(e, adapters[i]) for e, i in zip(estimate, outside, strict=True)))
    return errors


def _smallest(weights: Sequence[np.ndarray], source: str) -> AttackResult:
    """The true number of recipients that suffices; nobody's guess from the size of the roster."""
    figures = []
    for words, rounds in (("one round", weights[:1]), (f"{len(weights)} rounds, adapters at rest", weights)):
        size = float(smallest_coalition(rounds) or math.inf)
        figures.append(_exact(f"recipients that suffice, {words}", size))
    return _collusion(
        source,
        "smallest coalition that solves for an adapter",
        figures,
        "product",
        f"all coalitions tried; solved is an error below {SOLVED:g}, adapters taken for unrelated",
    )


def _chosen_rows(others: int, policy: AggregationPolicy) -> AttackResult:
    """A server that chooses the rows itself, with and without the policy that clients enforce."""
    alone, first, second = _rows_against(others, policy)
    cases = (
        ("1 recipient's aggregate, no key, policy on", [alone]),
        ("1 recipient's aggregates of 2 rounds, adapters at rest, no key, policy on", [first, second]),
        ("2 recipients' aggregates, no key, policy on", [first, second]),
    )
    figures = [
        _exact(f"server and {words}", float(estimate_errors(np.array(rows))[0])) for words, rows in cases
    ]
    figures.append(_exact("server and 1 recipient's aggregate, no policy (one-hot row)", 0.0))
    return _collusion(
        "rows chosen by a malicious server; nobody gives it the group key",
        "what aggregates alone reveal, exact",
        figures,
        "product",
        "all rows with least squares are about what the aggregates alone reveal: the colluders pass on what "
        "they decrypted and keep their group key to themselves. Error 0: the victim's adapter is had "
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


def _exact(name: str, value: float) -> Figure:
    return Figure(name=name, value=value, low=value, high=value)


def _spread(name: str, values: Sequence[float]) -> Figure:
    return Figure(name=name, value=float(np.mean(values)), low=float(min(values)), high=float(max(values)))


def _collusion(
    source: str, words: str, figures: Sequence[Figure], setting: Setting, note: str = ""
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


def _clipped_mean(rows: np.ndarray, mechanism: ProfileMechanism) -> np.ndarray:
    units, _ = clip(rows, mechanism.clipping_norm)
    return np.asarray(units.mean(axis=0))


def _task(
    sigma: float, setting: Setting, epsilon: float, figures: tuple[Figure, ...], size: int
) -> AttackResult:
    return AttackResult(
        attack=TASK,
        adversary="server, or whoever sees a profile",
        sees="one release, and public examples of the candidate tasks",
        statistic="largest cosine with the tasks' mean profiles",
        release=f"{size} examples, " + (f"σ = {sigma:.3g}" if sigma else "no noise"),
        setting=setting,
        epsilon=epsilon,
        delta=DELTA,
        figures=figures,
        by_design=True,
        note="the task is what a profile is released for; ε protects single examples, not the task",
    )
