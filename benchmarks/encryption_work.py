"""The work that every system of the encryption benchmark does, and how it is timed."""

import ctypes
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmosaic.privacy.policy import cap_weights, integer_weights, spread_weights
from fedmosaic.protos.messages import WeightRow

MODULES, BLOCKS = 7, 4


@dataclass(frozen=True)
class Timing:
    """Seconds of processor time of the fastest and of the median repetition of one operation."""

    least: float
    median: float

    def __add__(self, other: "Timing") -> "Timing":
        return Timing(self.least + other.least, self.median + other.median)

    def scaled(self, factor: float) -> "Timing":
        """Extrapolate to `factor` times the work."""
        return Timing(self.least * factor, self.median * factor)


NOTHING = Timing(0.0, 0.0)


def keep_memory() -> None:
    """Let the C library keep memory that is freed.

    Left to itself, glibc keeps it or hands it back depending on what the process allocated before, and fresh
    pages can cost more than the arithmetic on them. Other C libraries are left as they are.
    """
    if _GLIBC is not None:
        _GLIBC.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
        _GLIBC.mallopt(_MAPPING_THRESHOLD, 1 << 30)


_TRIM_THRESHOLD, _MAPPING_THRESHOLD = -1, -3
_GLIBC = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


@dataclass(frozen=True)
class Cell:
    """What one system took for one rank and number of members.

    Attributes:
        system: Name.
        rank: Rank of the adapter.
        members: N; each is contributor and recipient.
        dimensions: d.
        encrypt: One client, one upload.
        upload_bytes: One upload.
        ingest: Server, all N uploads, from bytes to checked operands.
        arithmetic: Server, the N weighted sums alone.
        server: Server, from N uploads in bytes to N aggregates in bytes, ingest included; memory kept.
        server_fresh: The same after all free memory was handed back; None where it was not measured.
        download_bytes: One aggregate.
        decrypt: One client, one aggregate.
        error: Largest absolute difference to the same weights applied in float64.
        note: What was extrapolated or differs.
    """

    system: str
    rank: int
    members: int
    dimensions: int
    encrypt: Timing
    upload_bytes: int
    ingest: Timing
    arithmetic: Timing
    server: Timing
    download_bytes: int
    decrypt: Timing
    error: float
    note: str = ""
    server_fresh: Timing | None = None


@dataclass(frozen=True)
class Work:
    """Adapters and weights of one cell.

    (N, d) float64 adapters of N client ids at a rank; (N, N) real weights, zero on the diagonal, rows sum to
    1, capped at one half; and the seconds to spend on repetitions of one operation.
    """

    rank: int
    names: tuple[str, ...]
    vectors: NDArray[np.float64]
    shares: NDArray[np.float64]
    budget: float

    @property
    def members(self) -> int:
        """Number N of members."""
        return len(self.names)

    @property
    def dimensions(self) -> int:
        """Number d of values in an adapter."""
        return int(self.vectors.shape[1])

    @property
    def size(self) -> tuple[int, int, int]:
        """Rank, members and dimensions."""
        return self.rank, self.members, self.dimensions

    def rows(self, bits: int) -> dict[str, WeightRow]:
        """Return the integer rows of all recipients at a precision."""
        result = {}
        for index, recipient in enumerate(self.names):
            others = [i for i in range(self.members) if i != index]
            weights = tuple(integer_weights(self.shares[index, others], bits).tolist())
            result[recipient] = WeightRow(tuple(self.names[i] for i in others), weights, bits)
        return result

    def measure_fresh(self, operation: Callable[[], object]) -> Timing:
        """Time an operation as `measure` does, each time after all free memory was handed back."""
        hand_back = (lambda: None) if _GLIBC is None else (lambda: _GLIBC.malloc_trim(0))
        return self.measure(operation, 2, before=hand_back)

    def measure(
        self,
        operation: Callable[[], object],
        least_repetitions: int = 3,
        before: Callable[[], object] = lambda: None,
    ) -> Timing:
        """Time an operation, after one run that does not count, until the budget is spent."""
        operation()
        seconds: list[float] = []
        started = time.perf_counter()
        while len(seconds) < least_repetitions or (
            len(seconds) < 200 and time.perf_counter() - started < self.budget
        ):
            before()
            begun = time.process_time()
            operation()
            seconds.append(time.process_time() - begun)
        return Timing(min(seconds), statistics.median(seconds))


def make_work(rank: int, members: int, budget: float) -> Work:
    """Draw adapters N(0, 0.02²) and softmax weights of standard normal scores, as in a trained federation."""
    generator = np.random.default_rng(rank * 1000 + members)
    dimensions = BLOCKS * MODULES * (rank**2 + rank)
    vectors = generator.normal(size=(members, dimensions)) * 0.02
    shares = np.exp(generator.normal(size=(members, members)))
    np.fill_diagonal(shares, 0.0)
    shares = np.array([spread_weights(cap_weights(row.tolist(), 0.5), 0.36, 8) for row in shares])
    names = tuple(f"client-{index:03d}" for index in range(members))
    return Work(rank, names, vectors, shares, budget)
