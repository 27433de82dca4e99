"""What an accelerator gives: ratios of steps, memory, and a whole federation on it.

    python -m benchmarks.gpu --model FOLDER --out FOLDER [--sections versions memory ...]

Every section runs in a process of its own with a limit on its time, and writes FOLDER/SECTION.json as soon as
it has figures: one that fails or hangs costs its own figures and no others. A table is printed last.
Sections:

* ``versions``: packages and device.
* ``memory``: a model of 1.2 billion random weights (the shape of Llama-3.2-1B) in bfloat16, NF4 and float32,
  with and without checkpointing: weights and peak of a step as measured, and as the preflight says.
* ``steps``: those of `benchmarks.steps`, in two formats; ratios are medians of pairs within one run.
* ``demo``: the demo's federation, one server and five client processes that share the device. It takes
  packages from the cache ($FEDMOSAIC_CACHE) or from the package index.
"""

import gc
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import tyro
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import steps as kinds
from benchmarks.timing import random_examples, table
from fedmosaic.client.model.adapted import adapter_config
from fedmosaic.client.model.hardware import choose_device, choose_dtype
from fedmosaic.client.model.load import adapt, load_model
from fedmosaic.client.model.training import TrainingSettings, train_local
from fedmosaic.client.preflight.memory import memory_need
from fedmosaic.client.settings import ClientSettings, DataSettings, ModelSettings
from fedmosaic.privacy.federation.terms import AdapterTerms

Section = Literal["versions", "memory", "steps", "demo"]
LIMITS: dict[Section, int] = {"versions": 60, "memory": 150, "steps": 150, "demo": 240}
"""Seconds after which a section is ended."""
BATCH, TOKENS, ANSWER, STEPS = 4, 512, 64, 4
"""Of the step whose memory is measured."""
MIB = 2**20
Record = Callable[[str, object], None]
"""Writes one named figure of a section, at once."""


@dataclass(frozen=True)
class Arguments:
    """What to measure, and where."""

    model: Path
    """Folder of a pretrained model, for the steps."""
    out: Path
    """Folder for the figures."""
    work: Path = Path("runs/gpu")
    """Folder for the runs themselves."""
    sections: tuple[Section, ...] = get_args(Section)
    device: str = "auto"
    repetitions: int = 30


def versions(arguments: Arguments, record: Record) -> None:
    """Packages, device and what `auto` chooses on it."""
    device = choose_device(arguments.device)
    record("python", platform.python_version())
    for package in ("torch", "transformers", "peft", "opacus", "bitsandbytes"):
        with suppress(PackageNotFoundError):
            record(package, version(package))
    record("device", torch.cuda.get_device_name(device) if device.type == "cuda" else str(device))
    record("auto_dtype", str(choose_dtype("auto", device)))
    record("tf32", [torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()])


