"""Back end `mask`, server side: weighted sums of 32-bit words, exact, at the speed of BLAS."""

import itertools
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmosaic.privacy.encryption.aggregator import Aggregator, Combination, Contribution
from fedmosaic.privacy.encryption.parameters import MaskParameters
from fedmosaic.privacy.encryption.records import RoundContext
from fedmosaic.privacy.policy import AggregationPolicy
from fedmosaic.protos.errors import EncryptionError

# Doubles in one buffer of a product: two of them stay in the third-level cache.
_BUFFER = 400_000
# numpy asks Linux for large pages from 4 MiB on; what is not written to takes no memory.
_LARGE_PAGES = 1 << 20
# 1.5·2^52: the integers of a float64 of this size have their low 32 bits in two's complement.
_INTEGER_OFFSET = 1.5 * 2.0**52


class MaskAggregator(Aggregator[MaskParameters]):
    """Server side of the back end `mask`."""

    def __init__(self, parameters: MaskParameters, policy: AggregationPolicy) -> None:
        super().__init__(parameters, policy)
        self._product = WordProduct()

    def _check_payload(self, contribution: Contribution, context: RoundContext) -> None:
        """Every word of the right length is a valid one."""

    def _combine(self, work: Combination) -> list[memoryview]:
        nonce = {item.client: item.nonce for item in work.contributions}
        prefixes = [
            b"".join([header, *map(nonce.__getitem__, row.contributors)])
            for header, row in zip(work.headers, work.rows, strict=True)
        ]
        ends = [*itertools.accumulate(len(prefix) // 4 + work.context.dimensions for prefix in prefixes)]
        memory = np.empty(max(ends[-1], _LARGE_PAGES), dtype="<u4")
        records = [memory[start:end] for start, end in itertools.pairwise([0, *ends])]
        for prefix, record in zip(prefixes, records, strict=True):
            record[: len(prefix) // 4] = np.frombuffer(prefix, dtype="<u4")
        words = [np.frombuffer(item.payload, dtype="<i4") for item in work.contributions]
        self._product(work.weights, words, [record[-work.context.dimensions :] for record in records])
        return [record.data.cast("B").toreadonly() for record in records]


class WordProduct:
    """Multiplies matrices of small integers with 32-bit words, modulo 2**32, exactly.

    Words are read as signed, below 2^31 in size; rows of W sum to at most 2^20. So every partial sum is an
    integer below 2^51 in size, and together with the offset 1.5·2^52 still below 2^53: float64 represents all
    of them exactly, whatever the order of summation or fusion of operations. The offset, a column of the
    product of its own, puts a sum's low 32 bits in the low half of the float64's representation.

    Keeps its working memory, about 6 MB: fresh memory costs more than the arithmetic. Calls from several
    threads wait for each other.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._memory = np.empty((2, 0))

    def __call__(
        self,
        weights: NDArray[np.int64],
        words: Sequence[NDArray[np.int32]],
        sums: Sequence[NDArray[np.uint32]],
    ) -> None:
        """Write weights · words modulo 2**32 to `sums`; EncryptionError where bounds would make them inexact.

        (R, M) integers ≥ 0, each row summing to at most 2**20; M ≥ 1 vectors (D,) of int32, a word above
        2**31 − 1 being its two's complement; R vectors (D,), overwritten.
        """
        if weights.size and (int(weights.min()) < 0 or int(weights.sum(axis=1).max()) > 1 << 20):
            raise EncryptionError("weights must be ≥ 0 with rows that sum to at most 2^20")
        recipients, contributors = weights.shape
        columns = words[0].size
        width = _balanced(columns, max(256, _BUFFER // max(recipients, contributors + 1)))
        factors = np.empty((recipients, contributors + 1))
        factors[:, :-1], factors[:, -1] = weights, _INTEGER_OFFSET
        with self._lock:
            operand, product = self._reserve((contributors + 1, width), (recipients, width))
            operand[-1] = 1.0
            representation = product.view(np.uint64)
            for start in range(0, columns, width):
                now = slice(start, min(start + width, columns))
                size = now.stop - start
                for row, word in zip(operand, words, strict=False):
                    row[:size] = word[now]
                np.matmul(factors, operand[:, :size], out=product[:, :size])
                for target, row in zip(sums, representation, strict=True):
                    # The cast keeps the low 32 bits.
                    np.copyto(target[now], row[:size], casting="unsafe")

    def _reserve(self, *shapes: tuple[int, int]) -> list[NDArray[np.float64]]:
        sizes = [height * width for height, width in shapes]
        if max(sizes) > self._memory.shape[1]:
            self._memory = np.empty((2, max(sizes)))
        parts = zip(self._memory, sizes, shapes, strict=True)
        return [part[:size].reshape(shape) for part, size, shape in parts]


def _balanced(columns: int, most: int) -> int:
    """Return a width ≤ most that splits the columns into parts of about one size."""
    return -(-columns // -(-columns // most))
