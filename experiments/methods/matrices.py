"""A client's LoRA vector as the matrices of its modules, for methods whose clients have different ranks."""

from collections.abc import Sequence

import numpy as np

from fedmosaic.experiments.methods.lora import Vector, factors
from fedmosaic.experiments.methods.strategy import SHARED, ServerSide
from fedmosaic.protos.errors import ModelError

Matrices = list[tuple[np.ndarray, np.ndarray]]
"""(A (r, d_in), B (d_out, r)) of every module."""


def unpack(vector: Vector, server: ServerSide, client: str) -> Matrices:
    """Cut a client's vector into A and B of every module; `ModelError` if it is not of the client's rank."""
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


def pad(pair: tuple[np.ndarray, np.ndarray], rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Fill A and B up with zeros to a rank."""
    a, b = pair
    missing = rank - a.shape[0]
    return np.pad(a, ((0, missing), (0, 0))), np.pad(b, ((0, 0), (0, missing)))
