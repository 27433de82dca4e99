"""Similarity and weight rows of a round as one file: N² numbers, written once, and only where they are new.

What is kept of a round itself names the round whose file holds; see `fedmosaic.server.summary.with_rounds`.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedmosaic.protos.errors import StateError
from fedmosaic.protos.messages import WeightRow
from fedmosaic.server.round.relevance import FloatArray

Rows = Mapping[str, Mapping[str, WeightRow]]
"""Weight rows by label of the vector and recipient."""


def pack(clients: Sequence[str], similarity_NN: FloatArray, rows: Rows, bits: int) -> memoryview:
    """(N, N) similarity, NaN where nothing is known, and rows over these N clients, in numpy's own format."""
    column = {client: index for index, client in enumerate(clients)}
    arrays: dict[str, Any] = {"clients": np.array(clients), "bits": np.uint32(bits)}
    for label, found in rows.items():
        table = np.zeros((len(found), len(clients)), dtype="<u4")
        for values, row in zip(table, found.values(), strict=True):
            values[[column[client] for client in row.contributors]] = row.weights
        arrays[f"recipients {label}"] = np.array([column[client] for client in found], dtype="<u4")
        arrays[f"weights {label}"] = table
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, similarity=similarity_NN.astype("<f4"), **arrays)
    return content.getbuffer()


def unpack(content: bytes | memoryview, where: object) -> tuple[list[str], FloatArray, Rows]:
    """Clients, (N, N) similarity and rows; StateError, which names `where` they came from, if damaged."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        clients, bits = [str(name) for name in arrays["clients"]], int(arrays["bits"])
        labels = [name.removeprefix("weights ") for name in arrays if name.startswith("weights ")]
        rows = {
            label: {
                clients[recipient]: _row(clients, values, bits)
                for recipient, values in zip(
                    arrays[f"recipients {label}"], arrays[f"weights {label}"], strict=True
                )
            }
            for label in labels
        }
        return clients, arrays["similarity"].astype(np.float64), rows
    except Exception as error:  # zip, numpy and the messages each have their own
        raise StateError(f"{where} is damaged ({error}); restore a backup of state_dir") from error


def _row(clients: Sequence[str], weights: Any, bits: int) -> WeightRow:
    kept = np.flatnonzero(weights).tolist()
    return WeightRow(tuple(clients[index] for index in kept), tuple(weights[kept].tolist()), bits)


def shares(rows: Rows) -> dict[str, dict[str, dict[str, float]]]:
    """Share of every contributor, by label and recipient."""
    return {
        label: {
            recipient: {c: w / (1 << row.bits) for c, w in zip(row.contributors, row.weights, strict=True)}
            for recipient, row in found.items()
        }
        for label, found in rows.items()
    }


def matrix(values: FloatArray) -> list[list[float | None]]:
    """Rows for JSON, None where nothing is known."""
    return [[round(v, 6) if math.isfinite(v) else None for v in row] for row in values.tolist()]