def steps(arguments: Arguments, record: Record) -> None:
    """Ratios of steps on one pretrained model."""
    shapes: tuple[tuple[kinds.Kind, int, int], ...] = (
        ("colora", 8, 48), ("colora", 16, 256), ("private", 32, 64), ("profile", 256, 64),
    )  # fmt: skip
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    for dtype in dtypes:
        for kind, batch, tokens in shapes:
            repetitions = arguments.repetitions if kind == "colora" else max(3, arguments.repetitions // 3)
            settings = kinds.Arguments(
                (arguments.model,), dtype=dtype, device=arguments.device, repetitions=repetitions,
                batch=batch, tokens=tokens,
            )  # fmt: skip
            record(f"{kind} {dtype} {batch}x{tokens}", kinds.compare(kind, arguments.model, settings))


def write_random_model(folder: Path) -> None:
    """Write a model of Llama-3.2-1B's shape with random weights in bfloat16, and a tokenizer of two words."""
    if (folder / "config.json").exists():
        return
    config = LlamaConfig(
        hidden_size=2048, num_hidden_layers=16, intermediate_size=8192, vocab_size=128256,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("cuda"):
        model: Any = LlamaForCausalLM(config)
        model.to(torch.bfloat16).save_pretrained(folder)
    special = {"unk_token": "<unk>", "eos_token": "<end>"}
    words = {word: index for index, word in enumerate((*special.values(), "one", "two"))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))  # noqa: S106  # a word
    tokenizer.pre_tokenizer = Whitespace()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def measure_memory(
    folder: Path, dtype: str, quantization: str | None, checkpoint: bool
) -> dict[str, float | str]:
    """Load, adapt and train for a few steps: MiB as the preflight says and as measured, and ms of a step."""
    settings = ModelSettings(path=str(folder), dtype=dtype, device="cuda", quantization=quantization)
    training = TrainingSettings(
        steps=STEPS, per_device_train_batch_size=BATCH, max_length=TOKENS, gradient_checkpointing=checkpoint
    )
    # The probe on the processor: what is compared is the training step.
    client = ClientSettings(
        kit=folder, server="localhost:1", state_dir=folder, model=settings,
        probe=ModelSettings(path=str(folder), device="cpu"), data=DataSettings(train=folder),
        training=training,
    )  # fmt: skip
    started = time.perf_counter()
    need = memory_need(client, AdapterTerms(), supervised=ANSWER)
    preflight_s = time.perf_counter() - started
    gc.collect()
    torch.cuda.empty_cache()
    at_first = torch.cuda.memory_allocated()
    model = adapt(load_model(settings)[0], adapter_config(settings, AdapterTerms()))
    loaded = torch.cuda.memory_allocated() - at_first
    torch.cuda.reset_peak_memory_stats()
    times: list[float] = []

    def tick(*_: object) -> None:
        torch.cuda.synchronize()
        times.append(time.perf_counter())

    examples = random_examples(1000, 2 * BATCH, TOKENS, ANSWER)
    train_local(model, examples, training, pad_token_id=0, progress=tick)
    peaked = torch.cuda.max_memory_allocated() - at_first
    return {
        "loaded_said": round((need.weights + need.adapter) / MIB),
        "loaded_MiB": round(loaded / MIB),
        "step_said": round(need.training / MIB),
        "step_MiB": round((peaked - loaded) / MIB),
        "peak_said": round((need.weights + need.adapter + need.training) / MIB),
        "peak_MiB": round(peaked / MIB),
        "step_ms": round(1e3 * (times[-1] - times[-2]), 1),
        "preflight_s": round(preflight_s, 1),
    }


def memory(arguments: Arguments, record: Record) -> None:
    """Memory and time of a step on a large model, and what the preflight says of it."""
    folder = arguments.work / "random-1b"
    write_random_model(folder)
    for dtype, quantization in (("bfloat16", None), ("bfloat16", "nf4"), ("float32", None)):
        for checkpoint in (False, True):
            name = f"{quantization or dtype}{' checkpointed' if checkpoint else ''}"
            try:
                record(name, measure_memory(folder, dtype, quantization, checkpoint))
            except Exception as error:  # one setting that fails must not cost the others
                record(name, {"error": f"{type(error).__name__}: {error}"[:300]})


def demo(arguments: Arguments, record: Record) -> None:
    """The demo's federation, with processes."""
    started, place = time.monotonic(), arguments.work / "demo"
    options = ["--rounds", "3", "--output-dir", str(place)]
    with (arguments.out / "demo.log").open("wb") as log:
        subprocess.run(  # noqa: S603  # our own command
            [sys.executable, "-m", "fedmosaic.cli", "demo", *options],
            stdout=log,
            stderr=subprocess.STDOUT,
            check=True,
        )
    record("seconds", time.monotonic() - started)
    found = sorted(place.glob("**/clients/*/state/result.json"))
    record("clients", {path.parents[1].name: json.loads(path.read_text()) for path in found})


def run_section(name: Section, arguments: Arguments) -> None:
    """Run one section in this process, the first of a group that can be ended as one."""
    os.setsid()
    figures: dict[str, object] = {}

    def record(what: str, value: object) -> None:
        figures[what] = value
        path = arguments.out / f"{name}.json"
        path.write_text(json.dumps(figures, indent=1, default=str) + "\n")

    {"versions": versions, "memory": memory, "steps": steps, "demo": demo}[name](arguments, record)


def tables(folder: Path) -> Iterator[str]:
    """The figures in short lines, times as Markdown."""
    paths = {name: folder / f"{name}.json" for name in LIMITS}
    found = {name: json.loads(path.read_text()) if path.exists() else {} for name, path in paths.items()}
    yield " ".join(f"{key} {value}" for key, value in found["versions"].items())
    for name, row in found["memory"].items():
        yield f"1B {name}: " + ", ".join(f"{key} {value}" for key, value in row.items())
    for name, row in found["steps"].items():
        yield f"\n{table(name, row)}"
    if found["demo"]:
        slowest = max((client["seconds"] for client in found["demo"]["clients"].values()), default=0.0)
        yield f"demo: {found['demo']['seconds']:.0f} s in all, {slowest:.0f} s of rounds"


def main() -> None:
    """Run the sections and print the tables."""
    arguments = tyro.cli(Arguments, description=__doc__)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.sections:
        started = time.monotonic()
        process = multiprocessing.get_context("spawn").Process(target=run_section, args=(name, arguments))
        process.start()
        process.join(LIMITS[name])
        if process.is_alive():
            os.killpg(process.pid or 0, signal.SIGKILL)
            process.join()
        end = "done" if process.exitcode == 0 else f"ended with {process.exitcode}"
        print(f"{name}: {end} ({time.monotonic() - started:.0f} s)", flush=True)
    print("\n".join(["", *tables(arguments.out)]), flush=True)


if __name__ == "__main__":
    main()
