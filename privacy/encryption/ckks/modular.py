"""Residues of a 48-bit prime in numpy: exact arithmetic, their 6-byte form on the wire, and those of a seed.

The second polynomial of a fresh ciphertext is uniform and public, so a client sends a 32-byte seed and the
server expands it. AES-256 in counter mode under the seed as key, rejection sampling for uniformity.

Reference: FrodoKEM (Frodo.Gen using AES) and Kyber's 90s variant expand their public matrices from seeds
in this way; NIST SP 800-38A (CTR).
"""

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedmosaic.protos.errors import EncryptionError

WORD_BYTES = 6
SEED_BYTES = 32
_AES_BLOCK_BYTES = 16
# The first stream starts at counter 0 and is far shorter than 2^127 blocks.
_REPLACEMENT_STREAM = 1 << 127
_HALF_BITS = np.uint64(24)
_HALF_MASK = np.uint64((1 << 24) - 1)
_MAX_ROW_SUM = 1 << 16
# Small enough for the buffers of ten contributors to stay in the second-level cache.
_COLUMNS = 1024


def pack_words(words: NDArray[np.uint64], packed: NDArray[np.uint64]) -> None:
    """Write residues as little-endian words of 6 bytes: four residues into three words of 8 bytes.

    From (R, 4m) uint64 below 2**48 to (R, 3m) little-endian uint64, which may be a part of larger rows.
    """
    fours = words.reshape(words.shape[0], -1, 4)
    # Splitting an axis never copies, so writing to these writes to `packed`.
    threes = packed.reshape(packed.shape[0], -1, 3)
    threes[..., 0] = fours[..., 0] | (fours[..., 1] << np.uint64(48))
    threes[..., 1] = (fours[..., 1] >> np.uint64(16)) | (fours[..., 2] << np.uint64(32))
    threes[..., 2] = (fours[..., 2] >> np.uint64(32)) | (fours[..., 3] << np.uint64(16))


def unpack_words(buffer: bytes | memoryview, offset: int, words: NDArray[np.uint64]) -> None:
    """Read (m,) words of 6 bytes, little-endian; the buffer has at least two bytes before them."""
    # Reading 8 bytes from two before each word leaves the word in the upper 48 bits.
    shifted = np.ndarray(words.shape, dtype="<u8", buffer=buffer, offset=offset - 2, strides=(WORD_BYTES,))
    np.right_shift(shifted, np.uint64(16), out=words)


def modular_multiply(left: NDArray[np.uint64], right: NDArray[np.uint64], modulus: int) -> NDArray[np.uint64]:
    """Multiply (m,) residues modulo q < 2**48 elementwise, exactly.

    With the quotient f = ⌊a·b/q⌋ estimated in float64, a·b − f·q is formed modulo 2^64. The estimate is a
    number below 2^48 with a relative error of at most 2^-51, so f is off by at most one and the true
    difference lies in [−q, 2q), far inside the 64-bit range: one conditional addition and one conditional
    subtraction finish the reduction.
    """
    prime = np.uint64(modulus)
    quotient = np.floor(left.astype(np.float64) * right.astype(np.float64) / modulus).astype(np.uint64)
    difference = left * right - quotient * prime
    difference = np.minimum(difference, difference + prime)
    product: NDArray[np.uint64] = np.minimum(difference, difference - prime)
    return product


def modular_subtract(left: NDArray[np.uint64], right: NDArray[np.uint64], modulus: int) -> NDArray[np.uint64]:
    """Subtract (m,) residues modulo q < 2**48 elementwise."""
    difference = left - right
    reduced: NDArray[np.uint64] = np.minimum(difference, difference + np.uint64(modulus))
    return reduced


