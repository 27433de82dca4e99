"""The public half of a ciphertext: reproducible, seekable, uniform below the modulus."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedmosaic.privacy.encryption.ckks.modular import expand_seed
from fedmosaic.privacy.encryption.parameters import CKKS_MODULUS

SEED = bytes(range(32))


def expand(seed: bytes, start: int, count: int, modulus: int = CKKS_MODULUS) -> NDArray[np.uint64]:
    words = np.empty(count, dtype=np.uint64)
    expand_seed(seed, start, words, modulus)
    return words


def stream_byte(seed: bytes, counter: int, position: int) -> int:
    """Byte of AES-256-CTR by the definition of SP 800-38A: encrypt counter blocks one by one."""
    block = (counter + position // 16).to_bytes(16, "big")
    # ECB of single counter blocks is how CTR is defined; it serves as the oracle here.
    encryptor = Cipher(algorithms.AES256(seed), modes.ECB()).encryptor()  # noqa: S305
    return encryptor.update(block)[position % 16]


def reference(seed: bytes, index: int, modulus: int) -> int:
    word = sum(stream_byte(seed, 0, 16 + 6 * index + i) << (8 * i) for i in range(6))
    attempt = 0
    while word >= modulus:
        start = (1 << 127) + (index << 32) + attempt // 8 * 3
        offset = 16 + attempt % 8 * 6
        word = sum(stream_byte(seed, start, offset + i) << (8 * i) for i in range(6))
        attempt += 1
    return word


def test_words_follow_their_definition() -> None:
    assert expand(SEED, 0, 16).tolist() == [reference(SEED, i, CKKS_MODULUS) for i in range(16)]


def test_words_above_the_modulus_are_replaced_by_definition() -> None:
    modulus = 2**47 + 1  # half of all candidates are rejected, some of them many times
    words = expand(SEED, 0, 64, modulus)
    assert words.tolist() == [reference(SEED, i, modulus) for i in range(64)]
    assert int(words.max()) < modulus


@given(
    start=st.integers(0, 40).map(lambda n: 8 * n),
    count=st.integers(1, 40),
    seed=st.binary(min_size=32, max_size=32),
)
def test_any_part_equals_the_part_of_the_whole(start: int, count: int, seed: bytes) -> None:
    np.testing.assert_array_equal(
        expand(seed, start, count, 2**47 + 1), expand(seed, 0, start + count, 2**47 + 1)[start:]
    )


@pytest.mark.parametrize(("seed", "start"), [(bytes(31), 0), (bytes(33), 0), (SEED, 4)])
def test_wrong_use_is_refused(seed: bytes, start: int) -> None:
    with pytest.raises(ValueError, match="expected a seed of 32 bytes"):
        expand(seed, start, 8)
