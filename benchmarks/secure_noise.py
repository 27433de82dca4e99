"""Time the cryptographically secure Gaussian noise against torch's and numpy's generators.

    OMP_NUM_THREADS=1 python -m benchmarks.secure_noise

Sizes are those of a task profile (256) and of the shared adapter at rank 16, 32 and 128. Milliseconds of the
processor, the fastest of many draws.
"""

from functools import partial

import numpy as np
import torch

from benchmarks.timing import measure
from fedmosaic.experiments.scenario.metrics import markdown_table
from fedmosaic.privacy.mechanism.noise import SecureNoise

SIZES = (256, 7_616, 29_568, 462_336)


def main() -> None:
    """Print the table."""
    rows = []
    for size in SIZES:
        draws = (
            partial(SecureNoise().gaussian, size, 1.0),
            partial(np.random.default_rng(0).normal, 0.0, 1.0, size),
            partial(torch.normal, 0.0, 1.0, (size,)),
        )
        rows.append([f"{size:,}", *(f"{1e3 * measure(draw, budget=0.5).least:.3f} ms" for draw in draws)])
    print("\n".join(markdown_table(["values", "secure", "numpy", "torch"], rows)))


if __name__ == "__main__":
    main()
