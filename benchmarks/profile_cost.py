"""Time a task profile against one plain forward pass over the same examples.

    python -m benchmarks.profile_cost --model DIRECTORY [--dtype bfloat16]

The forward pass goes in batches, the profile example by example as its guarantee wants. The plain pass
computes logits at every position, as a forward pass with labels does; the profile computes them, and their
way back through the head, where a label stands.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmarks.timing import Summary, paired, random_examples, table
from fedmosaic.client.model.hardware import choose_device, synchronise
from fedmosaic.client.model.load import load_base_model
from fedmosaic.client.profile.basis import BasisSettings, fit_mechanism
from fedmosaic.client.profile.maker import clipped_profile
from fedmosaic.client.profile.probe import open_probe
from fedmosaic.privacy.mechanism.noise import SecureNoise
from fedmosaic.privacy.mechanism.profile import Reduction, release
from fedmosaic.privacy.mechanism.projection import PublicMap

_TOKENS_PER_BATCH = 4096
"""Of the plain forward pass."""
_DIMENSIONS, _LEFT = 128, 4


@dataclass(frozen=True)
class Settings:
    """What to time."""

    model: Path
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    examples: int = 512
    tokens: int = 64
    """Tokens per example."""
    answer_tokens: int = 24
    """How many of them are supervised."""
    repeats: int = 5
    threads: int = 1
    """Threads of the matrix products. One, as several clients on one machine have; single examples make small
    matrices, which gain less from a second thread than a batch does."""


def compare(settings: Settings) -> dict[str, Summary]:
    """Time both."""
    torch.set_num_threads(settings.threads)
    device = choose_device(settings.device)
    model, _ = load_base_model(settings.model, settings.dtype, device=device)
    probe = open_probe(model)
    examples = random_examples(
        model.config.vocab_size, settings.examples, settings.tokens, settings.answer_tokens
    )
    reduction = Reduction(
        kind="kronecker",
        hidden_size=probe.hidden_size,
        intermediate_size=probe.intermediate_size,
        projection_dimensions=_DIMENSIONS,
    )
    basis_settings = BasisSettings(kronecker_shape=(_LEFT, _DIMENSIONS // _LEFT))
    name = settings.model.name
    mechanism, basis = fit_mechanism(
        probe, name, examples[:64], reduction, basis_settings, noise_multiplier=8.0
    )
    public_map = PublicMap(mechanism, basis)
    ids = torch.stack([example.input_ids for example in examples]).to(device)

    def forward() -> None:
        with torch.inference_mode():
            for part in ids.split(_TOKENS_PER_BATCH // settings.tokens):
                model(input_ids=part, use_cache=False)
        synchronise(device)

    def profile() -> None:
        release(
            clipped_profile(probe, examples, public_map, SecureNoise()), public_map.mechanism, SecureNoise()
        )

    steps = {"forward pass": forward, "profile": profile}
    return paired({each: partial(nullcontext, step) for each, step in steps.items()}, settings.repeats)


if __name__ == "__main__":
    chosen = tyro.cli(Settings)
    print(table(f"{chosen.model.name}, {chosen.dtype}", compare(chosen)))
