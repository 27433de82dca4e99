"""`fedmosaic attack RUN_OR_SCENARIO`: the strongest practical attacks on what a federation releases.

Adds an attack section to the run's privacy report: every attack with its success, its interval and the bound
of the claimed ε, beside the same attack without a sanitiser and on the authors' sanitiser. Ends with status 1
if a figure is above its bound or something that must be refused was not: then either the attack or the
guarantee is wrong, and both need a look.
"""

import datetime as dt
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, get_args

import torch
import tyro
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from fedmosaic.experiments.attacks import parts as attack_parts
from fedmosaic.experiments.attacks import report as attack_report
from fedmosaic.experiments.attacks.received import received_results
from fedmosaic.experiments.attacks.refusals.keys import key_refusals
from fedmosaic.experiments.attacks.refusals.messages import refusals
from fedmosaic.experiments.attacks.statistics.results import AttackReport, AttackResult, RefusalResult
from fedmosaic.experiments.attacks.target import Target, open_prober, read_target
from fedmosaic.protos.errors import ConfigurationError

Part = Literal[
    "profile", "tasks", "audit", "federation", "malicious",
    "text", "adapter", "inversion", "received", "shadow",
]  # fmt: skip
PARTS: Final[tuple[Part, ...]] = get_args(Part)
_NEED_THE_PROBE: Final = frozenset({"profile", "tasks", "audit", "federation", "text"})
_BROKEN_EXIT: Final = 1
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
    merge: bool = False
    """Put what is found in place of the same attacks in the report that is there, and keep the others."""
    client: str = ""
    """Whose data is attacked; by default the client with the longest texts."""
    probes: tuple[Path, ...] = ()
    """Further models, with which the profile attacks are repeated as if they were the federation's probe."""
    shadow_model: Path | None = None
    """Small model for the shadow runs; without it they are left out."""
    sizes: tyro.conf.OmitArgPrefixes[attack_parts.Sizes] = field(default_factory=attack_parts.Sizes)
    """How large the attacks are."""
    threads: int = 1
    """Threads of the models."""


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic attack` with its arguments."""
    parsed = tyro.cli(Arguments, args=list(arguments), prog="fedmosaic attack", description=__doc__)
    torch.set_num_threads(parsed.threads)
    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    console = Console()
    target = read_target(parsed.target)
    place = parsed.output_dir or (
        target.directory / "attacks" if target.directory is not None else Path(f"attacks-{target.name}")
    )
    command = "fedmosaic attack " + shlex.join(arguments)
    earlier = attack_report.read(place) if parsed.merge else None
    if parsed.merge and earlier is None:
        raise ConfigurationError(f"{place} holds no report to merge with; leave --merge out the first time")

    def keep(found: AttackReport) -> None:
        attack_report.write(found if earlier is None else earlier.updated(found, parsed.parts), place)

    # What is found is written after every part, so that a command that is stopped leaves what it had.
    report = attack(target, parsed, console, command, keep)
    console.print(attack_report.render(report))
    console.print(f"written to {place}")
    return _BROKEN_EXIT if report.alarms else 0


def attack(
    target: Target,
    arguments: Arguments,
    console: Console,
    command: str,
    keep: Callable[[AttackReport], None] = lambda _: None,
) -> AttackReport:
    """Carry out the chosen attacks.

    Args:
        target: what to attack.
        arguments: which attacks, and how large.
        console: where progress is shown.
        command: as it was given, for the report.
        keep: told of the report after every part.
    """
    started, began = time.monotonic(), time.process_time()
    victim = attack_parts.choose_victim(target, arguments.client)
    console.print(f"attacking {victim.client_id} ({victim.task}) of {target.name}")
    results: list[AttackResult] = []
    refused: list[RefusalResult] = []
    skipped: list[str] = []
    sizes = arguments.sizes
    prober = open_prober(target) if _NEED_THE_PROBE & set(arguments.parts) else None
    needed = attack_parts.needed
    runners: dict[Part, Callable[[], Iterable[AttackResult]]] = {
        "profile": lambda: attack_parts.profile(needed(prober), victim, sizes),
        "tasks": lambda: attack_parts.every_profile(target, needed(prober), sizes, arguments.probes),
        "audit": lambda: attack_parts.audit(target, needed(prober), victim, sizes),
        "federation": lambda: attack_parts.federation(target, needed(prober), sizes, skipped),
        "text": lambda: attack_parts.text(needed(prober), victim, sizes),
        "adapter": lambda: attack_parts.adapter(target, victim, sizes),
        "inversion": lambda: attack_parts.inversion(target, victim, sizes),
        "received": lambda: received_results(target, victim, _SCORED),
        "shadow": lambda: attack_parts.shadow(target, victim, arguments.shadow_model, sizes),
    }

    def report() -> AttackReport:
        return AttackReport(
            run=target.name,
            created=dt.datetime.now(dt.UTC).isoformat(timespec="minutes"),
            seconds=time.monotonic() - started,
            processor_seconds=time.process_time() - began,
            command=command,
            machine=_machine(),
            results=tuple(results),
            refusals=tuple(refused),
            skipped=tuple(skipped),
        )

    for part in arguments.parts:
        since, worked = time.monotonic(), time.process_time()
        try:
            if part == "malicious":
                refused += [*key_refusals(), *refusals()]
            else:
                results += runners[part]()
        except ConfigurationError as error:
            skipped.append(f"{part}: {error}")
        keep(report())
        console.print(
            f"{part}: {time.monotonic() - since:.0f} s, {time.process_time() - worked:.0f} s of one core"
        )
    found = report()
    keep(found)
    return found


def _machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0
    graphics = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} CPU cores, {memory:.0f} GiB, {graphics}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
