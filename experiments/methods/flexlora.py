"""FlexLoRA: ranks differ; products averaged and cut by singular values."""

from collections.abc import Mapping

import numpy as np

from fedmosaic.experiments.methods.fedavg import FedAvg
from fedmosaic.experiments.methods.lora import Vector
from fedmosaic.experiments.methods.matrices import Matrices, pack, pad, unpack
from fedmosaic.experiments.methods.strategy import ServerSide


class FlexLora(FedAvg):
    """Products B·A are averaged; all get the best of their rank (Bai et al. 2024, arXiv 2402.11505)."""

    ranks_differ = True

    def combine(self, uploads: Mapping[str, Vector], server: ServerSide) -> Mapping[str, Vector]:
        """Truncated singular value decomposition of the uniform mean, its root on either side."""
        names = sorted(uploads)
        parts = {name: unpack(uploads[name], server, name) for name in names}
        results: dict[str, Matrices] = {name: [] for name in names}
        for m in range(len(parts[names[0]])):
            # Σ B_k A_k / N = [B_1 … B_N] [A_1; …; A_N] / N: a product of thin matrices, never formed.
            left = np.concatenate([parts[name][m][1] for name in names], axis=1).astype(np.float64)
            right = np.concatenate([parts[name][m][0] for name in names], axis=0).astype(np.float64)
            q_left, r_left = np.linalg.qr(left)
            q_right, r_right = np.linalg.qr(right.T)
            u, values, vt = np.linalg.svd(r_left @ r_right.T / len(names))
            count = min(len(values), *u.shape, *vt.shape)
            root = np.sqrt(values[:count])
            b = (q_left @ u[:, :count]) * root
            a = root[:, None] * (vt[:count] @ q_right.T)
            for name in names:
                results[name].append(
                    pad((a[: server.ranks[name]], b[:, : server.ranks[name]]), server.ranks[name])
                )
        return {name: pack(results[name]) for name in names}
