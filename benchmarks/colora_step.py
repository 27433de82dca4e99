"""Time of a training step with Co-LoRA against PEFT's LoRA, same rank, same layers, paired in one process.

    python benchmarks/colora_step.py MODEL_FOLDER [MODEL_FOLDER ...]

Each repetition times one step of every method in turn, so that whatever slows the machine down slows all
alike; the ratio is the median over repetitions of the ratio within a repetition. The bar for Co-LoRA is
1.05 times LoRA. With one thread (OMP_NUM_THREADS=1) the processor time is the steadier number on a machine
that does other work too.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model

from fedmosaic.client.colora import CoLoraConfig, set_active_branches, target_layers
from fedmosaic.client.model.hardware import choose_device, synchronise
from fedmosaic.client.model.load import load_base_model

BAR = 1.05
BATCH, LENGTH, RANK, BLOCKS = 8, 48, 16, 4


@dataclass(frozen=True)
class Timing:
    """Step times of one method on one model.

    Attributes:
        model: Name of the model's folder.
        dtype: Type of the frozen weights.
        method: What was timed.
        median_ms: Median step time, milliseconds.
        min_ms: Fastest step, milliseconds.
        ratio: Median over repetitions of this step time over LoRA's in the same repetition.
        cpu_ratio: The same for processor time.
    """

    model: str
    dtype: str
    method: str
    median_ms: float
    min_ms: float
    ratio: float
    cpu_ratio: float


def build(folder: Path, dtype: str, method: str, device: str = "cpu") -> PeftModel:
    """Load a model and adapt the same layers and modules with one method.

    Args:
        folder: Model folder.
        dtype: Type of the frozen weights.
        method: `lora`, `colora` (local and global branch, gate), `colora_personal` (a third branch) or
            `colora_local` (the local branch alone).
        device: Where to put it, as in `fedmosaic.client.model.hardware`.
    """
    model, _ = load_base_model(folder, dtype, device=choose_device(device))
    layers = list(target_layers(model.config.num_hidden_layers, BLOCKS))
    if method == "lora":
        modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        lora = LoraConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            target_modules=modules,
            layers_to_transform=layers,
            task_type=TaskType.CAUSAL_LM,
        )
        return get_peft_model(model, lora)
    config = CoLoraConfig(
        r=RANK,
        blocks=BLOCKS,
        shared_layers=layers,
        other_layers="none",
        personal_branch=method == "colora_personal",
        task_type=TaskType.CAUSAL_LM,
    )
    adapted = get_peft_model(model, config)
    if method == "colora_local":
        set_active_branches(adapted, {"local"})
    return adapted


def make_step(model: PeftModel, batch: int = BATCH, length: int = LENGTH) -> Callable[[], None]:
    """Return a closure that does one forward, backward and optimizer step on a fixed batch."""
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    tokens = torch.randint(3, model.config.vocab_size, (batch, length), generator=generator).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()

    def step() -> None:
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronise(device)

    return step


def compare(
    folder: Path,
    dtype: str,
    methods: list[str],
    repetitions: int,
    *,
    device: str = "cpu",
    batch: int = BATCH,
    length: int = LENGTH,
) -> list[Timing]:
    """Time all methods on one model, interleaved.

    Args:
        folder: Model folder.
        dtype: Type of the frozen weights.
        methods: Methods as in `build`; `lora` comes first.
        repetitions: Timed steps of each method, after three untimed ones.
        device: Where to compute.
        batch: Examples of a step.
        length: Tokens of each.
    """
    steps = {method: make_step(build(folder, dtype, method, device), batch, length) for method in methods}
    wall: dict[str, list[float]] = {method: [] for method in methods}
    cpu: dict[str, list[float]] = {method: [] for method in methods}
    for repetition in range(repetitions + 3):
        # Alternate the order, so that no method always runs after the same one.
        for method in methods if repetition % 2 else reversed(methods):
            start, cpu_start = time.perf_counter(), time.process_time()
            steps[method]()
            if repetition >= 3:
                wall[method].append(time.perf_counter() - start)
                cpu[method].append(time.process_time() - cpu_start)
    return [
        Timing(
            model=folder.name,
            dtype=dtype,
            method=method,
            median_ms=1e3 * statistics.median(wall[method]),
            min_ms=1e3 * min(wall[method]),
            ratio=_median_ratio(wall[method], wall["lora"]),
            cpu_ratio=_median_ratio(cpu[method], cpu["lora"]),
        )
        for method in methods
    ]


def _median_ratio(own: list[float], lora: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(own, lora, strict=True))


def main() -> None:
    """Run the comparison from the command line and say whether the bar is met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="model folders")
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["lora", "colora"],
        choices=["lora", "colora", "colora_local", "colora_personal"],
    )
    parser.add_argument("--json", type=Path, help="write the timings there")
    arguments = parser.parse_args()
    methods = ["lora", *(method for method in arguments.methods if method != "lora")]
    timings = [
        timing
        for folder in arguments.folders
        for dtype in arguments.dtypes
        for timing in compare(folder, dtype, methods, arguments.repetitions)
    ]
    print(f"batch {BATCH} x {LENGTH}, rank {RANK}, {BLOCKS} layers, {torch.get_num_threads()} threads")
    for t in timings:
        line = f"{t.model:18} {t.dtype:9} {t.method:16} median {t.median_ms:8.1f} ms  min {t.min_ms:8.1f} ms"
        print(f"{line}  {t.ratio:5.3f} x LoRA (processor time {t.cpu_ratio:5.3f} x)")
    worst = max(t.ratio for t in timings if t.method == "colora") if "colora" in methods else None
    if worst is not None:
        print(f"bar {BAR} x: {'met' if worst <= BAR else 'MISSED'} (worst {worst:.3f})")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(t) for t in timings], indent=2) + "\n")


if __name__ == "__main__":
    main()
