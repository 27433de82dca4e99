"""Time and memory of one private step on P and Q, against the step without privacy.

    python -m benchmarks.dp_step --model stories=models/stories-15m --model smollm2=SmolLM2.Q4_1.gguf

Variants, all on one model with Co-LoRA, the same batch and Adam on the same cores:

* ``plain``: forward, backward, optimizer step, on the whole batch.
* ``private``: the product's step, one example at a time, with clipping on the grid and secure noise.
* ``opacus_hooks``: Opacus's GradSampleModule and DPOptimizer, on the whole batch; noise of torch's generator.
* ``opacus_ghost``: the same with Opacus's ghost clipping.

What ``private`` takes over ``opacus_hooks`` is the price of examples that cannot move each other's bits: in a
batch they do, and with it one example can move the sum by more than the clipping norm.

Memory is the high-water mark of the resident set of a fresh process per variant, reset after the model is
loaded (Linux only).
"""

import json
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
import tyro
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from peft import get_peft_model
from torch import nn

from benchmarks.timing import Step, Summary, paired, random_examples, table
from fedmosaic.client.colora import CoLoraConfig
from fedmosaic.client.dp.branch import only_shared_branch
from fedmosaic.client.dp.engine import clip_and_sum, core_parameters, dimensions_of, example_gradient
from fedmosaic.client.dp.training import noisy_sum, set_gradients
from fedmosaic.client.model.examples import EncodedExample, collate
from fedmosaic.client.model.hardware import choose_device, synchronise
from fedmosaic.client.model.load import load_base_model
from fedmosaic.client.model.loss import example_losses, on_device_of
from fedmosaic.privacy.mechanism.gaussian import ClippedSum
from fedmosaic.privacy.mechanism.noise import SecureNoise

Variant = Literal["plain", "private", "opacus_hooks", "opacus_ghost"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
OPACUS = {"noise_multiplier": 1.0, "max_grad_norm": 1.0}
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    model: tyro.conf.UseAppendAction[tuple[str, ...]]
    """NAME=PATH of a model folder or a GGUF file."""
    batch: int = 32
    tokens: int = 64
    answer_tokens: int = 16
    """How many of them are supervised."""
    rank: int = 16
    dtype: str = "float32"
    device: str = "cpu"
    repetitions: int = 15
    threads: int = os.cpu_count() or 1
    no_memory: bool = False
    memory_of: Variant | None = None
    """Measure the memory of one variant in this process, used by the command itself."""
    output: Path | None = None
    """Write the figures as JSON."""


def load(path: Path, dtype: str, rank: int, device: str = "cpu") -> nn.Module:
    """Load a model folder or a GGUF file, with a Co-LoRA adapter of four blocks on all linear modules."""
    folder, file = (path.parent, path.name) if path.suffix == ".gguf" else (path, None)
    base, _ = load_base_model(folder, dtype, gguf_file=file, device=choose_device(device))
    return get_peft_model(base, CoLoraConfig(r=rank, alpha=2.0 * rank, task_type="CAUSAL_LM"))


def make_examples(model: nn.Module, count: int, tokens: int, answer: int) -> list[EncodedExample]:
    """Random tokens, the last ones of each example supervised."""
    return random_examples(model.get_input_embeddings().num_embeddings, count, tokens, answer)


@contextmanager
def prepared(
    variant: Variant, model: nn.Module, cores: Mapping[str, nn.Linear], examples: list[EncodedExample]
) -> Iterator[Step]:
    """Set a variant up, yield one step of it, and take its hooks off again."""
    adam = torch.optim.Adam(core_parameters(cores), lr=LEARNING_RATE)
    batch = on_device_of(model, collate(examples, 0))
    if variant == "private":
        yield lambda: private_step(model, cores, adam, examples)
    elif variant == "plain":
        yield lambda: plain_step(model, adam, batch)
    elif variant == "opacus_hooks":
        wrapped = GradSampleModule(model, strict=False, loss_reduction="mean")
        optimizer = DPOptimizer(adam, expected_batch_size=len(examples), **OPACUS)
        # The hooks sit on the cores; called through the wrapper, the model would compute all logits.
        yield lambda: plain_step(model, optimizer, batch)
        wrapped.to_standard_module()
    else:
        ghost = GradSampleModuleFastGradientClipping(
            model, strict=False, max_grad_norm=OPACUS["max_grad_norm"]
        )
        fast = DPOptimizerFastGradientClipping(adam, expected_batch_size=len(examples), **OPACUS)
        yield lambda: ghost_step(ghost, model, fast, batch)
        ghost.to_standard_module()


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict) -> None:
    """One step on the mean of the examples' losses."""
    example_losses(model, batch).mean().backward()
    _finish(optimizer, batch["input_ids"].device)


