"""Time and memory of one private step on P and Q, against the step without privacy.

    python benchmarks/dp_step.py --model stories=models/stories-15m --model smollm2=SmolLM2.Q4_1.gguf

Variants, all on one model with Co-LoRA, the same batch and Adam on the same cores:

* ``plain``: forward, backward, optimizer step, on the whole batch.
* ``private``: the product's step, one example at a time, with clipping on the grid and secure noise.
* ``opacus_hooks``: Opacus's GradSampleModule and DPOptimizer, on the whole batch; noise of torch's generator.
* ``opacus_ghost``: the same with Opacus's ghost clipping.

What ``private`` takes over ``opacus_hooks`` is the price of examples that cannot move each other's bits: in a
batch they do, and with it one example can move the sum by more than the clipping norm.

Times are paired: every repetition runs all variants in a shuffled order, and the ratios to ``plain``
are taken within a repetition. Memory is the high-water mark of the resident set of a fresh process
per variant, reset after the model is loaded (Linux only).
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from peft import get_peft_model
from torch import nn

from fedmosaic.client.colora import CoLoraConfig
from fedmosaic.client.dp.branch import only_shared_branch
from fedmosaic.client.dp.engine import clip_and_sum, core_parameters, dimensions_of, example_gradient
from fedmosaic.client.dp.training import noisy_sum, set_gradients
from fedmosaic.client.model.examples import IGNORED, EncodedExample
from fedmosaic.client.model.hardware import choose_device, synchronise
from fedmosaic.client.model.load import load_base_model
from fedmosaic.client.model.loss import example_losses, on_device_of
from fedmosaic.privacy.mechanism.gaussian import ClippedSum
from fedmosaic.privacy.mechanism.noise import SecureNoise

VARIANTS = ("plain", "private", "opacus_hooks", "opacus_ghost")
CLIPPING_NORM = 1.0
NOISE_MULTIPLIER = 1.0
LEARNING_RATE = 1e-4

Step = Callable[[], None]


def load(path: Path, dtype: str, rank: int, device: str = "cpu") -> nn.Module:
    """Load a model folder or a GGUF file, with a Co-LoRA adapter of four blocks on all linear modules."""
    if path.suffix == ".gguf":
        base, _ = load_base_model(path.parent, dtype, gguf_file=path.name, device=choose_device(device))
    else:
        base, _ = load_base_model(path, dtype, device=choose_device(device))
    return get_peft_model(base, CoLoraConfig(r=rank, alpha=2.0 * rank, task_type="CAUSAL_LM"))


def make_batch(model: nn.Module, examples: int, tokens: int, answer: int) -> dict[str, torch.Tensor]:
    """Random tokens, the last ``answer`` of each example supervised."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    input_ids = torch.randint(0, vocabulary, (examples, tokens), generator=generator)
    labels = input_ids.clone()
    labels[:, : tokens - answer] = IGNORED
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
    return on_device_of(model, batch)


@contextmanager
def prepared(variant: str, model: nn.Module, cores: dict[str, nn.Linear], batch: dict) -> Iterator[Step]:
    """Set a variant up, yield one step of it, and take its hooks off again."""
    adam = torch.optim.Adam(core_parameters(cores), lr=LEARNING_RATE)
    examples = len(batch["input_ids"])
    if variant == "plain":
        yield lambda: plain_step(model, adam, batch)
    elif variant == "private":
        alone = [EncodedExample("", *row) for row in zip(batch["input_ids"], batch["labels"], strict=True)]
        yield lambda: private_step(model, cores, adam, alone)
    elif variant == "opacus_hooks":
        wrapped = GradSampleModule(model, strict=False, loss_reduction="mean")
        optimizer = DPOptimizer(
            adam,
            noise_multiplier=NOISE_MULTIPLIER,
            max_grad_norm=CLIPPING_NORM,
            expected_batch_size=examples,
        )
        # The hooks sit on the cores; called through the wrapper, the model would compute all logits.
        yield lambda: plain_step(model, optimizer, batch)
        wrapped.to_standard_module()
    else:
        ghost = GradSampleModuleFastGradientClipping(model, strict=False, max_grad_norm=CLIPPING_NORM)
        optimizer = DPOptimizerFastGradientClipping(
            adam,
            noise_multiplier=NOISE_MULTIPLIER,
            max_grad_norm=CLIPPING_NORM,
            expected_batch_size=examples,
        )
        yield lambda: ghost_step(ghost, model, optimizer, batch)
        ghost.to_standard_module()


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict) -> None:
    """One step on the mean of the examples' losses."""
    example_losses(model, batch).mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def private_step(
    model: nn.Module,
    cores: dict[str, nn.Linear],
    optimizer: torch.optim.Optimizer,
    examples: list[EncodedExample],
) -> None:
    """One step as `fedmosaic.client.dp.training` takes it, its Poisson sampling left out."""
    total = ClippedSum.empty(dimensions_of(cores))
    for example in examples:
        total = total + clip_and_sum(example_gradient(model, cores, example)[None], CLIPPING_NORM)
    noisy = noisy_sum(total, CLIPPING_NORM, NOISE_MULTIPLIER, SecureNoise())
    set_gradients(core_parameters(cores), noisy / len(examples))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def ghost_step(wrapped: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict) -> None:
    """One step of Opacus's ghost clipping: two backward passes."""
    losses = example_losses(model, batch)
    DPTensorFastGradientClipping(wrapped, optimizer, losses, "mean").backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure_time(model: nn.Module, batch: dict, repetitions: int) -> dict[str, dict[str, float]]:
    """Median wall and processor seconds per variant, and median ratios to ``plain`` of one repetition."""
    order = random.Random(0)  # noqa: S311  # only the order of timings
    seconds: dict[str, list[tuple[float, float]]] = {variant: [] for variant in VARIANTS}
    with only_shared_branch(model) as cores:
        for repetition in range(repetitions + 1):
            for variant in order.sample(VARIANTS, len(VARIANTS)):
                with prepared(variant, model, cores, batch) as step:
                    wall, processor = time.perf_counter(), time.process_time()
                    step()
                    synchronise(batch["input_ids"].device)
                    taken = (time.perf_counter() - wall, time.process_time() - processor)
                if repetition:  # the first one warms up
                    seconds[variant].append(taken)
    return {variant: summarise(seconds[variant], seconds["plain"]) for variant in VARIANTS}


