"""What an accelerator gives: ratios of steps, memory, and a whole federation on it.

    python -m benchmarks.gpu --model FOLDER --out FOLDER [--sections versions memory ...]

Every section runs in a process of its own with a limit on its time, and writes FOLDER/SECTION.json as soon as
it has figures: one that fails or hangs costs its own figures and no others. A table is printed last.
Sections:

* ``versions``: packages, device, driver.
* ``memory``: a model of 1.2 billion random weights (the shape of Llama-3.2-1B) in bfloat16, NF4 and float32,
  with and without checkpointing: weights and peak of a step as measured, and as the preflight says.
* ``steps``: Co-LoRA's step against PEFT's LoRA, the private step against the plain one and against Opacus,
  the task profile against a forward pass. Ratios are medians of pairs within one run.
* ``demo``: the demo's federation, one server and five client processes that share the device. It takes
  packages from the cache ($FEDMOSAIC_CACHE) or from the package index.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import tyro

Section = Literal["versions", "memory", "steps", "demo"]
SECTIONS: tuple[Section, ...] = get_args(Section)
LIMITS: dict[Section, int] = {"versions": 60, "memory": 150, "steps": 150, "demo": 240}
"""Seconds after which a section is ended."""

Record = Callable[[str, object], None]
"""Writes one named figure of a section, at once."""


@dataclass(frozen=True)
class Arguments:
    """What to measure, and where."""

    out: Path
    """Folder for the figures."""
    model: Path | None = None
    """Folder of a pretrained model; steps need it."""
    work: Path = Path("runs/gpu")
    """Folder for the runs themselves."""
    sections: tuple[Section, ...] = SECTIONS
    device: str = "auto"
    repetitions: int = 30
    examples: int = 256
    """Of the profile."""
    tiny: bool = False
    """A small model in place of the large one."""
    section: Section | None = None
    """Run one section in this process; used by the command itself."""


def versions(arguments: Arguments, record: Record) -> None:
    """Packages, device and driver."""
    import platform
    from importlib.metadata import version

    import torch

    from fedmosaic.client.model.hardware import choose_device, choose_dtype

    device = choose_device(arguments.device)
    record("python", platform.python_version())
    for package in ("torch", "transformers", "peft", "opacus", "bitsandbytes"):
        try:
            record(package, version(package))
        except ModuleNotFoundError:
            record(package, "absent")
    record("device", torch.cuda.get_device_name(device) if device.type == "cuda" else str(device))
    record("auto_dtype", str(choose_dtype("auto", device)))
    record("tf32", [torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()])


def steps(arguments: Arguments, record: Record) -> None:
    """Ratios of steps on one pretrained model."""
    import warnings

    from benchmarks import colora_step, dp_step, profile_cost

    warnings.filterwarnings("ignore")
    folder, device = arguments.model, arguments.device
    for dtype in ("float32", "bfloat16"):
        for batch, length in ((8, 48), (16, 256)):
            found = colora_step.compare(
                folder, dtype, ["colora"], arguments.repetitions, device=device, batch=batch, length=length
            )
            record(f"colora {dtype} {batch}x{length}", found)
        model = dp_step.load(folder, dtype, 16, device)
        examples = dp_step.make_examples(model, 32, 64, 16)
        found = dp_step.measure_time(model, examples, max(5, arguments.repetitions // 3))
        record(f"dp {dtype} 32x64", found)
        settings = profile_cost.Settings(folder, dtype, device, arguments.examples, repeats=3)
        record(f"profile {dtype}", profile_cost.compare(settings))


def memory(arguments: Arguments, record: Record) -> None:
    """Memory and time of a step on a large model, and what the preflight says of it."""
    from benchmarks.gpu_memory import measure, write_random_model

    folder = arguments.work / "random-1b"
    write_random_model(folder, tiny=arguments.tiny)
    for dtype, quantization in (("bfloat16", None), ("bfloat16", "nf4"), ("float32", None)):
        for checkpoint in (False, True):
            name = f"{quantization or dtype}{' checkpointed' if checkpoint else ''}"
            try:
                record(name, measure(folder, dtype, quantization, checkpoint, arguments.device))
            except Exception as error:  # one setting that fails must not cost the others
                record(name, {"error": f"{type(error).__name__}: {error}"[:300]})


def demo(arguments: Arguments, record: Record) -> None:
    """The demo's federation, with processes."""
    started, place = time.monotonic(), arguments.work / "demo"
    command = [
        sys.executable, "-m", "fedmosaic.cli", "demo", "--rounds", "3", "--output-dir", str(place),
    ]  # fmt: skip
    with (arguments.out / "demo.log").open("wb") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)  # noqa: S603  # our own command
    record("seconds", time.monotonic() - started)
    found = sorted(place.glob("**/clients/*/state/result.json"))
    record("clients", {path.parents[1].name: json.loads(path.read_text()) for path in found})


RUNNERS = {"versions": versions, "memory": memory, "steps": steps, "demo": demo}


def run_section(name: Section, arguments: Arguments, words: Sequence[str]) -> str:
    """Run one section in a process group of its own; returns how it ended, in words."""
    command = [sys.executable, "-m", "benchmarks.gpu", *words, "--section", name]
    started = time.monotonic()
    log = arguments.out / f"{name}.err"
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stderr=errors, start_new_session=True)  # noqa: S603  # this module
        try:
            code = process.wait(LIMITS[name])
            end = "done" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            end = f"ended after {LIMITS[name]} s"
    tail = log.read_text(errors="replace").strip().splitlines()
    reason = f": {tail[-1][:200]}" if end != "done" and tail else ""
    return f"{end} ({time.monotonic() - started:.0f} s){reason}"


def recorder(path: Path) -> Record:
    """A writer of figures into one JSON file, complete after each of them."""
    figures: dict[str, object] = {}

    def record(name: str, value: object) -> None:
        figures[name] = value
        path.write_text(json.dumps(figures, indent=1, default=str) + "\n")

    return record


def tables(folder: Path) -> Iterator[str]:
    """The figures in short lines, times as Markdown."""
    from benchmarks.timing import table

    paths = {name: folder / f"{name}.json" for name in SECTIONS}
    found = {name: json.loads(path.read_text()) if path.exists() else {} for name, path in paths.items()}
    yield " ".join(f"{key} {value}" for key, value in found["versions"].items())
    for name, row in found["memory"].items():
        yield f"1B {name}: " + ", ".join(f"{key} {value}" for key, value in row.items())
    for name, row in found["steps"].items():
        yield f"\n{table(name, row)}"
    if found["demo"]:
        clients = found["demo"].get("clients", {})
        slowest = max((client.get("seconds", 0.0) for client in clients.values()), default=0.0)
        whole = found["demo"].get("seconds", 0.0)
        yield f"demo: {whole:.0f} s in all, {slowest:.0f} s of rounds, {len(clients)} clients finished"


def main(words: Sequence[str]) -> None:
    """Run the sections and print the tables."""
    arguments = tyro.cli(Arguments, args=list(words), description=__doc__)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.section:
        RUNNERS[arguments.section](arguments, recorder(arguments.out / f"{arguments.section}.json"))
        return
    for name in arguments.sections:
        lacking = name == "steps" and arguments.model is None
        print(
            f"{name}: {'left out: no --model' if lacking else run_section(name, arguments, words)}",
            flush=True,
        )
    print("\n".join(["", *tables(arguments.out)]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