def private_step(
    model: nn.Module,
    cores: Mapping[str, nn.Linear],
    optimizer: torch.optim.Optimizer,
    examples: list[EncodedExample],
) -> None:
    """One step as `fedmosaic.client.dp.training` takes it, its Poisson sampling left out."""
    total = ClippedSum.empty(dimensions_of(cores))
    for example in examples:
        gradient = example_gradient(model, cores, example)
        total = total + clip_and_sum(gradient[None], OPACUS["max_grad_norm"])
    noisy = noisy_sum(total, OPACUS["max_grad_norm"], OPACUS["noise_multiplier"], SecureNoise())
    set_gradients(core_parameters(cores), noisy / len(examples))
    _finish(optimizer, next(model.parameters()).device)


def ghost_step(wrapped: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict) -> None:
    """One step of Opacus's ghost clipping: two backward passes."""
    losses = example_losses(model, batch)
    DPTensorFastGradientClipping(wrapped, optimizer, losses, "mean").backward()
    _finish(optimizer, batch["input_ids"].device)


def _finish(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    synchronise(device)


def measure_time(model: nn.Module, examples: list[EncodedExample], repetitions: int) -> dict[str, Summary]:
    """Times of every variant, ratios to ``plain``."""
    with only_shared_branch(model) as cores:
        return paired({v: partial(prepared, v, model, cores, examples) for v in VARIANTS}, repetitions)


def measure_memory(model: nn.Module, examples: list[EncodedExample], variant: Variant) -> dict[str, float]:
    """Resident MiB of this process: before any step, and at most during three of them."""
    with only_shared_branch(model) as cores, prepared(variant, model, cores, examples) as step:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = resident("VmRSS")
        for _ in range(3):
            step()
    return {"loaded_mib": before, "peak_mib": resident("VmHWM")}


def resident(field: str) -> float:
    """A figure of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def memory_of(variant: Variant, path: str, arguments: Arguments) -> dict[str, float]:
    """Measure a variant's memory in a process of its own, the median of three."""
    command = [sys.executable, "-m", "benchmarks.dp_step", "--memory-of", variant, "--model", f"it={path}"]
    for name in ("batch", "tokens", "answer_tokens", "rank", "threads", "dtype", "device"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    # S603: the command is this very module with options that were parsed.
    runs = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # noqa: S603  # ours
        for _ in range(3)
    ]
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def main(arguments: Arguments) -> None:
    """Measure and print."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    results = {}
    for name, _, path in (entry.partition("=") for entry in arguments.model):
        model = load(Path(path), arguments.dtype, arguments.rank, arguments.device)
        examples = make_examples(model, arguments.batch, arguments.tokens, arguments.answer_tokens)
        if arguments.memory_of:
            print(json.dumps(measure_memory(model, examples, arguments.memory_of)))
            return
        result = measure_time(model, examples, arguments.repetitions)
        if not arguments.no_memory:
            for variant in VARIANTS:
                result[variant] |= memory_of(variant, path, arguments)
        print(f"\n{table(name, result)}")
        results[name] = result
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
