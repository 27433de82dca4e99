"""The `ckks` back end against SEAL and TenSEAL themselves."""

import os
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedmosaic.privacy.encryption.ciphers import create_cipher
from fedmosaic.privacy.encryption.ckks import cipher as ckks
from fedmosaic.privacy.encryption.ckks.aggregation import CkksAggregator
from fedmosaic.privacy.encryption.ckks.cipher import generate_secret, seal_file, secret_bytes
from fedmosaic.privacy.encryption.ckks.modular import expand_seed, unpack_words
from fedmosaic.privacy.encryption.parameters import CkksParameters
from fedmosaic.privacy.encryption.records import HEADER_BYTES, RoundContext
from fedmosaic.privacy.groupkey.key import GroupKey
from fedmosaic.privacy.policy import AggregationPolicy
from fedmosaic.protos.errors import CiphertextError, EncryptionError
from fedmosaic.protos.messages import WeightRow

PARAMETERS = CkksParameters()
N, Q = PARAMETERS.ring_degree, PARAMETERS.modulus
MEMBERS = ("a", "b", "c", "d", "e")
# Rows of two halves bring the arithmetic to its limits.
POLICY = AggregationPolicy(squares_cap=1.0)


def key_with(secret: bytes) -> GroupKey:
    return GroupKey("f", 1, MEMBERS, PARAMETERS.digest(), b"t" * 32, b"p" * 32, b"K" * 32, secret)


KEY = key_with(generate_secret(PARAMETERS))


def context(dimensions: int) -> RoundContext:
    return RoundContext("f", 1, 0, "shared", dimensions)