def modular_matrix_product(
    weights: NDArray[np.int64], residues: NDArray[np.uint64], modulus: int
) -> NDArray[np.uint64]:
    """(R, D) sums modulo q < 2**48 of (R, M) small weights with (M, D) residues, exactly, at BLAS's speed.

    Residues are split into halves c = h·2^24 + l. Rows of W sum to at most 2^16 and halves are below 2^24, so
    every partial sum of W·l and W·h is an integer below 2^40: float64 represents all of them exactly,
    whatever the order of summation or fusion of operations. The recombined sum Σ w·c is below 2^16·2^48 =
    2^64 and fits a word before it is reduced. EncryptionError where shapes or bounds would make it inexact.
    """
    if weights.ndim != 2 or residues.ndim != 2 or weights.shape[1] != residues.shape[0]:
        raise EncryptionError(f"cannot multiply weights {weights.shape} with residues {residues.shape}")
    if not 1 < modulus < 1 << 48:
        raise EncryptionError(f"modulus has {modulus.bit_length()} bits, expected at most 48")
    if weights.size and (int(weights.min()) < 0 or int(weights.sum(axis=1).max()) > _MAX_ROW_SUM):
        raise EncryptionError(f"weights must be ≥ 0 with rows that sum to at most {_MAX_ROW_SUM}")
    recipients, columns = weights.shape[0], residues.shape[1]
    result = np.empty((recipients, columns), dtype=np.uint64)
    width = min(columns, _COLUMNS)
    # All buffers are allocated once: fresh memory for every part costs more than the arithmetic.
    halves = np.empty((residues.shape[0], width), dtype=np.uint64)
    operands = np.empty(halves.shape)
    sums = np.empty((recipients, width))
    total, part = np.empty((2, recipients, width), dtype=np.uint64)
    factors = weights.astype(np.float64)
    prime = np.uint64(modulus)
    for start in range(0, columns, _COLUMNS):
        columns_now = slice(start, min(start + _COLUMNS, columns))
        now = slice(0, columns_now.stop - start)
        for split, target in ((_upper_half, total), (_lower_half, part)):
            split(residues[:, columns_now], halves[:, now])
            np.copyto(operands[:, now], halves[:, now], casting="unsafe")
            np.matmul(factors, operands[:, now], out=sums[:, now])
            np.copyto(target[:, now], sums[:, now], casting="unsafe")
        total[:, now] <<= _HALF_BITS
        total[:, now] += part[:, now]
        # numpy has a vectorised division by a scalar, but no such remainder.
        np.floor_divide(total[:, now], prime, out=part[:, now])
        part[:, now] *= prime
        np.subtract(total[:, now], part[:, now], out=result[:, columns_now])
    return result


def _upper_half(words: NDArray[np.uint64], halves: NDArray[np.uint64]) -> None:
    np.right_shift(words, _HALF_BITS, out=halves)


def _lower_half(words: NDArray[np.uint64], halves: NDArray[np.uint64]) -> None:
    np.bitwise_and(words, _HALF_MASK, out=halves)


def expand_seed(seed: bytes, start: int, words: NDArray[np.uint64], modulus: int) -> None:
    """Write words start, start + 1, … of a public seed's uniform residues below q, 2**47 < q < 2**48.

    Word i is made of bytes 16 + 6i … 21 + 6i of the key stream if that is below the modulus. Otherwise it is
    the first word below the modulus of a second stream, which starts at counter 2^127 + i·2^32. `start` is a
    multiple of 8, an AES block.
    """
    if len(seed) != SEED_BYTES or start % 8 != 0:
        raise ValueError(f"expected a seed of {SEED_BYTES} bytes and a start that is a multiple of 8")
    _read_stream(seed, start * WORD_BYTES // _AES_BLOCK_BYTES, words)
    # For the modulus in use, fewer than one word in 10^10 is replaced.
    if int(words.max(initial=0)) >= modulus:
        for position in np.flatnonzero(words >= np.uint64(modulus)):
            words[position] = _replacement(seed, start + int(position), modulus)


def _replacement(seed: bytes, index: int, modulus: int) -> int:
    counter = _REPLACEMENT_STREAM + (index << 32)
    candidates = np.empty(8, dtype=np.uint64)
    while True:
        _read_stream(seed, counter, candidates)
        accepted = candidates[candidates < np.uint64(modulus)]
        if accepted.size:
            return int(accepted[0])
        counter += 3  # eight words of 6 bytes fill three AES blocks


def _read_stream(seed: bytes, counter: int, words: NDArray[np.uint64]) -> None:
    cipher = Cipher(algorithms.AES256(seed), modes.CTR(counter.to_bytes(_AES_BLOCK_BYTES, "big")))
    stream = cipher.encryptor().update(bytes(_AES_BLOCK_BYTES + words.size * WORD_BYTES))
    unpack_words(stream, _AES_BLOCK_BYTES, words)
