"""What an accelerator gives: privacy tests, ratios of steps, memory, and whole federations on it.

    python -m benchmarks.gpu --model FOLDER --out FOLDER [--sections versions tests ...]

Every section runs in a process of its own with a limit on its time, and writes FOLDER/SECTION.json as soon as
it has figures: one that fails or hangs costs its own figures and no others. A table is printed last.
Sections:

* ``versions``: packages, device, driver.
* ``tests``: the privacy tests on the accelerator (``pytest -m gpu``).
* ``memory``: a model of 1.2 billion random weights (the shape of Llama-3.2-1B) in bfloat16, NF4 and float32,
  with and without checkpointing: weights and peak of a step as measured, and as the preflight says.
* ``steps``: Co-LoRA's step against PEFT's LoRA, the private step against the plain one and against Opacus,
  the task profile against a forward pass. Ratios are medians of pairs within one run.
* ``demo``: the demo's federation, one server and five client processes that share the device.
* ``many``: 24 clients of one architecture in one process, CKKS, two rounds.

`demo` and `many` take packages from the cache ($FEDMOSAIC_CACHE) or from the package index.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LIMITS = {"versions": 60, "tests": 150, "memory": 150, "steps": 150, "demo": 240, "many": 240}
"""Seconds after which a section is ended."""

Record = Callable[[str, object], None]
"""Writes one named figure of a section, at once."""


def versions(_: argparse.Namespace, record: Record) -> None:
    """Packages, device and driver."""
    import platform
    from importlib.metadata import version

    import torch

    from fedmosaic.client.model.hardware import choose_device, choose_dtype

    device = choose_device("auto")
    record("python", platform.python_version())
    for package in ("torch", "transformers", "peft", "opacus", "bitsandbytes", "grpcio", "numpy"):
        try:
            record(package, version(package))
        except ModuleNotFoundError:
            record(package, "absent")
    record("device", torch.cuda.get_device_name(device) if device.type == "cuda" else str(device))
    record("auto_dtype", str(choose_dtype("auto", device)))
    record("tf32", [torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()])


def tests(arguments: argparse.Namespace, record: Record) -> None:
    """The privacy tests that need an accelerator; their output is kept beside the figures."""
    log = arguments.out / "tests.log"
    # Several workers share the device: a test waits for the processor more than for the accelerator.
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-n", "4", "tests/client"]
    started = time.monotonic()
    with log.open("wb") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode  # noqa: S603  # our own command
    lines = log.read_text(errors="replace").splitlines()
    record("exit", code)
    record("summary", lines[-1] if lines else "")
    record("failed", [line for line in lines if line.startswith(("FAILED", "ERROR"))])
    record("seconds", time.monotonic() - started)


def steps(arguments: argparse.Namespace, record: Record) -> None:
    """Ratios of steps on one pretrained model."""
    import warnings
    from dataclasses import asdict

    from benchmarks import colora_step, dp_step, profile_cost

    warnings.filterwarnings("ignore")
    for dtype in ("float32", "bfloat16"):
        for batch, length in ((8, 48), (16, 256)):
            timings = colora_step.compare(
                arguments.model, dtype, ["lora", "colora"], arguments.repetitions,
                device=arguments.device, batch=batch, length=length,
            )  # fmt: skip
            record(f"colora {dtype} {batch}x{length}", [asdict(timing) for timing in timings])
        model = dp_step.load(arguments.model, dtype, 16, arguments.device)
        batch_of_tokens = dp_step.make_batch(model, 32, 64, 16)
        record(
            f"dp {dtype} 32x64",
            dp_step.measure_time(model, batch_of_tokens, max(5, arguments.repetitions // 3)),
        )
        settings = profile_cost.Settings(
            model=arguments.model,
            dtype=dtype,
            device=arguments.device,
            examples=arguments.examples,
            repeats=3,
        )
        record(f"profile {dtype}", profile_cost.compare(settings))


def memory(arguments: argparse.Namespace, record: Record) -> None:
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


def demo(arguments: argparse.Namespace, record: Record) -> None:
    """The demo's federation, with processes."""
    started = time.monotonic()
    _fedmosaic(arguments, "demo", "demo", "--rounds", "3")
    record("seconds", time.monotonic() - started)
    record("clients", _results(arguments.work / "demo"))


