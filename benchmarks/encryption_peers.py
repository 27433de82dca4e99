"""Other systems on the same work: plain numpy, TenSEAL as its users use it, Flower's secure aggregation."""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from benchmarks.encryption_work import NOTHING, Cell, Work

# More loaded ciphertexts than these do not fit in memory at rank 128.
_DISTINCT_UPLOADS = 10


def plain_numpy(work: Work, name: str, kind: np.dtype) -> Cell:
    """Measure the floor: arrays from bytes, one matrix product, bytes, no checks at all."""
    uploads = [vector.astype(kind).tobytes() for vector in work.vectors]
    shares = work.shares.astype(kind)

    def ingest() -> np.ndarray:
        return np.stack([np.frombuffer(upload, dtype=kind) for upload in uploads])

    def server() -> list[bytes]:
        return [total.tobytes() for total in shares @ ingest()]

    stacked = ingest()
    found = np.frombuffer(server()[0], dtype=kind)
    return Cell(
        name,
        *work.size,
        work.measure(lambda: work.vectors[0].astype(kind).tobytes()),
        len(uploads[0]),
        work.measure(ingest),
        work.measure(lambda: shares @ stacked),
        work.measure(server),
        len(uploads[0]),
        work.measure(lambda: np.frombuffer(uploads[0], dtype=kind)),
        float(np.abs(found - work.shares[0] @ work.vectors).max()),
        server_fresh=work.measure_fresh(server),
    )


@contextmanager
def _silence() -> Iterator[None]:
    """Hide what TenSEAL prints from C++ for every vector longer than one ciphertext."""
    sys.stdout.flush()
    kept = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        # What C++ has buffered would otherwise appear later.
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for descriptor in (*kept, nowhere):
            os.close(descriptor)


@_silence()
def tenseal_vectors(
    work: Work, name: str, degree: int, moduli: list[int], scale: float, *, rescale: bool
) -> Cell:
    """Measure `CKKSVector`, one vector per adapter, as TenSEAL's users use it."""
    import tenseal

    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS,
        degree,
        coeff_mod_bit_sizes=moduli,
        encryption_type=tenseal.ENCRYPTION_TYPE.SYMMETRIC,
    )
    context.global_scale = scale
    context.auto_rescale = rescale
    distinct = min(work.members, _DISTINCT_UPLOADS)
    uploads = [
        tenseal.ckks_vector(context, vector.tolist()).serialize() for vector in work.vectors[:distinct]
    ]
    operands = [tenseal.ckks_vector_from(context, upload) for upload in uploads]

    def weighted_sum(recipient: int) -> Any:
        # A zero weight makes TenSEAL fail on a context without an encryption key; it is skipped.
        terms = [j for j in range(work.members) if j != recipient]
        total = operands[terms[0] % distinct] * float(work.shares[recipient, terms[0]])
        for j in terms[1:]:
            total += operands[j % distinct] * float(work.shares[recipient, j])
        return total

    # As many recipients as a second or so allows; the others cost the same.
    recipients = max(1, min(work.members, round(4e6 / (work.members * work.dimensions))))
    arithmetic = work.measure(
        lambda: [weighted_sum(i) for i in range(recipients)], 1 if work.rank > 32 else 3
    )
    arithmetic = arithmetic.scaled(work.members / recipients)
    aggregate = weighted_sum(0)
    load = work.measure(lambda: tenseal.ckks_vector_from(context, uploads[0])).scaled(work.members)
    store = work.measure(lambda: aggregate.serialize()).scaled(work.members)
    download = aggregate.serialize()
    found = np.array(tenseal.ckks_vector_from(context, download).decrypt())
    clear = work.shares[0] @ work.vectors[np.arange(work.members) % distinct]
    notes = []
    if recipients < work.members:
        notes.append(f"sums of {recipients} recipients measured, scaled to {work.members}")
    if distinct < work.members:
        notes.append(f"{distinct} distinct uploads")
    return Cell(
        name,
        *work.size,
        work.measure(lambda: tenseal.ckks_vector(context, work.vectors[0].tolist()).serialize()),
        len(uploads[0]),
        load,
        arithmetic,
        load + arithmetic + store,
        len(download),
        work.measure(lambda: tenseal.ckks_vector_from(context, download).decrypt()),
        float(np.abs(found - clear).max()),
        "; ".join(notes),
    )


def flower_masking(work: Work) -> Cell | None:
    """Measure Flower's SecAgg+ arithmetic, if Flower is installed.

    SecAgg+ forms one sum that the server reads. For N recipients a client masks N scaled vectors and the
    server adds and unmasks N times. Key agreement and secret sharing are left out, in Flower's favour.
    """
    try:
        from flwr.common import ndarray_to_bytes  # type: ignore[import-not-found]  # optional
        from flwr.common.secure_aggregation import quantization  # type: ignore[import-not-found]  # as above
        from flwr.common.secure_aggregation.secaggplus_utils import (  # type: ignore[import-not-found]  # as above
            pseudo_rand_gen,
        )
    except ImportError:
        return None
    modulus, levels, clip = 1 << 32, 1 << 22, 8.0
    shape = [(work.dimensions,)]
    seeds = [os.urandom(32) for _ in range(work.members)]

    def mask(member: int, recipient: int) -> np.ndarray:
        scaled = [work.vectors[member] * work.shares[recipient, member]]
        total = quantization.quantize(scaled, clip, levels)[0]
        total = total + pseudo_rand_gen(seeds[member], modulus, shape)[0]
        for other in range(work.members):
            if other != member:
                sign = 1 if other > member else -1
                pair = bytes(a ^ b for a, b in zip(seeds[member], seeds[other][::-1], strict=True))
                total = total + sign * pseudo_rand_gen(pair, modulus, shape)[0]
        masked_vector: np.ndarray = total % modulus
        return masked_vector

    distinct = min(work.members, _DISTINCT_UPLOADS)
    masked = [mask(member, 0) for member in range(distinct)]

    def unmask() -> np.ndarray:
        total: np.ndarray = masked[0]
        for index in range(1, work.members):
            total = (total + masked[index % distinct]) % modulus
        for seed in seeds:
            total = (total - pseudo_rand_gen(seed, modulus, shape)[0]) % modulus
        return total

    encrypt = work.measure(lambda: mask(0, 0), 1).scaled(work.members)
    server = work.measure(unmask, 1).scaled(work.members)
    return Cell(
        "Flower SecAgg+ masking, once per recipient",
        *work.size,
        encrypt,
        len(ndarray_to_bytes(masked[0])) * work.members,
        NOTHING,
        server,
        server,
        4 * work.dimensions,
        NOTHING,
        clip / levels * work.members,
        "one recipient measured, scaled to all; full mask graph; the server reads every aggregate; "
        "error is its quantisation bound",
    )


PEERS: tuple[Callable[[Work], Cell | None], ...] = (
    partial(plain_numpy, name="plain numpy (float32)", kind=np.dtype("<f4")),
    # The precision that `mask` and `ckks` compute in.
    partial(plain_numpy, name="plain numpy (float64)", kind=np.dtype("<f8")),
    partial(
        tenseal_vectors, name="TenSEAL 8192 [60,40,40] (NVFlare's)", degree=8192, moduli=[60, 40, 40],
        scale=2.0**40, rescale=True,
    ),
    # The smallest and fastest whose error stays near 1e-5.
    partial(
        tenseal_vectors, name="TenSEAL 4096 [54,55], no rescaling", degree=4096, moduli=[54, 55],
        scale=2.0**25, rescale=False,
    ),
    flower_masking,
)  # fmt: skip
