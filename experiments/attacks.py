"""`fedmosaic attack RUN_OR_SCENARIO`: the strongest practical attacks on what a federation releases.

Adds an attack section to the run's privacy report: every attack with its success, its interval and the bound
of the claimed ε, beside the same attack without a sanitiser and on the authors' sanitiser. Ends with status 1
if a figure is above its bound or something that must be refused was not: then either the attack or the
guarantee is wrong, and both need a look.
"""

import datetime as dt
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from fedmosaic.client.dp_training import PrivateTrainingSettings
from fedmosaic.experiments import (
    attack_adapter,
    attack_audit,
    attack_federation,
    attack_profile,
    attack_report,
    attack_text,
)
from fedmosaic.experiments.attack_claimed_row import claimed_row_result
from fedmosaic.experiments.attack_keys import key_refusals
from fedmosaic.experiments.attack_malicious import refusals
from fedmosaic.experiments.attack_received import received_results
from fedmosaic.experiments.attack_target import (
    Prober,
    Target,
    Victim,
    candidates,
    open_prober,
    read_target,
)
from fedmosaic.privacy.accounting import default_delta
from fedmosaic.privacy.attacks.results import AttackReport, AttackResult, RefusalResult, Setting
from fedmosaic.privacy.events import GaussianEvent
from fedmosaic.privacy.noise import SecureNoise
from fedmosaic.privacy.planning import noise_multiplier_for
from fedmosaic.protos.errors import ConfigurationError

Part = Literal["profile", "audit", "federation", "malicious", "text", "adapter", "received"]
PARTS: Final[tuple[Part, ...]] = (
    "profile", "audit", "federation", "malicious", "text", "adapter", "received"
)  # fmt: skip
_BROKEN_EXIT: Final = 1
_MEMBERS_PER_RELEASE: Final = 36
_REST_OF_DATA: Final = 60
_FULL_BATCH_STEPS: Final = 4
_LEAST_SIGMA: Final = 0.1
_LEAST_MEMBERS: Final = 5
_SIMULATED_ROUNDS: Final = 6
_TASK_EXAMPLES: Final = 100
_TEXT_TOKENS: Final = 10
_ADAPTER_POOL: Final = 80
_ADAPTER_RELEASES: Final = 120
_WORD_BATCH: Final = 8
_SCORED: Final = 60