def summarise(taken: list[tuple[float, float]], plain: list[tuple[float, float]]) -> dict[str, float]:
    """Medians of one variant, with the quartiles of its paired ratios."""
    result = {}
    for index, clock in enumerate(("wall", "processor")):
        ratios = [one[index] / other[index] for one, other in zip(taken, plain, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result[f"{clock}_seconds"] = statistics.median(one[index] for one in taken)
        result |= {f"{clock}_ratio": middle, f"{clock}_ratio_low": low, f"{clock}_ratio_high": high}
    return result


def measure_memory(model: nn.Module, batch: dict, variant: str) -> dict[str, float]:
    """Resident MiB of this process: before any step, and at most during three of them."""
    with only_shared_branch(model) as cores, prepared(variant, model, cores, batch) as step:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = resident("VmRSS")
        for _ in range(3):
            step()
    return {"loaded_mib": before, "peak_mib": resident("VmHWM")}


def resident(field: str) -> float:
    """A figure of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def memory_of(variant: str, path: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Measure a variant's memory in a process of its own, the median of three."""
    command = [sys.executable, __file__, "--memory-of", variant, "--model", f"it={path}"]
    for name in ("batch", "tokens", "answer_tokens", "rank", "threads", "dtype", "device"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    # S603: the command is this very file with options that were parsed.
    runs = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # noqa: S603
        for _ in range(3)
    ]
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def show(name: str, result: dict[str, dict[str, float]]) -> None:
    """Print one model's table."""
    print(f"\n{name}\n{'variant':<14} {'s wall':>7} {'× wall':>16} {'× cpu':>16}", end="")
    print(f" {'peak MiB':>9} {'× peak':>7} {'× step':>7}")
    plain = result["plain"]
    for variant, row in result.items():
        spans = [
            f"{row[f'{clock}_ratio']:.2f} [{row[f'{clock}_ratio_low']:.2f},{row[f'{clock}_ratio_high']:.2f}]"
            for clock in ("wall", "processor")
        ]
        memory = ""
        if "peak_mib" in row:
            own = (row["peak_mib"] - row["loaded_mib"]) / (plain["peak_mib"] - plain["loaded_mib"])
            memory = f"{row['peak_mib']:>9.0f} {row['peak_mib'] / plain['peak_mib']:>7.2f} {own:>7.2f}"
        print(f"{variant:<14} {row['wall_seconds']:>7.3f} {spans[0]:>16} {spans[1]:>16} {memory}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--answer-tokens", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    results = {}
    for name, _, path in (entry.partition("=") for entry in arguments.model):
        if not Path(path).exists():
            print(f"{name}: {path} is absent, skipped")
            continue
        model = load(Path(path), arguments.dtype, arguments.rank, arguments.device)
        batch = make_batch(model, arguments.batch, arguments.tokens, arguments.answer_tokens)
        if arguments.memory_of:
            print(json.dumps(measure_memory(model, batch, arguments.memory_of)))
            return
        result = measure_time(model, batch, arguments.repetitions)
        if not arguments.no_memory:
            for variant in VARIANTS:
                result[variant] |= memory_of(variant, Path(path), arguments)
        show(name, result)
        results[name] = result
    if arguments.output:
        facts = {
            "python": platform.python_version(),
            "machine": platform.machine(),
            **{package: version(package) for package in ("torch", "opacus", "transformers", "peft")},
        }
        settings = {key: str(value) for key, value in vars(arguments).items() if key != "model"}
        arguments.output.write_text(
            json.dumps({"facts": facts, "settings": settings, "results": results}, indent=1)
        )


if __name__ == "__main__":
    main()
