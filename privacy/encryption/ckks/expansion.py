"""Public randomness: the uniform half of a ciphertext from a 32-byte seed.

The second polynomial of a fresh ciphertext is uniform and public, so a client sends the seed and the server
expands it. AES-256 in counter mode under the seed as key, rejection sampling for uniformity.

Reference: FrodoKEM (Frodo.Gen using AES) and Kyber's 90s variant expand their public matrices from seeds
in this way; NIST SP 800-38A (CTR).
"""

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedmosaic.privacy.encryption.ckks.modular import WORD_BYTES, unpack_words

SEED_BYTES = 32
_AES_BLOCK_BYTES = 16
# The first stream starts at counter 0 and is far shorter than 2^127 blocks.
_REPLACEMENT_STREAM = 1 << 127


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