@dataclass(frozen=True)
class Arguments:
    """Attack the releases of a run or scenario and report what an attacker gets.

    Writes attacks.json, attacks.md and attacks-roc.svg; `fedmosaic report RUN` shows them too. Noise of the
    product comes from the secure generator, so that figures differ a little from run to run.
    """

    target: tyro.conf.Positional[Path]
    """Directory of a run (`fedmosaic run`, `fedmosaic demo`), or a scenario file."""
    output_dir: Path | None = None
    """Where to write; RUN/attacks by default, and attacks-NAME beside you for a scenario."""
    parts: tuple[Part, ...] = PARTS
    """Which attacks to carry out."""
    client: str = ""
    """Whose data is attacked; by default the client with the longest texts."""
    pool: int = 160
    """Candidates of the membership attacks on the profile."""
    releases: int = 600
    """Simulated releases per setting of those attacks."""
    audited_releases: int = 2000
    """Repetitions of the profile release for the empirical ε."""
    canaries: int = 2000
    """Canaries of the one-run audit of DP-SGD."""
    texts: int = 4
    """Texts in the release of the text recovery."""
    threads: int = 1
    """Threads of the models."""
    seed: int = 0
    """Of everything random but the product's own noise."""


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic attack` with its arguments."""
    parsed = tyro.cli(Arguments, args=list(arguments), prog="fedmosaic attack", description=__doc__)
    torch.set_num_threads(parsed.threads)
    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    console = Console()
    target = read_target(parsed.target)
    report = attack(target, parsed, console, "fedmosaic attack " + shlex.join(arguments))
    place = parsed.output_dir or (
        target.directory / "attacks" if target.directory is not None else Path(f"attacks-{target.name}")
    )
    attack_report.write(report, place)
    console.print(attack_report.render(report))
    console.print(f"written to {place}")
    return _BROKEN_EXIT if report.alarms else 0


def attack(target: Target, arguments: Arguments, console: Console, command: str) -> AttackReport:
    """Carry out the chosen attacks.

    Args:
        target: what to attack.
        arguments: which attacks, and how large.
        console: where progress is shown.
        command: as it was given, for the report.
    """
    started = time.monotonic()
    victim = _victim(target, arguments.client)
    console.print(f"attacking {victim.client_id} ({victim.task}) of {target.name}")
    results: list[AttackResult] = []
    refused: list[RefusalResult] = []
    skipped: list[str] = []
    prober = (
        open_prober(target) if {"profile", "audit", "federation", "text"} & set(arguments.parts) else None
    )
    runners: dict[Part, Callable[[], Iterable[AttackResult]]] = {
        "profile": lambda: _profile(_needed(prober), victim, arguments),
        "audit": lambda: _audit(target, _needed(prober), victim, arguments),
        "federation": lambda: _federation(target, _needed(prober), arguments, skipped),
        "text": lambda: _text(_needed(prober), victim, arguments),
        "adapter": lambda: _adapter(target, victim, arguments),
        "received": lambda: received_results(target, victim, _SCORED),
    }
    for part in arguments.parts:
        since = time.monotonic()
        try:
            if part == "malicious":
                refused += [*key_refusals(), *refusals()]
            else:
                results += runners[part]()
        except ConfigurationError as error:
            skipped.append(f"{part}: {error}")
        console.print(f"{part}: {time.monotonic() - since:.0f} s")
    return AttackReport(
        run=target.name,
        created=dt.datetime.now(dt.UTC).isoformat(timespec="minutes"),
        seconds=time.monotonic() - started,
        command=command,
        machine=_machine(),
        results=tuple(results),
        refusals=tuple(refused),
        skipped=tuple(skipped),
    )


def _victim(target: Target, name: str) -> Victim:
    found = {victim.client_id: victim for victim in target.victims}
    if name and name not in found:
        raise ConfigurationError(f"there is no client {name!r}; choose from {', '.join(sorted(found))}")
    return found[name] if name else max(target.victims, key=lambda v: sum(len(e.prompt) for e in v.train))


def _needed(prober: Prober | None) -> Prober:
    if prober is None:
        raise ConfigurationError("this attack needs the probe model")
    return prober


def _profile(prober: Prober, victim: Victim, arguments: Arguments) -> Iterator[AttackResult]:
    pool, _ = candidates(victim, arguments.pool, arguments.seed)
    yield from attack_profile.membership_results(
        prober.factors(pool),
        prober.public_map,
        SecureNoise(),
        releases=arguments.releases,
        rate=min(0.5, _MEMBERS_PER_RELEASE / len(pool)),
        seed=arguments.seed,
    )
    mechanism = prober.public_map.mechanism
    released = victim.released_profile(mechanism.dimensions)
    if released is not None:
        known = {example.prompt for example in victim.train}
        everybody = [*victim.train, *(example for example in victim.test if example.prompt not in known)]
        rows = prober.public_map.rows(prober.factors(everybody))
        members = np.arange(len(everybody)) < len(victim.train)
        if members.all():
            raise ConfigurationError(f"{victim.client_id} has no text that it does not train on")
        yield attack_profile.own_release_result(released, rows, members, mechanism)


def _audit(target: Target, prober: Prober, victim: Victim, arguments: Arguments) -> Iterator[AttackResult]:
    others = prober.factors(victim.train[:_REST_OF_DATA])
    count = arguments.audited_releases
    for epsilon in attack_profile.EPSILONS:
        other_noise = prober.with_noise(attack_profile.noise_multiplier(epsilon))
        yield attack_profile.audit_result(
            other_noise, others, SecureNoise(), releases=count, setting="variant"
        )
    yield attack_profile.audit_result(prober.public_map, others, SecureNoise(), releases=count)
    coins = np.random.default_rng(arguments.seed)
    for words, settings, setting in _dp_settings(target, len(victim.train)):
        run = attack_audit.one_run(arguments.canaries, settings, SecureNoise(), coins)
        yield attack_audit.audit_result(run, setting=setting, words=words)


def _dp_settings(target: Target, examples: int) -> Iterator[tuple[str, PrivateTrainingSettings, Setting]]:
    """DP-SGD as this federation plans it, and a full-batch one, whose audit is far tighter."""
    scenario, privacy = target.scenario, target.scenario.adapter_privacy
    rate = min(1.0, privacy.expected_batch_size / examples)
    profile = GaussianEvent(max(_LEAST_SIGMA, scenario.profile.noise_multiplier), 1.0, 1)
    planned = noise_multiplier_for(
        privacy.target_epsilon, default_delta(examples), [profile], rate, _steps(target)
    )
    as_planned = PrivateTrainingSettings(
        optimizer="sgd",
        physical_batch_size=512,
        steps=_steps(target),
        sampling_rate=rate,
        expected_batch_size=privacy.expected_batch_size,
        max_grad_norm=privacy.clipping_norm,
        noise_multiplier=planned,
    )
    yield (
        f"planned for ε = {privacy.target_epsilon:g} at this client's own δ: σ = {planned:.3g}, "
        f"q = {rate:.3g}, {_steps(target)} steps",
        as_planned,
        "product" if scenario.adapter.private else "variant",
    )
    sigma = math.sqrt(_FULL_BATCH_STEPS) * attack_profile.noise_multiplier(3.0)
    full = {"steps": _FULL_BATCH_STEPS, "sampling_rate": 1.0, "noise_multiplier": sigma}
    words = f"all examples in every step: σ = {sigma:.3g}, {_FULL_BATCH_STEPS} steps"
    yield words, as_planned.model_copy(update=full), "variant"


def _steps(target: Target) -> int:
    return target.scenario.adapter_privacy.steps_per_round * target.scenario.schedule.rounds


def _federation(
    target: Target, prober: Prober, arguments: Arguments, skipped: list[str]
) -> list[AttackResult]:
    scenario, seed = target.scenario, arguments.seed
    names = sorted(victim.client_id for victim in target.victims)
    examples = min(len(victim.train) for victim in target.victims)
    rate = min(1.0, scenario.adapter_privacy.expected_batch_size / examples)
    noise = attack_federation.dp_noise_ratio(
        1.0, rate, _steps(target), examples, scenario.adapter.shared_dimensions
    )
    weights = attack_federation.weights_of_run(target.server_run, names)
    source = "this run's own rows"
    if not weights:
        source = "rows that the real planning makes of random profiles"
        weights = attack_federation.simulated_weights(
            max(_LEAST_MEMBERS, len(names)), _SIMULATED_ROUNDS, scenario.relevance, scenario.policy, seed
        )
    results = attack_federation.collusion_results(
        weights, scenario.policy, source=source, dp_noise=noise, seed=seed
    )
    results.append(claimed_row_result(scenario.policy, seed))
    results += _spoofing(target, prober, skipped)
    return results + _tasks(target, prober, arguments, skipped)


def _spoofing(target: Target, prober: Prober, skipped: list[str]) -> list[AttackResult]:
    mechanism, scenario = prober.public_map.mechanism, target.scenario
    found = {victim.client_id: victim.released_profile(mechanism.dimensions) for victim in target.victims}
    profiles = {name: vector for name, vector in found.items() if vector is not None}
    if len(profiles) <= scenario.policy.minimum_contributors:
        skipped.append("relevance spoofing needs the released profiles of a finished run")
        return []
    tasks = {victim.client_id: victim.task for victim in target.victims}
    return attack_federation.spoofing_results(
        profiles, tasks, mechanism, scenario.relevance, scenario.policy, scenario.encryption.clip
    )


def _tasks(target: Target, prober: Prober, arguments: Arguments, skipped: list[str]) -> list[AttackResult]:
    """One client per task; its test examples stand for what the attacker knows of the task."""
    by_task: dict[str, Victim] = {}
    for victim in target.victims:
        by_task.setdefault(victim.task, victim)
    if len(by_task) < 2:
        skipped.append("task inference needs at least two tasks")
        return []
    own, reference = {}, {}
    for task, victim in by_task.items():
        own[task] = prober.public_map.rows(prober.factors(victim.train[: 2 * _TASK_EXAMPLES]))
        reference[task] = prober.public_map.rows(prober.factors(victim.test[:_TASK_EXAMPLES]))
    return attack_federation.task_results(
        own,
        reference,
        prober.public_map.mechanism,
        SecureNoise(),
        size=_TASK_EXAMPLES,
        releases=200,
        seed=arguments.seed,
    )


def _text(prober: Prober, victim: Victim, arguments: Arguments) -> list[AttackResult]:
    texts = attack_text.continuations(victim.train, prober.tokenizer, arguments.texts, _TEXT_TOKENS)
    if not texts:
        raise ConfigurationError(f"the texts of {victim.client_id} are too short to be recovered")
    return attack_text.text_results(
        prober.probe, texts, prober.public_map, prober.basis, SecureNoise(), arguments.seed
    )


def _adapter(target: Target, victim: Victim, arguments: Arguments) -> list[AttackResult]:
    generator = np.random.default_rng(arguments.seed)
    pool, _ = candidates(victim, _ADAPTER_POOL, arguments.seed)
    foreign = [e for v in target.victims if v.client_id != victim.client_id for e in v.train]
    others = [foreign[index] for index in generator.permutation(len(foreign))[: 2 * _ADAPTER_POOL]]
    known = {example.prompt for example in victim.train}
    kin = [e for v in target.victims if v.task == victim.task for e in v.test if e.prompt not in known]
    rows = attack_adapter.adapter_rows(
        victim.model,
        target.adapter,
        [pool, others or pool, kin[: 2 * _ADAPTER_POOL] or pool, list(victim.train[:_ADAPTER_POOL])],
        target.scenario.profile.max_length,
    )
    results = attack_adapter.membership_results(
        rows[0],
        rows[1],
        SecureNoise(),
        releases=_ADAPTER_RELEASES,
        rate=0.3,
        epsilons=attack_profile.EPSILONS,
        seed=arguments.seed,
    )
    return results + attack_adapter.word_results(
        rows[2], rows[3], SecureNoise(), size=_WORD_BATCH, updates=40, seed=arguments.seed
    )


def _machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0
    graphics = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} CPU cores, {memory:.0f} GiB, {graphics}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
