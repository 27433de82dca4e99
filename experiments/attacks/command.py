"""`fedmosaic attack RUN_OR_SCENARIO_OR_STATE`: the strongest practical attacks on what a federation releases.

Ends with status 1 if a figure is above its bound or something that must be refused was not: then either the
attack or the guarantee is wrong, and both need a look.
"""

import datetime as dt
import os
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, get_args

import torch
import tyro
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from fedmosaic.experiments.attacks import parts as attack_parts
from fedmosaic.experiments.attacks import report as attack_report
from fedmosaic.experiments.attacks.refusals.keys import key_refusals
from fedmosaic.experiments.attacks.refusals.messages import refusals
from fedmosaic.experiments.attacks.state import is_state, open_state
from fedmosaic.experiments.attacks.statistics.results import AttackReport, AttackResult, RefusalResult
from fedmosaic.experiments.attacks.target import read_target
from fedmosaic.protos.errors import ConfigurationError

Part = Literal[
    "profile",
    "tasks",
    "audit",
    "federation",
    "malicious",
    "sums",
    "text",
    "adapter",
    "inversion",
    "received",
]
PARTS: Final[tuple[Part, ...]] = get_args(Part)
Found = Iterable[AttackResult | RefusalResult]
Runner = Callable[[list[str]], Found]
"""Carries out one part; adds to a list what it had to leave out, with the reason."""


@dataclass(frozen=True)
class Arguments:
    """Attack the releases of a run or scenario and report what an attacker gets.

    Writes attacks.json, attacks.md and attacks-roc.svg; `fedmosaic report RUN` shows them too. Noise of the
    product comes from the secure generator, so that figures differ a little from run to run.
    """

    target: tyro.conf.Positional[Path]
    """Directory of a run (`fedmosaic run`, `fedmosaic demo`), a scenario file, or the state directory of a
    client or server, of which only what it holds can be attacked."""
    output_dir: Path | None = None
    """Where to write; RUN/attacks by default, and attacks-NAME beside you for a scenario or a state."""
    parts: tuple[Part, ...] = PARTS
    """Which attacks to carry out."""
    client: str = ""
    """Whose data is attacked; by default the client with the longest texts."""
    probes: tuple[Path, ...] = ()
    """Further models, with which the profile attacks are repeated as if they were the federation's probe."""
    sizes: tyro.conf.OmitArgPrefixes[attack_parts.Sizes] = field(default_factory=attack_parts.Sizes)
    """How large the attacks are."""


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic attack` with its arguments."""
    parsed = tyro.cli(Arguments, args=list(arguments), prog="fedmosaic attack", description=__doc__)
    torch.set_num_threads(1)
    disable_progress_bar()
    if not parsed.parts:
        raise ConfigurationError(f"--parts names no part; choose from {', '.join(PARTS)}")
    console, started, began = Console(), time.monotonic(), time.process_time()
    name, place, runners = _opened(parsed, console)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0
    graphics = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    found: list[AttackResult | RefusalResult] = []
    skipped: list[str] = []
    for part in parsed.parts:
        since, worked = time.monotonic(), time.process_time()
        try:
            found += runners[part](skipped)
        except ConfigurationError as error:
            skipped.append(f"{part}: {error}")
        report = AttackReport(
            run=name,
            created=dt.datetime.now(dt.UTC).isoformat(timespec="minutes"),
            seconds=time.monotonic() - started,
            processor_seconds=time.process_time() - began,
            command="fedmosaic attack " + shlex.join(arguments),
            machine=f"{os.cpu_count()} CPU cores, {memory:.0f} GiB, {graphics}",
            results=tuple(each for each in found if isinstance(each, AttackResult)),
            refusals=tuple(each for each in found if isinstance(each, RefusalResult)),
            skipped=tuple(skipped),
        )
        # Written after every part, so that a command that is stopped leaves what it had.
        attack_report.write(report, place)
        console.print(
            f"{part}: {time.monotonic() - since:.0f} s, {time.process_time() - worked:.0f} s of one core"
        )
    console.print(attack_report.render(report))
    console.print(f"written to {place}")
    return 1 if report.alarms else 0


def _opened(parsed: Arguments, console: Console) -> tuple[str, Path, Mapping[Part, Runner]]:
    """Name of the target, where to write, and what can be carried out."""
    malicious: dict[Part, Runner] = {"malicious": lambda _: [*key_refusals(), *refusals()]}
    if is_state(parsed.target):
        if parsed.client or parsed.probes:
            raise ConfigurationError(
                f"{parsed.target} is a state directory, which holds no texts and no models; leave --client "
                "and --probes out, or give a run or a scenario"
            )
        state = open_state(parsed.target, parsed.sizes.seed)

        def cannot(_: list[str]) -> Found:
            raise ConfigurationError(state.why_not)

        left_out: dict[Part, Runner] = dict.fromkeys(PARTS, cannot)
        console.print(f"attacking what {parsed.target} holds")
        place = parsed.output_dir or Path(f"attacks-{state.name}")
        return state.name, place, {**left_out, **malicious, "federation": state.attack}
    target = read_target(parsed.target)
    victim = attack_parts.choose_victim(target, parsed.client)
    console.print(f"attacking {victim.client_id} ({victim.task}) of {target.name}")
    subject = attack_parts.Subject(target, victim, parsed.sizes, parsed.probes)
    place = target.directory / "attacks" if target.directory else Path(f"attacks-{target.name}")
    runners: dict[Part, Runner] = {part: getattr(subject, part) for part in PARTS if part not in malicious}
    return target.name, parsed.output_dir or place, {**runners, **malicious}
