"""Weighted sums of CKKS ciphertexts at the server, in numpy.

A ciphertext (c0, c1) decrypts to c0 + c1·s, which is linear, like the transform between coefficients and
evaluation points. So Σ_j W_ij·(c0_j, c1_j) modulo q, taken word by word with integer weights, is a ciphertext
of the weighted sum, without any key. Bytes from the network only become numpy words that are compared with q.
"""

import numpy as np
from numpy.typing import NDArray

from fedmosaic.privacy.encryption.aggregator import Aggregator, Combination, Contribution
from fedmosaic.privacy.encryption.ckks import modular
from fedmosaic.privacy.encryption.ckks.modular import (
    SEED_BYTES,
    WORD_BYTES,
    expand_seed,
    pack_words,
    unpack_words,
)
from fedmosaic.privacy.encryption.parameters import CkksParameters
from fedmosaic.privacy.encryption.records import HEADER_BYTES, RoundContext, ring_blocks
from fedmosaic.protos.errors import CiphertextError

# Bounds the memory for the words of all contributors, whatever the length of the vector.
_BLOCKS_AT_ONCE = 4


class CkksAggregator(Aggregator[CkksParameters]):
    """Server side of the back end `ckks`."""

    def _check_payload(self, contribution: Contribution, context: RoundContext) -> None:
        count = ring_blocks(self.parameters, context.dimensions) * self.parameters.ring_degree
        self._read_first(contribution, 0, np.empty(count, dtype=np.uint64))

    def _combine(self, work: Combination) -> list[memoryview]:
        count = ring_blocks(self.parameters, work.context.dimensions) * self.parameters.ring_degree
        header_size, half_size = HEADER_BYTES // 8, count * WORD_BYTES // 8
        records = np.empty((len(work.rows), header_size + 2 * half_size), dtype="<u8")
        records[:, :header_size] = np.frombuffer(b"".join(work.headers), dtype="<u8").reshape(
            len(work.rows), -1
        )
        step = _BLOCKS_AT_ONCE * self.parameters.ring_degree
        residues = np.empty((len(work.contributions), min(step, count)), dtype=np.uint64)
        for start in range(0, count, step):
            now = residues[:, : min(step, count - start)]
            for half, read in enumerate((self._read_first, self._read_second)):
                for contribution, words in zip(work.contributions, now, strict=True):
                    read(contribution, start, words)
                sums = modular.modular_matrix_product(work.weights, now, self.parameters.modulus)
                offset = header_size + half * half_size + start * WORD_BYTES // 8
                pack_words(sums, records[:, offset : offset + now.shape[1] * WORD_BYTES // 8])
        return [record.data.cast("B").toreadonly() for record in records]

    def _read_first(self, contribution: Contribution, start: int, words: NDArray[np.uint64]) -> None:
        unpack_words(contribution.payload, SEED_BYTES + start * WORD_BYTES, words)
        if int(words.max()) >= self.parameters.modulus:
            raise CiphertextError(f"upload of {contribution.client!r} holds residues not below the modulus")

    def _read_second(self, contribution: Contribution, start: int, words: NDArray[np.uint64]) -> None:
        expand_seed(bytes(contribution.payload[:SEED_BYTES]), start, words, self.parameters.modulus)
