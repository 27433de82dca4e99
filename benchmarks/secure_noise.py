"""Time the cryptographically secure Gaussian noise against torch's and numpy's generators.

    python -m benchmarks.secure_noise

Sizes are those of a task profile (256) and of the shared adapter at rank 16, 32 and 128. Minimum of the
repetitions, one thread, as a Markdown table.
"""

import timeit
from collections.abc import Callable

import numpy as np
import torch

from fedmosaic.privacy.mechanism.noise import SecureNoise

SIZES = (256, 7_616, 29_568, 462_336)
REPETITIONS = 7


def milliseconds(draw: Callable[[], object]) -> float:
    """Minimum over the repetitions of the time of one draw."""
    timer = timeit.Timer(draw)
    number, _ = timer.autorange()
    return 1e3 * min(timer.repeat(REPETITIONS, number)) / number


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    generator, secure = np.random.default_rng(0), SecureNoise()
    print("| values | secure | numpy | torch |\n| --- | --- | --- | --- |")
    for size in SIZES:
        draws: tuple[Callable[[], object], ...] = (
            lambda size=size: secure.gaussian(size, 1.0),  # type: ignore[misc]  # default binds the size
            lambda size=size: generator.normal(0.0, 1.0, size),  # type: ignore[misc]  # default binds the size
            lambda size=size: torch.normal(0.0, 1.0, (size,)),  # type: ignore[misc]  # default binds the size
        )
        print(f"| {size:,} | " + " | ".join(f"{milliseconds(draw):.3f} ms" for draw in draws) + " |")


if __name__ == "__main__":
    main()
