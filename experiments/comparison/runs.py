"""Several runs side by side: methods × scenarios, with intervals over seeds and ε beside every accuracy."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from fedmosaic.client.model.examples import read_examples
from fedmosaic.experiments.scenario.metrics import (
    Interval,
    Pair,
    Summary,
    area_under_curve,
    interval,
    mean_summary,
    summarise_client,
)
from fedmosaic.experiments.scenario.participants import read_evaluations
from fedmosaic.experiments.scenario.scoring import majority_accuracy
from fedmosaic.privacy.configuration import parse_json
from fedmosaic.protos.errors import ConfigurationError

FIGURES: Final = ("Self A_last", "Self A_AUC", "Others A_last", "Others A_AUC")
REFERENCE: Final = "local"
"""The method that all others are compared with seed by seed: what a client has without a federation."""
READERS: Final = {"server": "server_honest_but_curious", "recipients": "recipient"}
"""Who reads, and the adversary's name in a privacy statement."""


@dataclass(frozen=True)
class Run:
    """One run, as far as a comparison needs it.

    Attributes:
        directory: where it was read.
        scenario: its name and its stream.
        method: with the words that tell it from others of the same method.
        seed: of the run.
        summary: means over the clients.
        clients: of each client.
        curve: Self and Others by scored round, means over the clients.
        epsilon: by reader, the largest over the clients; None where only cryptography protects.
        sent: mean bytes that a client sent in a round.
        seconds: of the whole run.
        training_flops: floating point operations of all clients' own training steps; None where a client's
            were not measured.
        protection: of the adapter, as in a roster; empty for methods without a server of FedMosaic.
        profile_epsilon: of the profile alone, towards the server, the largest over the clients.
        majority: Self of whoever always gives a task's most frequent answer; None where answers are written.
        relevance: how the last round's similarities tell clients of one group from others (area under the
            ROC curve); None without groups or without similarities.
    """

    directory: Path
    scenario: str
    method: str
    seed: int
    summary: Summary
    clients: Mapping[str, Summary]
    curve: Mapping[int, Pair]
    epsilon: Mapping[str, float | None]
    sent: float
    seconds: float
    training_flops: float | None = None
    protection: str = ""
    profile_epsilon: float | None = None
    majority: float | None = None
    relevance: float | None = None


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only."""

    scenario: str
    method: str
    runs: tuple[Run, ...]

    def figures(self) -> tuple[Interval | None, ...]:
        """The four figures in the order of `FIGURES`; None where a run lacks one."""
        columns = zip(*(_figures(run) for run in self.runs), strict=True)
        return tuple(
            interval([v for v in values if v is not None]) if None not in values else None
            for values in columns
        )

    def gains(self, reference: "Group") -> tuple[Interval | None, ...]:
        """What this group has over another one, seed by seed: the mean difference and its interval.

        Pairing takes the luck of a seed, which both had, out of the comparison.

        Args:
            reference: another group of the same scenario, or of the same scenarios.

        Returns:
            In the order of `FIGURES`, over the scenarios and seeds that both have; None where a run lacks the
            figure or there is no such seed.
        """
        others = {(run.scenario, run.seed): _figures(run) for run in reference.runs}
        keys = [(run.scenario, run.seed) for run in self.runs]
        pairs = [
            (_figures(run), others[key]) for run, key in zip(self.runs, keys, strict=True) if key in others
        ]
        return tuple(
            _difference([(mine[place], theirs[place]) for mine, theirs in pairs]) for place in range(4)
        )

    def epsilon(self, reader: str) -> float | None:
        """The largest over the runs; None where only cryptography protects in all of them."""
        known = [value for run in self.runs if (value := run.epsilon[reader]) is not None]
        return max(known) if known else None


def _figures(run: Run) -> tuple[float | None, ...]:
    last, area = run.summary.last, run.summary.auc
    return (last.own, area.own, last.others, area.others)


def _difference(pairs: Sequence[tuple[float | None, float | None]]) -> Interval | None:
    values = [a - b for a, b in pairs if a is not None and b is not None]
    return interval(values) if values and len(values) == len(pairs) else None


def compared_run(directory: Path) -> Run:
    """Read one run of one process.

    Raises:
        ConfigurationError: there is no finished run with scores by round.
    """
    scenario = read_object(directory / "scenario.json")
    clients: dict[str, Summary] = {}
    rounds: dict[int, list[Pair]] = {}
    results = []
    for client in scenario["clients"]:
        name = client["id"]
        state = directory / "federation" / "clients" / name / "state"
        scored = {
            number: {_label(label): score for label, score in scores.items()}
            for number, scores in read_evaluations(state).items()
        }
        if not (state / "result.json").exists() or not scored:
            raise ConfigurationError(
                f"{directory}: client {name} has no scores by round; compare finished runs of one process "
                "(`fedmosaic run` without --processes)"
            )
        clients[name] = summarise_client(name, scored)
        for number in scored:
            rounds.setdefault(number, []).append(summarise_client(name, {1: scored[number]}).last)
        results.append((state, read_object(state / "result.json")))
    sent = [sum(channel["sent"] for channel in result["traffic"].values()) for _, result in results]
    return Run(
        directory=directory,
        scenario=f"{scenario['name']}, {scenario['stream']}",
        method=f"{scenario['method']} {scenario['variant']}".strip(),
        seed=int(scenario["seed"]),
        summary=mean_summary(list(clients.values())),
        clients=clients,
        curve={number: _mean(pairs) for number, pairs in sorted(rounds.items())},
        epsilon={reader: _epsilon(reader, results) for reader in READERS},
        sent=fmean(sent) / scenario["schedule"]["rounds"],
        seconds=float(read_object(directory / "run.json").get("seconds", 0.0)),
        training_flops=_training_flops(results),
        majority=mean_majority(majorities(scenario)),
        **_exchange(directory, scenario, results),
    )


def majorities(scenario: Mapping[str, Any]) -> dict[str, float | None]:
    """By client, the mean over its tasks of what always giving the task's most frequent answer scores.

    Args:
        scenario: content of a run's `scenario.json`, whose test files may have gone since.

    Returns:
        None for a client whose answers are written, or whose files are not there.
    """
    limit = scenario.get("evaluation_examples") or None
    return {client["id"]: _majority(client, limit) for client in scenario.get("clients", [])}


def _majority(client: Mapping[str, Any], limit: int | None) -> float | None:
    files = [Path(task["test"]) for task in (client.get("tasks") or [client])]
    try:
        found = [majority_accuracy(read_examples(file)[:limit]) for file in files]
    except ConfigurationError:
        return None
    known = [value for value in found if value is not None]
    return fmean(known) if known and len(known) == len(found) else None


def mean_majority(of_clients: Mapping[str, float | None]) -> float | None:
    """Mean over the clients; None where one has none."""
    known = [value for value in of_clients.values() if value is not None]
    return fmean(known) if known and len(known) == len(of_clients) else None


def _training_flops(results: Sequence[tuple[Path, Mapping[str, Any]]]) -> float | None:
    measured = [result.get("training_flops") for _, result in results]
    return None if None in measured else math.fsum(float(value) for value in measured if value is not None)


def _exchange(
    directory: Path, scenario: Mapping[str, Any], results: Sequence[tuple[Path, Mapping[str, Any]]]
) -> dict[str, Any]:
    """What only a run with FedMosaic's own server has."""
    server = directory / "federation" / "server" / "state" / "run.json"
    if not server.exists():
        return {}
    groups = {client["id"]: client.get("group", "") for client in scenario["clients"]}
    last = read_object(server)["results"][-1]
    return {
        "protection": scenario["adapter"]["protection"],
        "profile_epsilon": _epsilon("server", results, "profile"),
        "relevance": relevance_quality([groups[name] for name in last["clients"]], last["similarity"]),
    }


