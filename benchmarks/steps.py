"""Time of one step on a model, each against what it replaces, paired in one process.

    python -m benchmarks.steps MODEL [MODEL ...] [--kinds colora private profile] [--dtype bfloat16]

* ``colora``: a training step with Co-LoRA against PEFT's LoRA, same rank, layers and modules; bar 1.05.
* ``private``: the product's step on P and Q, one example at a time, with clipping on the grid and secure
  noise, and Opacus's two ways (hooks, ghost clipping; noise of torch's generator), against the step without
  privacy on the whole batch. What `private` takes over `opacus_hooks` is the price of examples that cannot
  move each other's bits: in a batch they do, and one example can move the sum by more than the clipping norm.
* ``sample``: the same step on samples of half, once and twice the size: what its time tells of the sample.
* ``profile``: a task profile, example by example as its guarantee wants, against one forward pass in batches,
  which computes logits at every position; the profile computes them where a label stands.

Memory is the high-water mark of the resident set of a fresh process per variant (Linux only).
"""

import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import tyro
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn

from benchmarks.timing import Step, Summary, in_own_process, paired, random_examples, resident_mib, table
from fedmosaic.client.colora import CoLoraConfig, target_layers
from fedmosaic.client.dp.engine import (
    clip_and_sum,
    core_parameters,
    dimensions_of,
    example_gradient,
    only_shared_branch,
)
from fedmosaic.client.dp.training import noisy_sum, set_gradients
from fedmosaic.client.model.examples import EncodedExample, collate
from fedmosaic.client.model.hardware import choose_device, synchronise
from fedmosaic.client.model.load import load_base_model
from fedmosaic.client.model.loss import example_losses, on_device_of
from fedmosaic.client.profile.fit import BasisSettings, fit_mechanism
from fedmosaic.client.profile.probe import open_probe
from fedmosaic.client.profile.release import clipped_profile
from fedmosaic.privacy.mechanism.gaussian import ClippedSum
from fedmosaic.privacy.mechanism.noise import SecureNoise
from fedmosaic.privacy.mechanism.profile import Reduction, release
from fedmosaic.privacy.mechanism.projection import PublicMap

Kind = Literal["colora", "private", "sample", "profile"]
SHAPES: dict[Kind, tuple[int, int, int]] = {
    "colora": (8, 48, 48),
    "private": (32, 64, 16),
    "sample": (32, 64, 16),
    "profile": (64, 64, 24),
}
"""Examples, their tokens, and how many of these are supervised."""
PRIVATE = ("plain", "private", "opacus_hooks", "opacus_ghost")
RANK, BLOCKS, CLIP, NOISE = 16, 4, 1.0, 1.0
DIMENSIONS, LEFT, TOKENS_PER_BATCH = 128, 4, 4096
"""Of a profile, and of the forward pass that it is compared with."""


@dataclass(frozen=True)
class Arguments:
    """What to time."""

    models: tyro.conf.Positional[tuple[Path, ...]]
    """Model folders or GGUF files."""
    kinds: tuple[Kind, ...] = get_args(Kind)
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen weights."""
    device: str = "cpu"
    repetitions: int = 15
    threads: int = 1
    """One, as several clients on one machine have; a batch gains more from a second than single examples."""
    batch: int = 0
    """Examples; 0 for what the kind's published figures have."""
    tokens: int = 0
    """Tokens of an example, likewise."""
    memory: bool = False
    """Also measure the memory of the private kind."""

    def examples(self, kind: Kind, vocabulary: int) -> list[EncodedExample]:
        """Random ones, in number and length as asked for."""
        batch, tokens, answer = SHAPES[kind]
        length = self.tokens or tokens
        return random_examples(vocabulary, self.batch or batch, length, min(answer, length))

    def load(self, path: Path) -> Any:
        """The bare model."""
        folder, file = (path.parent, path.name) if path.suffix == ".gguf" else (path, None)
        device = choose_device(self.device)
        return load_base_model(folder, self.dtype, gguf_file=file, device=device)[0]


def colora(path: Path, arguments: Arguments) -> dict[str, Summary]:
    """Training steps; `colora` has local and global branch and a gate, `colora_personal` one branch more."""

    def step_of(method: str) -> Step:
        base = arguments.load(path)
        layers = list(target_layers(base.config.num_hidden_layers, BLOCKS))
        if method == "lora":
            modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            config: Any = LoraConfig(
                r=RANK,
                lora_alpha=2 * RANK,
                target_modules=modules,
                layers_to_transform=layers,
                task_type=TaskType.CAUSAL_LM,
            )
        else:
            config = CoLoraConfig(
                r=RANK,
                blocks=BLOCKS,
                shared_layers=layers,
                other_layers="none",
                personal_branch=method == "colora_personal",
                task_type=TaskType.CAUSAL_LM,
            )
        model = get_peft_model(base, config).train()
        examples = arguments.examples("colora", base.config.vocab_size)
        batch = on_device_of(model, collate(examples, 0))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def step() -> None:
            model(**batch).loss.backward()
            _finish(optimizer, model)

        return step

    steps = {method: step_of(method) for method in ("lora", "colora", "colora_personal")}
    variants: dict[str, Any] = {method: partial(nullcontext, step) for method, step in steps.items()}
    return paired(variants, arguments.repetitions, untimed=3)