def words(content: bytes) -> NDArray[np.uint64]:
    found = np.empty(len(content) // 6, dtype=np.uint64)
    unpack_words(bytes(2) + content, 2, found)
    return found


def seal() -> Any:
    return ckks._engine(PARAMETERS)


def centred(residue: int) -> int:
    return residue - Q if residue > Q // 2 else residue


def test_seal_chooses_the_pinned_prime_and_accepts_128_bits() -> None:
    sealapi = pytest.importorskip("tenseal.sealapi")
    assert [m.value() for m in sealapi.CoeffModulus.Create(N, [48])] == [Q]
    context_data = seal().context.key_context_data()
    assert context_data.qualifiers().parameters_set()
    assert seal().context.first_parms_id() == seal().context.key_parms_id()


def test_secrets_are_fresh_and_ternary() -> None:
    """Evaluation at the roots: the sum over all n points of a ternary secret is n times its constant term."""
    seen = set()
    for _ in range(4):
        secret = generate_secret(PARAMETERS)
        assert len(secret) == secret_bytes(PARAMETERS) == 12288
        residues = words(secret)
        assert int(residues.max()) < Q
        total = sum(int(residue) for residue in residues) % Q
        assert centred(total) in (-N, 0, N)
        seen.add(secret)
    assert len(seen) == 4


def test_seal_decrypts_an_upload_with_its_expanded_half() -> None:
    """The wire format is a ciphertext: SEAL itself reads (c0, a) and finds the values."""
    values = np.random.default_rng(0).uniform(-4, 4, N)
    upload = create_cipher(PARAMETERS, "a", POLICY).encrypt(values, KEY, context(N), bytes(16))
    payload = upload[HEADER_BYTES:]
    second = np.empty(N, dtype=np.uint64)
    expand_seed(payload[:32], 0, second, Q)
    first = words(payload[32:])
    engine = seal()
    ciphertext, plaintext = engine.api.Ciphertext(), engine.api.Plaintext()
    with seal_file() as file:
        secret_key = engine.secret_key(words(KEY.ckks_secret), file)
        file.load(
            ciphertext, engine.context, engine.format.ciphertext(np.concatenate([first, second]), 2.0**29)
        )
    assert engine.api.is_valid_for(ciphertext, engine.context)
    engine.api.Decryptor(engine.context, secret_key).decrypt(ciphertext, plaintext)
    slots = np.array(engine.encoder.decode_complex(plaintext))
    np.testing.assert_allclose(np.concatenate([slots.real, slots.imag]), values, rtol=0, atol=1e-5)


def phase_of(upload: bytes) -> list[int]:
    """Return c0 + a·s at every point, with Python's integers."""
    payload = upload[HEADER_BYTES:]
    first = words(payload[32:])
    second = np.empty(first.size, dtype=np.uint64)
    expand_seed(payload[:32], 0, second, Q)
    secret = words(KEY.ckks_secret)
    return [(int(c) + int(a) * int(s)) % Q for c, a, s in zip(first, second, secret, strict=True)]


def test_every_upload_carries_a_fresh_error_of_the_standard_size() -> None:
    """Encryptions of zero: their phase is the error alone, whose deviation SEAL fixes at √10.5 = 3.24.

    By Parseval, the mean square over the n evaluation points of a polynomial with coefficients e is the sum
    of e². Decoded, each real value has variance n·σ²/2 over the squared scale.
    """
    cipher = create_cipher(PARAMETERS, "a", POLICY)
    first, second = (cipher.encrypt(np.zeros(N), KEY, context(N), bytes(16)) for _ in range(2))
    assert phase_of(first) != phase_of(second)
    for upload in (first, second):
        phase = phase_of(upload)
        constant = centred(sum(phase) * pow(N, -1, Q) % Q)
        assert abs(constant) <= 21 + 1
        assert any(phase)
    record, row, where = aggregate_of(np.zeros((3, N)))
    noise = cipher.decrypt(record, KEY, where, row)
    # Shares ½, ¼, ¼ of independent errors: factor √(6/16).
    predicted = np.sqrt(N / 2) * np.sqrt(10.5) / 2**29 * np.sqrt(6 / 16)
    assert 0.85 * predicted < float(noise.std()) < 1.15 * predicted
    assert float(np.abs(noise).max()) < 1e-5


def aggregate_of(vectors: NDArray[np.float64]) -> tuple[bytes, WeightRow, RoundContext]:
    row = WeightRow(("b", "c", "d"), (2**14, 2**13, 2**13), 15)
    where = context(vectors.shape[1])
    uploads = {
        name: create_cipher(PARAMETERS, name, POLICY).encrypt(vector, KEY, where, bytes(16))
        for name, vector in zip(row.contributors, vectors, strict=True)
    }
    return bytes(CkksAggregator(PARAMETERS, POLICY).aggregate(uploads, {"a": row}, where)[0]), row, where


def test_seeds_are_never_used_twice_and_the_first_halves_look_uniform() -> None:
    """The same zeros under the same nonce: nothing but the coins may differ, and all of it must."""
    cipher = create_cipher(PARAMETERS, "a", POLICY)
    payloads = [cipher.encrypt(np.zeros(N), KEY, context(N), bytes(16))[HEADER_BYTES:] for _ in range(20)]
    assert len({payload[:32] for payload in payloads}) == 20
    first = np.concatenate([words(payload[32:]) for payload in payloads])
    assert len(set(first.tolist())) > 0.999 * first.size
    counts = np.bincount((first * 64 // Q).astype(int), minlength=64)
    expected = first.size / 64
    # 63 degrees of freedom: above 120 with probability 2e-5.
    assert ((counts - expected) ** 2 / expected).sum() < 120


def test_one_decrypted_aggregate_gives_the_key_away() -> None:
    """Why a decrypted vector stays in the process: Li and Micciancio's attack on this very back end."""
    vectors = np.random.default_rng(3).uniform(-4, 4, (3, N))
    record, row, where = aggregate_of(vectors)
    decrypted = create_cipher(PARAMETERS, "a", POLICY).decrypt(record, KEY, where, row)
    engine = seal()
    phase = engine.api.Plaintext()
    slots = decrypted[: N // 2] + 1j * decrypted[N // 2 :]
    scale = 2.0 ** (PARAMETERS.scale_bits + PARAMETERS.weight_bits)
    engine.encoder.encode(slots.tolist(), scale, phase)
    first, second = words(record[HEADER_BYTES:]).reshape(2, N)
    points = zip((phase[i] for i in range(N)), first, second, strict=True)
    stolen = [(int(p) - int(c)) * pow(int(a), -1, Q) % Q for p, c, a in points]
    assert stolen == words(KEY.ckks_secret).tolist()


def test_an_aggregate_that_needs_no_key_is_refused() -> None:
    """A server can encode what it likes; without a second polynomial it would decrypt to just that."""
    record, row, where = aggregate_of(np.zeros((3, 2 * N)))
    for block in range(2):
        start = HEADER_BYTES + 6 * N * (2 + block)
        forged = record[:start] + bytes(6 * N) + record[start + 6 * N :]
        with pytest.raises(CiphertextError, match="second polynomial of zero"):
            create_cipher(PARAMETERS, "a", POLICY).decrypt(forged, KEY, where, row)


def test_without_anonymous_memory_a_private_file_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cipher = create_cipher(PARAMETERS, "b", POLICY)
    upload = cipher.encrypt(np.ones(10), KEY, context(10), bytes(16))
    assert len(upload) == HEADER_BYTES + 32 + 6 * N
    assert list(tmp_path.iterdir()) == []


def test_another_seal_with_other_primes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sealapi = pytest.importorskip("tenseal.sealapi")

    class OtherModulus:
        @staticmethod
        def Create(degree: int, bits: list[int]) -> list[Any]:
            return [sealapi.PlainModulus.Batching(degree, 40)]

    monkeypatch.setattr(sealapi, "CoeffModulus", OtherModulus)
    with pytest.raises(EncryptionError, match="chooses other primes"):
        ckks._Engine(PARAMETERS)
