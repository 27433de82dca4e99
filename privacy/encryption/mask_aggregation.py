"""Back end `mask`, server side: weighted sums of 32-bit words, exact, at the speed of BLAS."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmosaic.privacy.encryption.aggregator import Aggregator, Contribution
from fedmosaic.privacy.encryption.parameters import MaskParameters
from fedmosaic.privacy.encryption.records import RoundContext
from fedmosaic.privacy.policy import WeightRow
from fedmosaic.protos.errors import EncryptionError

# Doubles in one buffer: fresh memory costs more than the arithmetic when it is large.
_BUFFER = 1 << 16


class MaskAggregator(Aggregator[MaskParameters]):
    """Server side of the back end `mask`."""

    def _check_payload(self, contribution: Contribution, context: RoundContext) -> None:
        """Every word of the right length is a valid one."""

    def _combine(
        self,
        contributions: Sequence[Contribution],
        weights: NDArray[np.int64],
        rows: Sequence[WeightRow],
        headers: Sequence[bytes],
        context: RoundContext,
    ) -> list[bytes]:
        words = [np.frombuffer(item.payload, dtype="<u4") for item in contributions]
        sums = word_matrix_product(weights, words)
        nonces = np.array([np.frombuffer(item.nonce, dtype=np.uint8) for item in contributions])
        column = {item.client: index for index, item in enumerate(contributions)}
        return [
            b"".join([header, nonces[list(map(column.__getitem__, row.contributors))].data, total.data])
            for header, row, total in zip(headers, rows, sums, strict=True)
        ]


def word_matrix_product(
    weights: NDArray[np.int64], words: Sequence[NDArray[np.uint32]]
) -> NDArray[np.uint32]:
    """Multiply a matrix of small integers with 32-bit words, modulo 2**32, exactly.

    Rows of W sum to at most 2^20 and words are below 2^32, so every partial sum is an integer below 2^52.
    Added to 2^52, such a sum stands unrounded in the low bits of the float64's own representation, whose low
    half is the sum modulo 2^32.

    Args:
        weights: (R, M) integers ≥ 0, each row summing to at most 2**20.
        words: M vectors (D,) of uint32.

    Returns:
        (R, D) uint32.
    """
    if weights.size and (int(weights.min()) < 0 or int(weights.sum(axis=1).max()) > 1 << 20):
        raise EncryptionError("weights must be ≥ 0 with rows that sum to at most 2^20")
    columns = words[0].size
    width = min(columns, max(256, _BUFFER // max(weights.shape)))
    operand = np.empty((len(words), width))
    sums = np.empty((weights.shape[0], width))
    representation = sums.view(np.uint64)
    factors = weights.astype(np.float64)
    result = np.empty((weights.shape[0], columns), dtype="<u4")
    for start in range(0, columns, width):
        size = min(width, columns - start)
        for row, word in zip(operand, words, strict=True):
            row[:size] = word[start : start + size]
        np.matmul(factors, operand[:, :size], out=sums[:, :size])
        sums[:, :size] += 2.0**52
        np.copyto(result[:, start : start + size], representation[:, :size], casting="unsafe")
    return result
