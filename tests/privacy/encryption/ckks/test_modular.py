"""Exact arithmetic with residues, against Python's integers."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedmosaic.privacy.encryption.ckks import modular
from fedmosaic.privacy.encryption.mask.aggregation import WordProduct
from fedmosaic.privacy.encryption.parameters import CKKS_MODULUS as Q
from fedmosaic.protos.errors import EncryptionError

residues = st.one_of(st.integers(0, Q - 1), st.sampled_from([0, 1, Q - 1, Q // 2, 2**24, 2**24 - 1, 2**47]))


def words(values: list[int]) -> NDArray[np.uint64]:
    return np.array(values, dtype=np.uint64)


@given(
    values=st.lists(st.integers(0, 2**48 - 1), min_size=4, max_size=64),
    prefix=st.binary(min_size=2, max_size=9),
)
def test_words_survive_the_wire_as_little_endian_bytes(values: list[int], prefix: bytes) -> None:
    values = values[: len(values) // 4 * 4]
    packed = np.empty((1, len(values) * 6 // 8), dtype="<u8")
    modular.pack_words(words(values).reshape(1, -1), packed)
    content = packed.tobytes()
    assert content == b"".join(value.to_bytes(6, "little") for value in values)
    found = np.empty(len(values), dtype=np.uint64)
    for buffer in (prefix + content, memoryview(prefix + content + b"after")):
        modular.unpack_words(buffer, len(prefix), found)
        assert found.tolist() == values


def test_packing_into_part_of_a_record_leaves_the_rest() -> None:
    record = np.zeros((3, 10), dtype="<u8")
    modular.pack_words(np.arange(12, dtype=np.uint64).reshape(3, 4) + np.uint64(2**47), record[:, 2:5])
    assert (record[:, 2:5] != 0).all()
    assert (record[:, :2] == 0).all()
    assert (record[:, 5:] == 0).all()


@given(left=st.lists(residues, min_size=1, max_size=32), right=residues)
def test_products_and_differences_are_exact(left: list[int], right: int) -> None:
    other = words([right] * len(left))
    assert modular.modular_multiply(words(left), other, Q).tolist() == [a * right % Q for a in left]
    assert modular.modular_subtract(words(left), other, Q).tolist() == [(a - right) % Q for a in left]


@given(
    rows=st.lists(st.lists(st.integers(0, 2**16 // 4), min_size=4, max_size=4), min_size=1, max_size=4),
    columns=st.lists(st.lists(residues, min_size=4, max_size=4), min_size=1, max_size=6),
)
def test_matrix_products_are_exact(rows: list[list[int]], columns: list[list[int]]) -> None:
    product = modular.modular_matrix_product(
        np.array(rows), words([v for c in columns for v in c]).reshape(-1, 4).T, Q
    )
    expected = [[sum(w * c for w, c in zip(row, col, strict=True)) % Q for col in columns] for row in rows]
    assert product.tolist() == expected


def test_matrix_product_at_the_largest_values_and_across_parts() -> None:
    count, width = 64, 5000
    weights = np.full((2, count), 2**16 // count, dtype=np.int64)
    columns = np.full((count, width), Q - 1, dtype=np.uint64)
    assert (modular.modular_matrix_product(weights, columns, Q) == 2**16 * (Q - 1) % Q).all()
    generator = np.random.default_rng(0)
    columns = generator.integers(0, Q, (count, width), dtype=np.uint64)
    product = modular.modular_matrix_product(weights, columns, Q)
    for position in (0, 1023, 1024, 2047, 2048, 4095, 4096, 4999):
        assert int(product[1, position]) == sum(1024 * int(c) for c in columns[:, position]) % Q


@pytest.mark.parametrize(
    ("weights", "shape", "modulus", "message"),
    [
        ([[1, 2]], (3, 4), Q, "cannot multiply"),
        ([[-1, 2]], (2, 4), Q, "rows that sum"),
        ([[2**16, 1]], (2, 4), Q, "rows that sum"),
        ([[1, 2]], (2, 4), 2**48, "49 bits"),
        ([[1, 2]], (2, 4), 1, "1 bits"),
    ],
)
def test_inexact_matrix_products_are_refused(
    weights: list[list[int]], shape: tuple[int, int], modulus: int, message: str
) -> None:
    with pytest.raises(EncryptionError, match=message):
        modular.modular_matrix_product(np.array(weights), np.zeros(shape, dtype=np.uint64), modulus)


def word_matrix_product(weights: np.ndarray, words: Sequence[np.ndarray]) -> np.ndarray:
    sums = np.empty((weights.shape[0], words[0].size), dtype=np.uint32)
    WordProduct()(weights, words, list(sums))
    return sums


@given(
    row=st.lists(st.integers(0, 2**20 // 8), min_size=8, max_size=8),
    column=st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=8),
)
def test_sums_of_32_bit_words_are_exact(row: list[int], column: list[int]) -> None:
    words = [np.array([c], dtype=np.uint32).view(np.int32) for c in column]
    product = word_matrix_product(np.array([row]), words)
    assert product.tolist() == [[sum(w * c for w, c in zip(row, column, strict=True)) % 2**32]]


@pytest.mark.parametrize("word", [2**31 - 1, 2**31, 2**32 - 1, 0])
def test_sums_of_32_bit_words_at_the_largest_values_and_across_parts(word: int) -> None:
    count, width = 500, 2000
    columns = [np.full(width, word, dtype=np.uint32).view(np.int32)] * count
    weights = np.full((3, count), 2**20 // count, dtype=np.int64)
    weights[:, 0] += 2**20 - int(weights[0].sum())
    assert (word_matrix_product(weights, columns) == (2**20 * word) % 2**32).all()


def test_working_memory_serves_products_of_every_size() -> None:
    product, generator = WordProduct(), np.random.default_rng(0)
    for recipients, contributors, width in ((3, 4, 9000), (1, 1, 1), (700, 20, 1501), (2, 3, 7)):
        weights = generator.integers(0, 500, (recipients, contributors))
        words = generator.integers(-(2**31), 2**31, (contributors, width), dtype=np.int32)
        # int64 products wrap modulo 2^64, which keeps the low 32 bits.
        expected = (weights @ words.astype(np.int64)).astype(np.uint32)
        sums = np.empty((recipients, width), dtype=np.uint32)
        product(weights, list(words), list(sums))
        assert (sums == expected).all()


@pytest.mark.parametrize("row", [[2**20, 1], [-1, 2]])
def test_inexact_sums_of_32_bit_words_are_refused(row: list[int]) -> None:
    with pytest.raises(EncryptionError, match="rows that sum"):
        word_matrix_product(np.array([row]), [np.zeros(1, dtype=np.int32)] * 2)
