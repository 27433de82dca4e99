"""Several runs side by side: methods × scenarios, with intervals over seeds and ε beside every accuracy."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Final

from fedmosaic.experiments.comparison.record import RunRecord, read_object, read_run
from fedmosaic.experiments.scenario import metrics
from fedmosaic.experiments.scenario.participants import read_evaluations
from fedmosaic.protos.errors import ConfigurationError

FIGURES: Final = ("Self A_last", "Self A_AUC", "Others A_last", "Others A_AUC")
REFERENCE: Final = "local"
"""The method that all others are compared with seed by seed: what a client has without a federation."""
READERS: Final = {"server": "server_honest_but_curious", "recipients": "recipient"}
"""Who reads, and the adversary's name in a privacy statement."""


@dataclass(frozen=True)
class Run:
    """One run, as far as a comparison needs it; NaN is what is not known.

    Attributes:
        curve: Self and Others by scored round, means over the clients; round 0 is before any training.
        epsilon: by reader, the largest over the clients; None where only cryptography protects.
        sent: mean bytes that a client sent in a round.
        training_flops: of all clients' own training steps.
        protection: of the adapter, as in a roster; empty for methods without a server of FedMosaic.
        majority: Self of whoever always gives a task's most frequent answer.
        relevance: AUC of the last round's similarities for clients of one group.
    """

    scenario: str
    method: str
    seed: int
    curve: Mapping[int, metrics.Pair]
    epsilon: Mapping[str, float | None]
    sent: float
    seconds: float
    training_flops: float = math.nan
    protection: str = ""
    majority: float = math.nan
    relevance: float = math.nan

    @property
    def figures(self) -> tuple[float, ...]:
        """In the order of `FIGURES`; NaN where nothing of the kind was scored."""
        scored = {number: pair for number, pair in self.curve.items() if number > 0}
        last, area = scored[max(scored)], metrics.mean_pair(scored.values())
        return (last.own, area.own, last.others, area.others)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only."""

    scenario: str
    method: str
    runs: tuple[Run, ...]

    def figures(self) -> tuple[metrics.Interval | None, ...]:
        """The four figures in the order of `FIGURES`; None where a run lacks one."""
        return tuple(map(metrics.interval, zip(*(run.figures for run in self.runs), strict=True)))

    def gains(self, reference: "Group") -> tuple[metrics.Interval | None, ...]:
        """What this group has over another one in each of `FIGURES`: the mean difference and its interval.

        Pairing by scenario and seed takes the luck of a seed, which both had, out of the comparison. None
        where a run lacks the figure or no seed is in both.
        """
        others = {(run.scenario, run.seed): run.figures for run in reference.runs}
        differences = [
            [a - b for a, b in zip(run.figures, others[run.scenario, run.seed], strict=True)]
            for run in self.runs
            if (run.scenario, run.seed) in others
        ]
        return tuple(metrics.interval([row[place] for row in differences]) for place in range(len(FIGURES)))

    def epsilon(self, reader: str) -> float | None:
        """The largest over the runs; None where only cryptography protects in all of them."""
        known = [value for run in self.runs if (value := run.epsilon[reader]) is not None]
        return max(known) if known else None


def compared_run(directory: Path) -> Run:
    """Read one run of one process; `ConfigurationError` if there is no finished run with scores by round."""
    record, scenario = read_run(directory), read_object(directory / "scenario.json")
    rounds: dict[int, list[metrics.Pair]] = {}
    for name, result in record.clients.items():
        evaluations = read_evaluations(directory / "federation/clients" / name / "state")
        if not result or max(evaluations, default=0) < 1:
            raise ConfigurationError(
                f"{directory}: client {name} has no scores by round; compare finished runs of one process "
                "(`fedmosaic run` without --processes)"
            )
        for number, scores in evaluations.items():
            rounds.setdefault(number, []).append(metrics.client_scores(name, scores))
    results, last = record.clients.values(), (record.server.get("results") or [None])[-1]
    groups = {client["id"]: client.get("group", "") for client in scenario["clients"]}
    return Run(
        scenario=f"{scenario['name']}, {scenario['stream']}",
        method=f"{scenario['method']} {scenario['variant']}".strip(),
        seed=int(scenario["seed"]),
        curve={number: metrics.mean_pair(pairs) for number, pairs in sorted(rounds.items())},
        epsilon={reader: _epsilon(reader, record) for reader in READERS},
        sent=fmean(sum(c["sent"] for c in result["traffic"].values()) for result in results)
        / scenario["schedule"]["rounds"],
        seconds=float(read_object(directory / "run.json").get("seconds", 0.0)),
        training_flops=math.fsum(result.get("training_flops", math.nan) for result in results),
        protection=scenario["adapter"]["protection"] if last else "",
        majority=fmean(record.majority.values()),
        relevance=relevance_quality([groups[name] for name in last["clients"]], last["similarity"])
        if last
        else math.nan,
    )


def relevance_quality(groups: Sequence[str], similarity: Sequence[Sequence[float | None]]) -> float:
    """Probability that a pair of one group is more similar than a pair of two, ties counted half.

    Pairs of a client of unknown group ("") are left out; None, where nothing is known, counts as 0. NaN
    without pairs of either kind.
    """
    pairs: dict[bool, list[float]] = {True: [], False: []}
    for i, one in enumerate(groups):
        for j, other in enumerate(groups[:i]):
            if one and other:
                pairs[one == other].append(similarity[i][j] or 0.0)
    return metrics.area_under_curve(pairs[True], pairs[False]) if pairs[True] and pairs[False] else math.nan


def _epsilon(reader: str, record: RunRecord) -> float | None:
    values: list[float] = []
    for name, result in record.clients.items():
        if "epsilon" in result:
            values.append(float(result["epsilon"]))
            continue
        if name not in record.statements:
            raise ConfigurationError(
                f"{record.directory}: client {name} has no privacy statement; compare others"
            )
        for client in record.statements[name]["clients"]:
            for guarantee in client["guarantees"]:
                joint = (guarantee["channel"], guarantee["adversary"]) == ("joint", READERS[reader])
                values += [float(guarantee["epsilon"])] if joint and guarantee["epsilon"] is not None else []
    return max(values, default=None)


def group_runs(runs: Sequence[Run]) -> tuple[Group, ...]:
    """Put runs of one scenario and method together; `ConfigurationError` if two have one seed."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.scenario, run.method), []).append(run)
    for (scenario, method), members in groups.items():
        seeds = [run.seed for run in members]
        if len(set(seeds)) != len(seeds):
            raise ConfigurationError(
                f"{method} on {scenario} was given twice with one seed (seeds {seeds}); leave one out"
            )
    return tuple(Group(scenario, method, tuple(members)) for (scenario, method), members in groups.items())