def many(arguments: argparse.Namespace, record: Record) -> None:
    """A simulated federation of many clients of the given model."""
    from benchmarks.gpu_federation import write_scenario

    scenario = write_scenario(arguments.work / "many", arguments.model, clients=arguments.clients, rounds=2)
    started = time.monotonic()
    _fedmosaic(arguments, "many", "run", str(scenario))
    record("seconds", time.monotonic() - started)
    clients = _results(arguments.work / "many")
    record("seconds_per_round", max(client["seconds"] for client in clients.values()) / 2)
    record("clients", clients)


def _fedmosaic(arguments: argparse.Namespace, name: str, *words: str) -> None:
    command = [sys.executable, "-m", "fedmosaic.cli", *words]
    with (arguments.out / f"{name}.log").open("wb") as log:
        subprocess.run(  # noqa: S603  # our own command
            [*command, "--output-dir", str(arguments.work / name)],
            stdout=log,
            stderr=subprocess.STDOUT,
            check=True,
        )


def _results(folder: Path) -> dict[str, Any]:
    found = sorted(folder.glob("**/clients/*/state/result.json"))
    return {path.parents[1].name: json.loads(path.read_text()) for path in found}


SECTIONS = {
    "versions": versions,
    "tests": tests,
    "memory": memory,
    "steps": steps,
    "demo": demo,
    "many": many,
}


def run_section(name: str, arguments: argparse.Namespace, words: list[str]) -> str:
    """Run one section in a process group of its own; returns how it ended, in words."""
    command = [sys.executable, "-m", "benchmarks.gpu", *words, "--section", name]
    started = time.monotonic()
    with (arguments.out / f"{name}.err").open("wb") as errors:
        process = subprocess.Popen(command, stderr=errors, start_new_session=True)  # noqa: S603  # this module
        try:
            code = process.wait(LIMITS[name])
            end = "done" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            end = f"ended after {LIMITS[name]} s"
    tail = (arguments.out / f"{name}.err").read_text(errors="replace").strip().splitlines()
    reason = f": {tail[-1][:200]}" if end != "done" and tail else ""
    return f"{end} ({time.monotonic() - started:.0f} s){reason}"


def recorder(path: Path) -> Record:
    """A writer of figures into one JSON file, complete after each of them."""
    figures: dict[str, object] = {}

    def record(name: str, value: object) -> None:
        figures[name] = value
        path.write_text(json.dumps(figures, indent=1, default=str) + "\n")

    return record


def table(folder: Path) -> Iterator[str]:
    """The figures in short lines."""
    found = {name: _read(folder / f"{name}.json") for name in SECTIONS}
    head = found["versions"]
    yield " ".join(f"{key} {head[key]}" for key in head)
    if found["tests"]:
        yield f"tests: {found['tests'].get('summary')}"
        yield from found["tests"].get("failed", [])
    for name, row in found["memory"].items():
        yield f"1B {name}: " + (row.get("error") or ", ".join(f"{k} {v}" for k, v in row.items()))
    for name, value in found["steps"].items():
        if name.startswith("colora"):
            lora, colora = value
            yield (
                f"{name}: LoRA {lora['median_ms']:.2f} ms, Co-LoRA {colora['median_ms']:.2f} ms, "
                f"ratio {colora['ratio']:.3f}"
            )
        elif name.startswith("dp"):
            rows = (f"{v} {r['wall_seconds'] * 1e3:.1f} ms x{r['wall_ratio']:.2f}" for v, r in value.items())
            yield f"{name}: " + ", ".join(rows)
        else:
            yield f"{name}: " + ", ".join(f"{key} {figure:.3f}" for key, figure in value.items())
    for name in ("demo", "many"):
        figures = found[name]
        clients = figures.get("clients", {})
        slowest = max((client.get("seconds", 0.0) for client in clients.values()), default=0.0)
        if figures:
            whole = figures.get("seconds", 0.0)
            yield f"{name}: {whole:.0f} s in all, {slowest:.0f} s of rounds, {len(clients)} clients finished"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def main(words: list[str]) -> int:
    """Run the sections and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder of a pretrained model; steps and many need it")
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="folder for the runs themselves")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--examples", type=int, default=256, help="of the profile")
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--tiny", action="store_true", help="a small model in place of the large one")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.section:
        path = arguments.out / f"{arguments.section}.json"
        SECTIONS[arguments.section](arguments, recorder(path))
        return 0
    ends = {}
    for name in arguments.sections:
        if name in ("steps", "many") and arguments.model is None:
            ends[name] = "left out: no --model"
        else:
            ends[name] = run_section(name, arguments, words)
        print(f"{name}: {ends[name]}", flush=True)
    (arguments.out / "sections.json").write_text(json.dumps(ends, indent=1) + "\n")
    print("\n".join(["", *table(arguments.out)]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
