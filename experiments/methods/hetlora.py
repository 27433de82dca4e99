"""HETLoRA: ranks differ; padded with zeros and weighted by norm."""

from collections.abc import Mapping

import numpy as np

from fedmosaic.experiments.methods.fedavg import FedAvg
from fedmosaic.experiments.methods.lora import Vector
from fedmosaic.experiments.methods.matrices import Matrices, pack, pad, unpack
from fedmosaic.experiments.methods.strategy import ServerSide


class HetLora(FedAvg):
    """Smaller adapters are padded with zeros, and weighted by the norm of what they add.

    Every client receives the first of the rows and columns. Reference: Cho et al. (2024), arXiv 2401.06432,
    without its pruning of ranks while training.
    """

    ranks_differ = True

    def combine(self, uploads: Mapping[str, Vector], server: ServerSide) -> Mapping[str, Vector]:
        """Weights are ‖BA‖ over all modules, normalised over the clients; uniform while all are zero."""
        names = sorted(uploads)
        parts = {name: unpack(uploads[name], server, name) for name in names}
        norms = np.array([np.sqrt(sum(_squared_norm(a, b) for a, b in parts[name])) for name in names])
        weights = norms / norms.sum() if norms.sum() > 0 else np.full(len(names), 1 / len(names))
        largest = max(server.ranks[name] for name in names)
        received: dict[str, Matrices] = {name: [] for name in names}
        for module in range(len(parts[names[0]])):
            padded = [pad(parts[name][module], largest) for name in names]
            a, b = (np.tensordot(weights, np.stack(side), axes=1) for side in zip(*padded, strict=True))
            for name in names:
                rank = server.ranks[name]
                received[name].append((a[:rank], b[:, :rank]))
        return {name: pack(matrices) for name, matrices in received.items()}


def _squared_norm(a: np.ndarray, b: np.ndarray) -> float:
    """‖BA‖² from the small Gram matrices: tr((BᵀB)(AAᵀ))."""
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    return float(max(0.0, np.sum((wide_b.T @ wide_b) * (wide_a @ wide_a.T))))