def private(path: Path, arguments: Arguments) -> dict[str, Summary]:
    """Steps on P and Q; memory, each variant's in processes of its own, is the median of three."""
    model, examples = _adapted(path, arguments)
    with only_shared_branch(model) as cores:
        variants = {name: partial(prepared, name, model, cores, examples) for name in PRIVATE}
        found = paired(variants, arguments.repetitions)
    if arguments.memory:
        for name, row in found.items():
            row["peak_mib"] = statistics.median(
                in_own_process(peak_mib, name, path, arguments) for _ in range(3)
            )
    return found


def sample(path: Path, arguments: Arguments) -> dict[str, Summary]:
    """The private step by the number of examples that a Poisson sample happens to have."""
    model, examples = _adapted(path, arguments)
    samples = examples[: len(examples) // 2], examples, examples * 2
    with only_shared_branch(model) as cores:
        variants: dict[str, Any] = {
            f"{len(each)} examples": partial(prepared, "private", model, cores, each) for each in samples
        }
        return paired(variants, arguments.repetitions)


def peak_mib(variant: str, path: Path, arguments: Arguments) -> float:
    """MiB of this process at most, during three steps."""
    torch.set_num_threads(arguments.threads)
    model, examples = _adapted(path, arguments)
    with only_shared_branch(model) as cores, prepared(variant, model, cores, examples) as step:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        for _ in range(3):
            step()
    return resident_mib("VmHWM")


def _adapted(path: Path, arguments: Arguments) -> tuple[nn.Module, list[EncodedExample]]:
    base = arguments.load(path)
    model = get_peft_model(base, CoLoraConfig(r=RANK, alpha=2.0 * RANK, task_type="CAUSAL_LM"))
    return model, arguments.examples("private", base.config.vocab_size)


@contextmanager
def prepared(variant: str, model: Any, cores: Any, examples: list[EncodedExample]) -> Iterator[Step]:
    """Set a variant of `PRIVATE` up, yield one step of it, and take its hooks off again."""
    adam = torch.optim.Adam(core_parameters(cores), lr=1e-4)
    batch = on_device_of(model, collate(examples, 0))
    settings = {"noise_multiplier": NOISE, "max_grad_norm": CLIP, "expected_batch_size": len(examples)}

    def one_by_one() -> None:
        """As `fedmosaic.client.dp.training` does, its Poisson sampling left out."""
        total = ClippedSum.empty(dimensions_of(cores))
        for example in examples:
            total = total + clip_and_sum(example_gradient(model, cores, example)[None], CLIP)
        noisy = noisy_sum(total, CLIP, NOISE, SecureNoise())
        set_gradients(core_parameters(cores), noisy / len(examples))
        _finish(adam, model)

    def whole_batch(optimizer: Any, backward: Callable[[torch.Tensor], object]) -> None:
        # Opacus's hooks sit on the cores; called through its wrapper, the model would compute all logits.
        backward(example_losses(model, batch))
        _finish(optimizer, model)

    def mean(losses: torch.Tensor) -> None:
        losses.mean().backward()

    if variant == "private":
        yield one_by_one
    elif variant == "plain":
        yield lambda: whole_batch(adam, mean)
    elif variant == "opacus_hooks":
        wrapped = GradSampleModule(model, strict=False, loss_reduction="mean")
        hooked = DPOptimizer(adam, **settings)
        yield lambda: whole_batch(hooked, mean)
        wrapped.to_standard_module()
    else:
        ghost = GradSampleModuleFastGradientClipping(model, strict=False, max_grad_norm=CLIP)
        fast = DPOptimizerFastGradientClipping(adam, **settings)
        yield lambda: whole_batch(
            fast, lambda losses: DPTensorFastGradientClipping(ghost, fast, losses, "mean").backward()
        )
        ghost.to_standard_module()


def profile(path: Path, arguments: Arguments) -> dict[str, Summary]:
    """A profile of all examples, with its noise, against a forward pass."""
    model = arguments.load(path)
    probe, device = open_probe(model), choose_device(arguments.device)
    examples = arguments.examples("profile", model.config.vocab_size)
    reduction = Reduction(
        kind="kronecker",
        hidden_size=probe.hidden_size,
        intermediate_size=probe.intermediate_size,
        projection_dimensions=DIMENSIONS,
    )
    basis = BasisSettings(kronecker_shape=(LEFT, DIMENSIONS // LEFT))
    public_map = PublicMap(
        *fit_mechanism(probe, path.stem, examples[:64], reduction, basis, noise_multiplier=8.0)
    )
    ids = torch.stack([example.input_ids for example in examples]).to(device)

    def forward() -> None:
        with torch.inference_mode():
            for part in torch.split(ids, TOKENS_PER_BATCH // ids.shape[1]):
                model(input_ids=part, use_cache=False)
        synchronise(device)

    def whole() -> None:
        noise = SecureNoise()
        release(clipped_profile(probe, examples, public_map, noise), public_map.mechanism, noise)

    variants: dict[str, Any] = {
        "forward pass": partial(nullcontext, forward),
        "profile": partial(nullcontext, whole),
    }
    return paired(variants, arguments.repetitions)


def _finish(optimizer: Any, model: nn.Module) -> None:
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    synchronise(next(model.parameters()).device)


def compare(kind: Kind, path: Path, arguments: Arguments) -> dict[str, Summary]:
    """Time the variants of one kind on one model."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    return {"colora": colora, "private": private, "sample": sample, "profile": profile}[kind](path, arguments)


def main() -> None:
    """Measure and print."""
    arguments = tyro.cli(Arguments, description=__doc__)
    for path in arguments.models:
        for kind in arguments.kinds:
            found = compare(kind, path, arguments)
            print(f"\n{table(f'{kind}: {path.stem}, {arguments.dtype}', found)}", flush=True)


if __name__ == "__main__":
    main()
