"""The work of the encryption benchmark, and other systems on it: plain numpy, TenSEAL as its users use it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.timing import Timing, measure
from fedmosaic.privacy.policy import cap_weights, integer_weights, spread_weights
from fedmosaic.protos.messages import WeightRow

MODULES, BLOCKS = 7, 4
_DISTINCT_UPLOADS = 10
"""More loaded ciphertexts than these do not fit in memory at rank 128."""


@dataclass(frozen=True)
class Cell:
    """What one system took for one rank and number of members.

    Attributes:
        system: name.
        rank: of the adapter.
        members: N; each is contributor and recipient.
        dimensions: d.
        encrypt: one client, one upload.
        upload_bytes: one upload.
        server: from N uploads in bytes to N aggregates in bytes.
        download_bytes: one aggregate.
        decrypt: one client, one aggregate.
        error: largest absolute difference to the same weights applied in float64.
        note: what was extrapolated.
    """

    system: str
    rank: int
    members: int
    dimensions: int
    encrypt: Timing
    upload_bytes: int
    server: Timing
    download_bytes: int
    decrypt: Timing
    error: float
    note: str = ""


@dataclass(frozen=True)
class Work:
    """Adapters and weights of one cell.

    (N, d) float64 adapters of N client ids at a rank; (N, N) real weights, zero on the diagonal, rows sum to
    1, capped at one half.
    """

    rank: int
    names: tuple[str, ...]
    vectors: NDArray[np.float64]
    shares: NDArray[np.float64]

    @property
    def size(self) -> tuple[int, int, int]:
        """Rank, members N and dimensions d."""
        return self.rank, len(self.names), int(self.vectors.shape[1])

    def rows(self, bits: int) -> dict[str, WeightRow]:
        """Return the integer rows of all recipients at a precision."""
        result = {}
        for recipient, shares in zip(self.names, self.shares, strict=True):
            others = [index for index, name in enumerate(self.names) if name != recipient]
            weights = tuple(integer_weights(shares[others], bits).tolist())
            result[recipient] = WeightRow(tuple(self.names[i] for i in others), weights, bits)
        return result

    def measure(self, operation: Callable[[], object], repetitions: int = 3) -> Timing:
        """Time an operation for a second."""
        return measure(operation, repetitions, budget=1.0)


def make_work(rank: int, members: int) -> Work:
    """Draw adapters N(0, 0.02²) and softmax weights of standard normal scores, as in a trained federation."""
    generator = np.random.default_rng(rank * 1000 + members)
    dimensions = BLOCKS * MODULES * (rank**2 + rank)
    vectors = generator.normal(size=(members, dimensions)) * 0.02
    shares = np.exp(generator.normal(size=(members, members)))
    np.fill_diagonal(shares, 0.0)
    shares = np.array([spread_weights(cap_weights(row.tolist(), 0.5), 0.36, 8) for row in shares])
    return Work(rank, tuple(f"client-{index:03d}" for index in range(members)), vectors, shares)


def plain_numpy(work: Work, name: str, kind: np.dtype) -> Cell:
    """Measure the floor: arrays from bytes, one matrix product, bytes, no checks at all."""
    uploads = [vector.astype(kind).tobytes() for vector in work.vectors]
    shares = work.shares.astype(kind)

    def server() -> list[bytes]:
        stacked = np.stack([np.frombuffer(upload, dtype=kind) for upload in uploads])
        return [total.tobytes() for total in shares @ stacked]

    found = np.frombuffer(server()[0], dtype=kind)
    return Cell(
        name,
        *work.size,
        work.measure(lambda: work.vectors[0].astype(kind).tobytes()),
        len(uploads[0]),
        work.measure(server),
        len(uploads[0]),
        work.measure(lambda: np.frombuffer(uploads[0], dtype=kind)),
        float(np.abs(found - work.shares[0] @ work.vectors).max()),
    )


def tenseal_vectors(
    work: Work, name: str, degree: int, moduli: list[int], scale: float, *, rescale: bool
) -> Cell:
    """Measure `CKKSVector`, one vector per adapter, as its users do; TenSEAL prints a warning for each."""
    import tenseal

    symmetric = tenseal.ENCRYPTION_TYPE.SYMMETRIC
    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS, degree, coeff_mod_bit_sizes=moduli, encryption_type=symmetric
    )
    context.global_scale = scale
    context.auto_rescale = rescale
    rank, members, dimensions = work.size
    distinct = min(members, _DISTINCT_UPLOADS)
    uploads = [
        tenseal.ckks_vector(context, vector.tolist()).serialize() for vector in work.vectors[:distinct]
    ]
    operands = [tenseal.ckks_vector_from(context, upload) for upload in uploads]

    def weighted_sum(recipient: int) -> Any:
        # A zero weight makes TenSEAL fail on a context without an encryption key; it is skipped.
        terms = [j for j in range(members) if j != recipient]
        total = operands[terms[0] % distinct] * float(work.shares[recipient, terms[0]])
        for j in terms[1:]:
            total += operands[j % distinct] * float(work.shares[recipient, j])
        return total

    # As many recipients as a second or so allows; the others cost the same.
    recipients = max(1, min(members, round(4e6 / (members * dimensions))))
    aggregate = weighted_sum(0)
    download = aggregate.serialize()
    parts = (
        work.measure(lambda: tenseal.ckks_vector_from(context, uploads[0])).scaled(members),
        work.measure(lambda: [weighted_sum(i) for i in range(recipients)], 1 if rank > 32 else 3).scaled(
            members / recipients
        ),
        work.measure(lambda: aggregate.serialize()).scaled(members),
    )
    found = np.array(tenseal.ckks_vector_from(context, download).decrypt())
    clear = work.shares[0] @ work.vectors[np.arange(members) % distinct]
    notes = []
    if recipients < members:
        notes.append(f"sums of {recipients} recipients measured, scaled to {members}")
    if distinct < members:
        notes.append(f"{distinct} distinct uploads")
    return Cell(
        name,
        *work.size,
        work.measure(lambda: tenseal.ckks_vector(context, work.vectors[0].tolist()).serialize()),
        len(uploads[0]),
        Timing(sum(part.least for part in parts), sum(part.median for part in parts)),
        len(download),
        work.measure(lambda: tenseal.ckks_vector_from(context, download).decrypt()),
        float(np.abs(found - clear).max()),
        "; ".join(notes),
    )


PEERS: tuple[Callable[[Work], Cell], ...] = (
    partial(plain_numpy, name="plain numpy (float32)", kind=np.dtype("<f4")),
    # The precision that `mask` and `ckks` compute in.
    partial(plain_numpy, name="plain numpy (float64)", kind=np.dtype("<f8")),
    partial(
        tenseal_vectors,
        name="TenSEAL 8192 [60,40,40] (NVFlare's)",
        degree=8192,
        moduli=[60, 40, 40],
        scale=2.0**40,
        rescale=True,
    ),
    # The smallest and fastest whose error stays near 1e-5.
    partial(
        tenseal_vectors,
        name="TenSEAL 4096 [54,55], no rescaling",
        degree=4096,
        moduli=[54, 55],
        scale=2.0**25,
        rescale=False,
    ),
)