def relevance_quality(groups: Sequence[str], similarity: Sequence[Sequence[float | None]]) -> float | None:
    """Probability that a pair of one group is more similar than a pair of two, ties counted half.

    Args:
        groups: of every client; "" for a client of unknown group, whose pairs are left out.
        similarity: (N, N) symmetric; None where nothing is known, which counts as no similarity at all.

    Returns:
        Area under the ROC curve in [0, 1]; None without pairs of either kind.
    """
    pairs: dict[bool, list[float]] = {True: [], False: []}
    for i, one in enumerate(groups):
        for j, other in enumerate(groups[:i]):
            if one and other:
                value = similarity[i][j]
                pairs[one == other].append(0.0 if value is None else value)
    if not pairs[True] or not pairs[False]:
        return None
    return area_under_curve(pairs[True], pairs[False])


def _label(label: str) -> tuple[str, str]:
    owner, _, task = label.partition("/")
    return owner, task


def _mean(pairs: Sequence[Pair]) -> Pair:
    return mean_summary([Summary(pair, pair) for pair in pairs]).last


def _epsilon(
    reader: str, results: Sequence[tuple[Path, Mapping[str, Any]]], channel: str = "joint"
) -> float | None:
    values: list[float] = []
    for state, result in results:
        if "epsilon" in result:
            values.append(float(result["epsilon"]))
            continue
        for client in read_object(state / "statement.json")["clients"]:
            for guarantee in client["guarantees"]:
                if guarantee["channel"] == channel and guarantee["adversary"] == READERS[reader]:
                    epsilon = guarantee["epsilon"]
                    values += [] if epsilon is None else [math.inf if epsilon == "infinity" else epsilon]
    return max(values) if values else None


def read_object(path: Path, remedy: str = "give directories of finished runs") -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: the file.
        remedy: what to do where it cannot be read.

    Raises:
        ConfigurationError: it is missing, damaged or no object.
    """
    try:
        content = parse_json(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read ({error}); {remedy}") from None
    return content


def group_runs(runs: Sequence[Run]) -> tuple[Group, ...]:
    """Put runs of one scenario and method together, in the order in which they were given.

    Raises:
        ConfigurationError: two runs of a group have the same seed: their mean would count one draw twice.
    """
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
