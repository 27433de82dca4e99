"""Time of a training step with Co-LoRA against PEFT's LoRA, same rank, same layers, paired in one process.

    python -m benchmarks.colora_step MODEL_FOLDER [MODEL_FOLDER ...]

The bar for Co-LoRA is 1.05 times LoRA. With one thread (OMP_NUM_THREADS=1) the processor time is the steadier
number on a machine that does other work too.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from peft import LoraConfig, PeftModel, TaskType, get_peft_model

from benchmarks.timing import Step, Summary, paired, table
from fedmosaic.client.colora import CoLoraConfig, set_active_branches, target_layers
from fedmosaic.client.model.hardware import choose_device, synchronise
from fedmosaic.client.model.load import load_base_model

BAR = 1.05
BATCH, LENGTH, RANK, BLOCKS = 8, 48, 16, 4
Method = Literal["lora", "colora", "colora_local", "colora_personal"]
"""`colora` has local and global branch and a gate, `colora_personal` one more, `colora_local` one alone."""


@dataclass(frozen=True)
class Arguments:
    """What to time."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Model folders."""
    repetitions: int = 40
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    """Types of the frozen weights."""
    methods: tuple[Method, ...] = ("colora",)
    """Beside LoRA."""


def build(folder: Path, dtype: str, method: Method, device: str = "cpu") -> PeftModel:
    """Load a model and adapt the same layers and modules with one method."""
    model, _ = load_base_model(folder, dtype, device=choose_device(device))
    layers = list(target_layers(model.config.num_hidden_layers, BLOCKS))
    if method == "lora":
        modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        lora = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=modules, layers_to_transform=layers,
            task_type=TaskType.CAUSAL_LM,
        )  # fmt: skip
        return get_peft_model(model, lora)
    config = CoLoraConfig(
        r=RANK, blocks=BLOCKS, shared_layers=layers, other_layers="none",
        personal_branch=method == "colora_personal", task_type=TaskType.CAUSAL_LM,
    )  # fmt: skip
    adapted = get_peft_model(model, config)
    if method == "colora_local":
        set_active_branches(adapted, {"local"})
    return adapted


def make_step(model: PeftModel, batch: int = BATCH, length: int = LENGTH) -> Step:
    """One forward, backward and optimizer step on a fixed batch."""
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
    methods: Sequence[Method],
    repetitions: int,
    *,
    device: str = "cpu",
    batch: int = BATCH,
    length: int = LENGTH,
) -> dict[str, Summary]:
    """Time LoRA and other methods on one model."""
    steps = {m: make_step(build(folder, dtype, m, device), batch, length) for m in ("lora", *methods)}
    return paired({m: partial(nullcontext, step) for m, step in steps.items()}, repetitions, untimed=3)


def main(arguments: Arguments) -> None:
    """Run the comparison and say whether the bar is met."""
    print(f"batch {BATCH} x {LENGTH}, rank {RANK}, {BLOCKS} layers, {torch.get_num_threads()} threads")
    for folder in arguments.folders:
        for dtype in arguments.dtypes:
            found = compare(folder, dtype, arguments.methods, arguments.repetitions)
            print(f"\n{table(f'{folder.name}, {dtype}', found)}")
            if "colora" in found:
                ratio = found["colora"]["wall_ratio"]
                print(f"bar {BAR} x: {'met' if ratio <= BAR else 'MISSED'} ({ratio:.3f})")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
