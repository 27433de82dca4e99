"""Time a task profile against one plain forward pass over the same examples.

    python benchmarks/profile_cost.py --model DIRECTORY [--gguf-file FILE] [--dtype bfloat16]

Both run in turn, the forward pass in batches, the profile example by example as its guarantee wants, and
medians of times and of paired ratios are printed.
The bar is a ratio of at most 1.1. The plain pass computes logits at every position, as a forward pass
with labels does; the profile computes them, and their way back through the head, where a label stands.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from fedmosaic.client.model.examples import IGNORED, EncodedExample
from fedmosaic.client.model.hardware import choose_device, synchronise
from fedmosaic.client.model.load import load_base_model
from fedmosaic.client.profile.basis import BasisSettings, fit_mechanism
from fedmosaic.client.profile.probe import open_probe
from fedmosaic.client.profile.release import clipped_profile
from fedmosaic.privacy.mechanism.noise import SecureNoise
from fedmosaic.privacy.mechanism.profile import Reduction, release
from fedmosaic.privacy.mechanism.projection import PublicMap

_TOKENS_PER_BATCH = 4096
"""Of the plain forward pass."""


@dataclass(frozen=True)
class Settings:
    """What to time."""

    model: Path
    gguf_file: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    kind: Literal["kronecker", "tensor_sketch", "coordinates"] = "kronecker"
    dimensions: int = 128
    left: int = 4
    examples: int = 512
    tokens: int = 64
    """Tokens per example."""
    answer_tokens: int = 24
    """How many of them are supervised."""
    repeats: int = 5
    threads: int = 1
    """Threads of the matrix products. One, as several clients on one machine have; single examples make small
    matrices, which gain less from a second thread than a batch does."""


def random_examples(settings: Settings, vocabulary: int) -> list[EncodedExample]:
    """Examples of one length with random tokens: the arithmetic does not depend on which."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (settings.examples, settings.tokens), generator=generator)
    labels = ids.clone()
    labels[:, : settings.tokens - settings.answer_tokens] = IGNORED
    return [EncodedExample(str(index), *pair) for index, pair in enumerate(zip(ids, labels, strict=True))]


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall time and processor time of one call; the second is steadier where other work runs too."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def compare(settings: Settings) -> dict[str, float]:
    """Time both.

    Returns:
        Processor seconds of either, and the medians of the paired ratios.
    """
    torch.set_num_threads(settings.threads)
    device = choose_device(settings.device)
    model, _ = load_base_model(settings.model, settings.dtype, gguf_file=settings.gguf_file, device=device)
    probe = open_probe(model)
    examples = random_examples(settings, model.config.vocab_size)
    mechanism, basis = fit_mechanism(
        probe,
        settings.model.name,
        examples[:64],
        Reduction(
            kind=settings.kind,
            hidden_size=probe.hidden_size,
            intermediate_size=probe.intermediate_size,
            projection_dimensions=settings.dimensions,
        ),
        BasisSettings(kronecker_shape=(settings.left, settings.dimensions // settings.left)),
        noise_multiplier=8.0,
    )
    public_map = PublicMap(mechanism, basis)
    batch = _TOKENS_PER_BATCH // settings.tokens
    ids = torch.stack([example.input_ids for example in examples])

    def forward() -> None:
        with torch.inference_mode():
            for part in ids.to(device).split(batch):
                model(input_ids=part, use_cache=False)
        synchronise(device)

    def profile() -> None:
        release(
            clipped_profile(probe, examples, public_map, SecureNoise()), public_map.mechanism, SecureNoise()
        )

    forward()
    profile()
    pairs = [(seconds(forward), seconds(profile)) for _ in range(settings.repeats)]
    wall, processor = (
        statistics.median(after[clock] / before[clock] for before, after in pairs) for clock in (0, 1)
    )
    plain, released = (statistics.median(times[i][1] for times in pairs) for i in (0, 1))
    plain_wall, released_wall = (statistics.median(times[i][0] for times in pairs) for i in (0, 1))
    return {
        "forward_cpu_s": plain,
        "profile_cpu_s": released,
        "forward_wall_s": plain_wall,
        "profile_wall_s": released_wall,
        "cpu_ratio": processor,
        "wall_ratio": wall,
    }


def main(settings: Settings) -> None:
    """Time both and print a Markdown row."""
    found = compare(settings)
    print(
        "| model | dtype | threads | reduction | supervised | forward CPU s | profile CPU s | "
        "ratio CPU | ratio wall |"
    )
    print(
        f"| {settings.model.name} | {settings.dtype} | {settings.threads} | {settings.kind} "
        f"{settings.dimensions} | {settings.answer_tokens}/{settings.tokens} | "
        f"{found['forward_cpu_s']:.2f} | {found['profile_cpu_s']:.2f} | {found['cpu_ratio']:.2f} | "
        f"{found['wall_ratio']:.2f} |"
    )


if __name__ == "__main__":
    main(tyro.cli(Settings))
