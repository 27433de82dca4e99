"""What the benchmarks share: how work is timed, a process of its own, random examples, a table of ratios."""

import random
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from fedmosaic.client.model.examples import IGNORED, EncodedExample
from fedmosaic.experiments.scenario import children
from fedmosaic.experiments.scenario.metrics import markdown_table
from fedmosaic.privacy.terminal import ending_children

T = TypeVar("T")
Step = Callable[[], object]
Summary = dict[str, float]
"""Medians of seconds, and median and quartiles of the ratio to the first variant, for both clocks."""


@dataclass(frozen=True)
class Timing:
    """Seconds of processor time of the fastest and of the median repetition."""

    least: float
    median: float

    def scaled(self, factor: float) -> "Timing":
        """Extrapolate to `factor` times the work."""
        return Timing(self.least * factor, self.median * factor)


def measure(operation: Step, repetitions: int = 3, budget: float = 0.0) -> Timing:
    """Time an operation by the processor's clock, which other work on the machine does not add to.

    Args:
        operation: run once before, uncounted.
        repetitions: least number that is counted.
        budget: wall-clock seconds to go on for, up to 200 repetitions.
    """
    operation()
    seconds: list[float] = []
    started = time.perf_counter()
    while len(seconds) < repetitions or (len(seconds) < 200 and time.perf_counter() - started < budget):
        begun = time.process_time()
        operation()
        seconds.append(time.process_time() - begun)
    return Timing(min(seconds), statistics.median(seconds))


@ending_children()
def in_own_process(work: Callable[..., T], *arguments: Any) -> T:
    """What a function of a module returns in a fresh process, whose peak of memory is its own."""
    return children.in_own_process("measures", work, *arguments)


def resident_mib(what: str, process: int | str = "self") -> float:
    """MiB of a process as Linux says it: `VmRSS` now, `VmHWM` at most, `RssAnon` without mapped files."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(what))


def peak_megabytes() -> float:
    """Resident memory of this process at its peak."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def paired(
    variants: Mapping[str, Callable[[], AbstractContextManager[Step]]], repetitions: int, untimed: int = 1
) -> dict[str, Summary]:
    """Time a step of every variant; what setting it up and taking it down takes does not count.

    Every repetition takes one step of each, in a shuffled order, so that whatever slows the machine down
    slows all alike; ratios are taken within a repetition.

    Args:
        variants: by name; the ratios are to the first.
        repetitions: timed steps of each.
        untimed: steps of each before.
    """
    order, names = random.Random(0), list(variants)  # noqa: S311  # only the order of timings
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for repetition in range(repetitions + untimed):
        for name in order.sample(names, len(names)):
            with variants[name]() as step:
                wall, processor = time.perf_counter(), time.process_time()
                step()
                taken = (time.perf_counter() - wall, time.process_time() - processor)
            if repetition >= untimed:
                seconds[name].append(taken)
    return {name: _summary(seconds[name], seconds[names[0]]) for name in names}


def _summary(taken: Sequence[tuple[float, float]], first: Sequence[tuple[float, float]]) -> Summary:
    found = {}
    for index, clock in enumerate(("wall", "processor")):
        ratios = [one[index] / other[index] for one, other in zip(taken, first, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[f"{clock}_seconds"] = statistics.median(one[index] for one in taken)
        found |= {f"{clock}_ratio": middle, f"{clock}_ratio_low": low, f"{clock}_ratio_high": high}
    return found


def table(name: str, found: Mapping[str, Summary]) -> str:
    """One row per variant, with memory where it was measured."""
    rows = []
    for variant, row in found.items():
        spans = [
            f"{row[f'{clock}_ratio']:.3f} [{row[f'{clock}_ratio_low']:.3f}, {row[f'{clock}_ratio_high']:.3f}]"
            for clock in ("wall", "processor")
        ]
        peak = f"{row['peak_mib']:.0f}" if "peak_mib" in row else ""
        rows.append([variant, f"{1e3 * row['wall_seconds']:.1f}", *spans, peak])
    return "\n".join(markdown_table([name, "ms", "× wall", "× processor", "peak MiB"], rows))


def random_examples(vocabulary: int, count: int, tokens: int, answer: int) -> list[EncodedExample]:
    """Examples of random tokens, the last ones supervised; the arithmetic does not depend on which."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (count, tokens), generator=generator)
    labels = ids.clone()
    labels[:, : tokens - answer] = IGNORED
    return [EncodedExample(str(index), *pair) for index, pair in enumerate(zip(ids, labels, strict=True))]
