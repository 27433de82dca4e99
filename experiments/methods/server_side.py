"""Baselines whose server does more than average: other ranks, or distillation on public examples."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedmosaic.client.model.examples import IGNORED
from fedmosaic.client.model.loss import Batch, ExampleLosses
from fedmosaic.client.model.training import train_local
from fedmosaic.experiments.methods.lora import Vector, factors, read_adapter, using, write_adapter
from fedmosaic.experiments.methods.strategies import (
    DISTILLATION_TEMPERATURE,
    PERSONAL,
    SHARED,
    Ditto,
    FedAvg,
    ServerSide,
    answer_logits,
    check_uploads,
)
from fedmosaic.protos.errors import ModelError

TEACHER = "teacher"

Matrices = list[tuple[np.ndarray, np.ndarray]]
"""(A (r, d_in), B (d_out, r)) of every module."""


class HetLora(FedAvg):
    """Ranks differ: smaller adapters are padded with zeros, and weighted by the norm of what they add.

    Every client receives the first of the rows and columns. The original's pruning of ranks while training
    is in `fedmosaic.experiments.methods.pruning`.

    Reference: Cho et al. (2024), arXiv 2401.06432.
    """

    def combine(self, uploads: Mapping[str, Vector], server: ServerSide) -> Mapping[str, Vector]:
        """Weights are ‖BA‖ over all modules, normalised over the clients; uniform while all are zero."""
        check_uploads(uploads)
        names = sorted(uploads)
        parts = {name: unpack(uploads[name], server, name) for name in names}
        norms = np.array([np.sqrt(sum(_squared_norm(a, b) for a, b in parts[name])) for name in names])
        weights = norms / norms.sum() if norms.sum() > 0 else np.full(len(names), 1 / len(names))
        largest = max(server.ranks[name] for name in names)
        padded = [
            sum(w * _pad(parts[name][m], largest)[0] for w, name in zip(weights, names, strict=True))
            for m in range(len(parts[names[0]]))
        ]
        ups = [
            sum(w * _pad(parts[name][m], largest)[1] for w, name in zip(weights, names, strict=True))
            for m in range(len(parts[names[0]]))
        ]
        return {
            name: pack(
                [
                    (a[: server.ranks[name]], b[:, : server.ranks[name]])
                    for a, b in zip(padded, ups, strict=True)
                ]
            )
            for name in names
        }


class FlexLora(FedAvg):
    """Ranks differ: the products B·A are averaged, and every client gets the best factors of its rank.

    Reference: Bai et al. (2024), arXiv 2402.11505.
    """

    def combine(self, uploads: Mapping[str, Vector], server: ServerSide) -> Mapping[str, Vector]:
        """Truncated singular value decomposition of the uniform mean, its root on either side."""
        check_uploads(uploads)
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
                    _pad((a[: server.ranks[name]], b[:, : server.ranks[name]]), server.ranks[name])
                )
        return {name: pack(results[name]) for name in names}


def unpack(vector: Vector, server: ServerSide, client: str) -> Matrices:
    """Cut a client's vector into A and B of every module, by the shapes of the server's model.

    Raises:
        ModelError: the vector does not have the length of the client's rank.
    """
    rank, start = server.ranks[client], 0
    matrices: Matrices = []
    for down, up in factors(server.model, SHARED):
        d_in, d_out = down.shape[1], up.shape[0]
        a = vector[start : start + rank * d_in].reshape(-1, d_in)
        start += rank * d_in
        b = vector[start : start + rank * d_out].reshape(d_out, -1)
        start += rank * d_out
        matrices.append((a, b))
    if start != len(vector):
        raise ModelError(f"the upload of {client} has {len(vector)} values, rank {rank} gives {start}")
    return matrices


def pack(matrices: Sequence[tuple[np.ndarray, np.ndarray]]) -> Vector:
    """The vector of what `unpack` gave."""
    return np.concatenate([part.reshape(-1) for pair in matrices for part in pair]).astype(np.float32)


def _pad(pair: tuple[np.ndarray, np.ndarray], rank: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = pair
    missing = rank - a.shape[0]
    return np.pad(a, ((0, missing), (0, 0))), np.pad(b, ((0, 0), (0, missing)))


def _squared_norm(a: np.ndarray, b: np.ndarray) -> float:
    """‖BA‖² from the small Gram matrices: tr((BᵀB)(AAᵀ))."""
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    return float(max(0.0, np.sum((wide_b.T @ wide_b) * (wide_a @ wide_a.T))))


class PerAda(Ditto):
    """Ditto's client; the server distils the clients' mean logits on public examples into the average.

    Teachers are the clients of the same architecture, whose vocabulary is the student's.

    Reference: Xie et al. (2024), arXiv 2302.06637.
    """

    adapters: ClassVar[tuple[str, ...]] = (SHARED, PERSONAL, TEACHER)
    steps: ClassVar[int] = 10
    """Optimizer steps of the server in a round."""

    def combine(self, uploads: Mapping[str, Vector], server: ServerSide) -> Mapping[str, Vector]:
        """The mean, then distillation."""
        mean = super().combine(uploads, server)
        write_adapter(server.model, SHARED, next(iter(mean.values())))
        with using(server.model, [SHARED], [SHARED]):
            train_local(
                server.model,
                server.public,
                server.settings.model_copy(update={"steps": self.steps}),
                pad_token_id=server.pad_token_id,
                losses=_from_teachers([uploads[name] for name in sorted(uploads)], server),
            )
        return dict.fromkeys(uploads, read_adapter(server.model, SHARED))


def _from_teachers(uploads: Sequence[Vector], server: ServerSide) -> ExampleLosses:
    def losses(model: nn.Module, batch: Batch) -> torch.Tensor:
        teacher: torch.Tensor | None = None
        with torch.no_grad():
            for vector in uploads:
                write_adapter(server.model, TEACHER, vector)
                with using(server.model, [TEACHER]):
                    logits = answer_logits(server.model, batch) / len(uploads)
                teacher = logits if teacher is None else teacher + logits
        if teacher is None:
            raise ModelError("there is no teacher; every architecture has one client at least")
        student = answer_logits(model, batch)
        labels_BT = batch["labels"][:, 1:]
        mask_BK = labels_BT[:, (labels_BT != IGNORED).any(dim=0)] != IGNORED
        t = DISTILLATION_TEMPERATURE
        soft_BK = functional.kl_div(
            (student / t).log_softmax(-1), (teacher / t).log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        return (soft_BK * mask_BK).sum(dim=1) * t * t / mask_BK.sum(dim=1)

    return losses
