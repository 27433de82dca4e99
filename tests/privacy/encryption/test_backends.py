"""The three back ends behind their one interface: same results, same refusals."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from fedmosaic.privacy.encryption.aggregator import Aggregator
from fedmosaic.privacy.encryption.aggregators import create_aggregator
from fedmosaic.privacy.encryption.cipher import ClientCipher
from fedmosaic.privacy.encryption.ciphers import create_cipher, generate_group_secret
from fedmosaic.privacy.encryption.parameters import (
    CkksParameters,
    MaskParameters,
    Parameters,
    PlainParameters,
)
from fedmosaic.privacy.encryption.records import HEADER_BYTES, RoundContext
from fedmosaic.privacy.groupkey.key import GroupKey
from fedmosaic.privacy.policy import AggregationPolicy, integer_weights
from fedmosaic.protos.errors import CiphertextError, ConfigurationError, EncryptionError, PolicyError
from fedmosaic.protos.messages import WeightRow

BACKENDS: dict[str, Parameters] = {
    "ckks": CkksParameters(),
    "mask": MaskParameters(),
    "plain": PlainParameters(),
}
SECRETS = {name: generate_group_secret(parameters) for name, parameters in BACKENDS.items()}
ENCRYPTED = ("ckks", "mask")
# Of a decrypted value against the same integer row in float64: ckks noise, mask rounding (2^-17), float32.
TOLERANCE = {"ckks": 1e-5, "mask": 2.0**-17 + 1e-12, "plain": 4 * 2.0**-22}


@dataclass
class Federation:
    """Members with one back end, one key and one round."""

    parameters: Parameters
    members: tuple[str, ...]
    context: RoundContext
    key: GroupKey | None

    # Rows here are as uneven as the arithmetic allows; the limit on squares has tests of its own.
    policy = AggregationPolicy(squares_cap=1.0)

    def cipher(self, member: str) -> ClientCipher[Any]:
        return create_cipher(self.parameters, member, self.policy, allow_plaintext=True)

    def aggregator(self) -> Aggregator[Any]:
        return create_aggregator(self.parameters, self.policy, allow_plaintext=True)

    def row(self, shares: dict[str, float]) -> WeightRow:
        names = tuple(shares)
        weights = integer_weights(np.array(list(shares.values())), self.parameters.weight_bits)
        integers = tuple(int(weight) for weight in weights)
        return WeightRow(names, integers, self.parameters.weight_bits)

    def decrypt(
        self, record: bytes | memoryview, row: WeightRow, recipient: str = "member-0"
    ) -> NDArray[np.float64]:
        return self.cipher(recipient).decrypt(record, self.key, self.context, row)

    def aggregate(self, uploads: dict[str, bytes], row: WeightRow) -> bytes:
        return bytes(self.aggregator().aggregate(uploads, {"member-0": row}, self.context)[0])

    def encrypt(self, vectors: NDArray[np.float64]) -> dict[str, bytes]:
        return {
            member: self.cipher(member).encrypt(vector, self.key, self.context, bytes([index]) * 16)
            for index, (member, vector) in enumerate(zip(self.members, vectors, strict=True))
        }


def federation(backend: str, dimensions: int = 100, count: int = 5) -> Federation:
    members = tuple(f"member-{index}" for index in range(count))
    parameters = BACKENDS[backend]
    key = None
    if backend != "plain":
        key = GroupKey(
            "f", 7, members, parameters.digest(), b"t" * 32, b"p" * 32, b"K" * 32, SECRETS[backend]
        )
    return Federation(parameters, members, RoundContext("f", 7, 3, "shared", dimensions), key)


def vectors_for(f: Federation, seed: int = 0, scale: float = 0.02) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(len(f.members), f.context.dimensions)) * scale


def expected(row: WeightRow, f: Federation, vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.zeros(len(f.members))
    for name, weight in zip(row.contributors, row.weights, strict=True):
        weights[f.members.index(name)] = weight / 2**row.bits
    return weights @ vectors


def even_row(f: Federation, recipient: str = "member-0") -> WeightRow:
    others = [member for member in f.members if member != recipient]
    return f.row(dict.fromkeys(others, 1 / len(others)))


def uniform(counts: NDArray[np.int64]) -> bool:
    """Whether counts are those of equally likely values: Pearson's χ², one false alarm in a billion."""
    return bool(stats.chisquare(counts).pvalue > 1e-9)


def exchange(f: Federation, vectors: NDArray[np.float64], row: WeightRow) -> tuple[dict[str, bytes], bytes]:
    uploads = f.encrypt(vectors)
    aggregator = f.aggregator()
    for member, upload in uploads.items():
        aggregator.check_upload(upload, f.context, member)
    return uploads, f.aggregate(uploads, row)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dimensions", [1, 3, 2047, 2048, 2049, 8192 + 5])
def test_aggregates_equal_those_in_the_clear(backend: str, dimensions: int) -> None:
    f = federation(backend, dimensions)
    vectors = vectors_for(f, scale=1.0).clip(-4.0, 4.0)
    rows = {member: even_row(f, member) for member in f.members}
    rows["member-4"] = f.row(dict(zip(f.members[:4], (0.4, 0.3, 0.2, 0.1), strict=True)))
    aggregates = f.aggregator().aggregate(f.encrypt(vectors), rows, f.context)
    for (recipient, row), record in zip(rows.items(), aggregates, strict=True):
        values = f.decrypt(record, row, recipient)
        assert values.dtype == np.float64
        np.testing.assert_allclose(values, expected(row, f, vectors), rtol=0, atol=TOLERANCE[backend])


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_values_with_extreme_rows_do_not_wrap(backend: str) -> None:
    """Also in the transform: coefficients of an encoded polynomial stay below clip·√2 times the scale."""
    f = federation(backend, 4096)
    half = 1 << (f.parameters.weight_bits - 1)
    row = WeightRow(f.members[1:4], (half, half - 1, 1), f.parameters.weight_bits)
    signs = (np.ones(4096), np.repeat([1, -1], 2048), np.tile([1, -1], 2048), np.cos(np.arange(4096) / 130))
    for pattern in signs:
        for sign in (4.0, -4.0):
            vectors = np.tile(sign * np.sign(pattern), (5, 1))
            _, record = exchange(f, vectors, row)
            np.testing.assert_allclose(f.decrypt(record, row), vectors[0], rtol=0, atol=TOLERANCE[backend])


@settings(max_examples=25)
@given(data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_row_and_any_vectors(backend: str, data: st.DataObject) -> None:
    f = federation(backend, data.draw(st.integers(1, 40)), data.draw(st.integers(4, 7)))
    elements = st.floats(-4.0, 4.0, width=32)
    size = len(f.members) * f.context.dimensions
    flat = data.draw(st.lists(elements, min_size=size, max_size=size))
    vectors = np.array(flat).reshape(len(f.members), -1)
    raw = data.draw(
        st.lists(st.floats(0.0, 1.0), min_size=len(f.members) - 1, max_size=len(f.members) - 1).filter(
            lambda w: sum(w) > 0.1 and sum(x / sum(w) > 1e-3 for x in w) >= 3 and max(w) / sum(w) <= 0.5
        )
    )
    row = f.row({m: w / sum(raw) for m, w in zip(f.members[1:], raw, strict=True)})
    _, record = exchange(f, vectors, row)
    values = f.decrypt(record, row)
    np.testing.assert_allclose(values, expected(row, f, vectors), rtol=0, atol=TOLERANCE[backend])


def test_mask_sums_are_exact_integers() -> None:
    f = federation("mask", 5000)
    vectors = vectors_for(f, scale=1.0).clip(-4.0, 4.0)
    row = f.row({"member-1": 0.45, "member-2": 0.35, "member-3": 0.2, "member-4": 0.0})
    _, record = exchange(f, vectors, row)
    values = f.decrypt(record, row)
    integers = np.rint(vectors * 2**16).astype(np.int64)
    weights = np.array([0, *row.weights])
    np.testing.assert_array_equal(values * 2.0 ** (16 + 12), (weights @ integers).astype(np.float64))


@pytest.mark.parametrize("backend", ["ckks", "mask"])
@pytest.mark.parametrize("dimensions", [100, 8192 + 5])
def test_one_row_alone_gives_the_very_bytes_that_it_gives_among_all(backend: str, dimensions: int) -> None:
    """What a witness rests on: whoever has the uploads and a row gets the same aggregate, bit for bit."""
    f = federation(backend, dimensions)
    uploads = f.encrypt(vectors_for(f, scale=1.0))
    rows = {member: even_row(f, member) for member in f.members}
    rows["member-4"] = f.row(dict(zip(f.members[:4], (0.4, 0.3, 0.2, 0.1), strict=True)))
    together = f.aggregator().aggregate(uploads, rows, f.context)
    backwards = dict(reversed(uploads.items())), dict(reversed(rows.items()))
    assert f.aggregator().aggregate(*backwards, f.context) == together[::-1]
    for (recipient, row), record in zip(rows.items(), together, strict=True):
        used = {name: uploads[name] for name in row.contributors}
        assert f.aggregator().aggregate(used, {recipient: row}, f.context) == [record]


@pytest.mark.parametrize("backend", BACKENDS)
def test_records_may_be_views_of_a_mapped_file(backend: str) -> None:
    f = federation(backend)
    uploads, record = exchange(f, vectors_for(f), even_row(f))
    views = {member: memoryview(b"before" + upload + b"after")[6:-5] for member, upload in uploads.items()}
    assert f.aggregator().aggregate(views, {"member-0": even_row(f)}, f.context) == [record]
    f.decrypt(memoryview(record), even_row(f))


def test_sizes_at_rank_16() -> None:
    """Against float32: ckks up ≤ 1.65 ×, down ≤ 3.3 ×; mask ≤ 1.02 × plus 16 bytes per contributor."""
    dimensions = 7616
    for backend, up, down in (("ckks", 1.65, 3.3), ("mask", 1.02, 1.02), ("plain", 1.02, 1.02)):
        f = federation(backend, dimensions, count=10)
        uploads, record = exchange(f, vectors_for(f), even_row(f))
        assert len(uploads["member-0"]) + 64 <= up * 4 * dimensions
        assert len(record) <= down * 4 * dimensions + 16 * 9
        assert len({len(upload) for upload in uploads.values()}) == 1


@pytest.mark.parametrize("backend", ENCRYPTED)
def test_encryption_hides_equality(backend: str) -> None:
    f = federation(backend, 2048)
    vector = np.zeros(2048)
    first = f.cipher("member-0").encrypt(vector, f.key, f.context, bytes(16))
    second = f.cipher("member-0").encrypt(vector, f.key, f.context, b"\1" * 16)
    payloads = [np.frombuffer(u[HEADER_BYTES:], dtype=np.uint8) for u in (first, second)]
    assert float((payloads[0] == payloads[1]).mean()) < 0.02
    for payload in payloads:
        assert uniform(np.bincount(payload, minlength=256))


def test_mask_pads_are_bound_to_every_part_of_the_context() -> None:
    f = federation("mask", 64)
    vector = np.zeros(64)
    assert f.key is not None
    variants = [
        f.cipher("member-0").encrypt(vector, f.key, f.context, bytes(16)),
        f.cipher("member-1").encrypt(vector, f.key, f.context, bytes(16)),
        f.cipher("member-0").encrypt(vector, f.key, f.context, b"\1" + bytes(15)),
        f.cipher("member-0").encrypt(vector, f.key, replace(f.context, round=4), bytes(16)),
        f.cipher("member-0").encrypt(vector, f.key, replace(f.context, section="family:x"), bytes(16)),
        f.cipher("member-0").encrypt(vector, replace(f.key, master=b"L" * 32), f.context, bytes(16)),
        f.cipher("member-0").encrypt(vector, replace(f.key, transcript=b"u" * 32), f.context, bytes(16)),
    ]
    assert len({variant[HEADER_BYTES:] for variant in variants}) == len(variants)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (np.zeros(99), "shape"),
        (np.zeros((100, 1)), "shape"),
        (np.full(100, np.nan), "not finite"),
        (np.full(100, np.inf), "not finite"),
    ],
)
def test_vectors_that_cannot_be_sent_are_refused(
    backend: str, vector: NDArray[np.float64], message: str
) -> None:
    f = federation(backend)
    with pytest.raises(EncryptionError, match=message):
        f.cipher("member-0").encrypt(vector, f.key, f.context, bytes(16))


@pytest.mark.parametrize("backend", BACKENDS)
def test_larger_values_are_clipped(backend: str) -> None:
    f = federation(backend)
    uploads = f.encrypt(np.zeros((5, 100)))
    for member in f.members:
        uploads[member] = f.cipher(member).encrypt(np.full(100, 9.0), f.key, f.context, bytes(16))
    record = f.aggregate(uploads, even_row(f))
    values = f.decrypt(record, even_row(f))
    np.testing.assert_allclose(values, 4.0, rtol=0, atol=TOLERANCE[backend])


def test_plain_is_refused_unless_allowed() -> None:
    for create in (
        lambda: create_cipher(PlainParameters(), "a", AggregationPolicy()),
        lambda: create_aggregator(PlainParameters(), AggregationPolicy()),
    ):
        with pytest.raises(ConfigurationError, match="allow_plaintext = true"):
            create()


@pytest.mark.parametrize("backend", ENCRYPTED)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda key: None, "needs a group key"),
        (lambda key: replace(key, parameters_hash=bytes(32)), "other encryption parameters"),
        (lambda key: replace(key, epoch=8), "epoch 8"),
        (lambda key: replace(key, federation="g"), "federation 'g'"),
        (lambda key: replace(key, members=("x", "y")), "not a member"),
    ],
)
def test_a_key_of_something_else_is_refused(
    backend: str, change: Callable[[GroupKey], GroupKey | None], message: str
) -> None:
    f = federation(backend)
    _, record = exchange(f, vectors_for(f), even_row(f))
    assert f.key is not None
    wrong = change(f.key)
    with pytest.raises(EncryptionError, match=message):
        f.cipher("member-0").encrypt(np.zeros(100), wrong, f.context, bytes(16))
    with pytest.raises(EncryptionError, match=message):
        f.cipher("member-0").decrypt(record, wrong, f.context, even_row(f))


@pytest.mark.parametrize("secret", [b"", bytes(100), b"\xff" * 12288])
def test_a_ckks_secret_that_is_none_is_refused(secret: bytes) -> None:
    f = federation("ckks")
    assert f.key is not None
    with pytest.raises(EncryptionError, match="CKKS secret"):
        f.cipher("member-0").encrypt(np.zeros(100), replace(f.key, ckks_secret=secret), f.context, bytes(16))


@pytest.mark.parametrize("backend", ENCRYPTED)
@pytest.mark.parametrize("dimensions", [100, 2048])
def test_another_key_of_the_same_epoch_decrypts_nothing(backend: str, dimensions: int) -> None:
    f = federation(backend, dimensions)
    _, record = exchange(f, vectors_for(f), even_row(f))
    assert f.key is not None
    f.key = replace(f.key, master=b"X" * 32, ckks_secret=generate_group_secret(f.parameters))
    with pytest.raises(CiphertextError, match="decrypts outside"):
        f.decrypt(record, even_row(f))


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_policy_violation_is_refused_on_both_sides(backend: str) -> None:
    f = federation(backend)
    uploads, record = exchange(f, vectors_for(f), even_row(f))
    bits = f.parameters.weight_bits
    full = 1 << bits
    violations = {
        "at least 3": WeightRow(("member-1",), (full,), bits),
        "above the cap": WeightRow(f.members[1:4], (full - 2, 1, 1), bits),
        "own weight must be 0": WeightRow(f.members[:4], (full // 4,) * 4, bits),
        "have 1[25]": WeightRow(f.members[1:], (1 << (bits - 3),) * 4, bits - 1),
    }
    server = f.aggregator()
    server.aggregate(uploads, {"member-0": even_row(f)}, f.context)  # checked once, it excuses nothing later
    for message, row in violations.items():
        with pytest.raises(PolicyError, match=message):
            server.aggregate(uploads, {"member-0": row}, f.context)
        with pytest.raises(PolicyError, match=message):
            f.decrypt(record, row)
    del uploads["member-1"]
    for _ in range(2):
        with pytest.raises(PolicyError, match="outside the roster"):
            server.aggregate(uploads, {"member-0": even_row(f)}, f.context)


@pytest.mark.parametrize("backend", ENCRYPTED)
def test_contributors_without_the_key_are_refused_by_the_client(backend: str) -> None:
    f = federation(backend)
    _, record = exchange(f, vectors_for(f), even_row(f))
    row = replace(even_row(f), contributors=("member-1", "member-2", "member-3", "ghost"))
    with pytest.raises(PolicyError, match="outside the roster: ghost"):
        f.decrypt(record, row)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_is_not_the_one_used_is_refused(backend: str) -> None:
    f = federation(backend)
    _, record = exchange(f, vectors_for(f), even_row(f))
    other = f.row(dict(zip(f.members[1:], (0.4, 0.3, 0.2, 0.1), strict=True)))
    with pytest.raises(CiphertextError, match="another weight row"):
        f.decrypt(record, other)


def test_mask_detects_a_server_that_lies_about_the_row_it_used() -> None:
    """The forged record names the harmless row, but holds the sum of a one-hot row."""
    f = federation("mask")
    vectors = vectors_for(f)
    uploads = f.encrypt(vectors)
    honest = even_row(f)
    greedy = AggregationPolicy(minimum_contributors=1, weight_cap=1.0, squares_cap=1.0)
    one_hot = f.row({"member-1": 1.0})
    stolen = bytes(
        create_aggregator(f.parameters, greedy).aggregate(uploads, {"member-0": one_hot}, f.context)[0]
    )
    template = f.aggregate(uploads, honest)
    forged = template[: HEADER_BYTES + 4 * 16] + stolen[HEADER_BYTES + 16 :]
    with pytest.raises(CiphertextError, match="decrypts outside"):
        f.decrypt(forged, honest)


@pytest.mark.parametrize("backend", ENCRYPTED)
def test_one_altered_upload_ends_at_the_recipient(backend: str) -> None:
    """What the server would do that alters an upload itself, or checks no signatures."""
    f = federation(backend, 4096)
    uploads = f.encrypt(vectors_for(f))
    size = len(uploads["member-1"])
    positions = [HEADER_BYTES + 40] if backend == "ckks" else range(HEADER_BYTES, size)
    altered = bytearray(uploads["member-1"])
    for position in positions:
        altered[position] ^= 0x5A
    uploads["member-1"] = bytes(altered)
    record = f.aggregate(uploads, even_row(f))
    with pytest.raises(CiphertextError, match="decrypts outside"):
        f.decrypt(record, even_row(f))


@pytest.mark.parametrize("position", [0, 31, 32, 32 + 6 * 2048, -1])
def test_any_altered_ckks_byte_of_an_aggregate_or_seed_is_noticed(position: int) -> None:
    f = federation("ckks", 2048)
    row = even_row(f)
    uploads, record = exchange(f, vectors_for(f), row)
    for source in ("aggregate", "upload"):
        target = record if source == "aggregate" else uploads["member-1"]
        altered = bytearray(target)
        index = position if position < 0 else min(HEADER_BYTES + position, len(altered) - 1)
        altered[index] ^= 1
        spoiled = bytes(altered)
        forged = spoiled if source == "aggregate" else f.aggregate(uploads | {"member-1": spoiled}, row)
        with pytest.raises(CiphertextError, match=r"decrypts outside|not below the modulus"):
            f.decrypt(forged, row)


def test_residues_at_or_above_the_modulus_are_refused_on_both_sides() -> None:
    f = federation("ckks")
    uploads, record = exchange(f, vectors_for(f), even_row(f))
    modulus = CkksParameters().modulus.to_bytes(6, "little")
    start = HEADER_BYTES + 32
    for word in (modulus, b"\xff" * 6):
        bad = uploads["member-1"][:start] + word + uploads["member-1"][start + 6 :]
        with pytest.raises(CiphertextError, match="upload of 'member-1' holds residues"):
            f.aggregator().check_upload(bad, f.context, "member-1")
        with pytest.raises(CiphertextError, match="upload of 'member-1' holds residues"):
            f.aggregate(uploads | {"member-1": bad}, even_row(f))
        with pytest.raises(CiphertextError, match="aggregate holds residues"):
            f.decrypt(record[:-6] + word, even_row(f))
    largest = (CkksParameters().modulus - 1).to_bytes(6, "little")
    f.aggregator().check_upload(
        uploads["member-1"][:start] + largest + uploads["member-1"][start + 6 :], f.context, "member-1"
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, 4.5, -4.5])
def test_plain_values_out_of_range_are_refused(value: float) -> None:
    f = federation("plain")
    uploads, record = exchange(f, vectors_for(f), even_row(f))
    word = np.array([value], dtype="<f4").tobytes()
    with pytest.raises(CiphertextError, match=r"outside ±4|NaN or infinite"):
        f.aggregator().check_upload(uploads["member-1"][:-4] + word, f.context, "member-1")
    with pytest.raises(CiphertextError, match="outside ±4"):
        f.cipher("member-0").decrypt(record[:-4] + word, None, f.context, even_row(f))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_give_no_aggregates(backend: str) -> None:
    f = federation(backend)
    assert f.aggregator().aggregate({}, {}, f.context) == []


def test_the_server_side_needs_no_key_no_cipher_and_no_homomorphic_library() -> None:
    script = (
        "import sys\n"
        "import fedmosaic.privacy.encryption.aggregators as a\n"
        "from fedmosaic.privacy.encryption.parameters import CkksParameters\n"
        "from fedmosaic.privacy.policy import AggregationPolicy\n"
        "a.create_aggregator(CkksParameters(), AggregationPolicy())\n"
        "heavy = {'tenseal', 'torch', 'transformers', 'peft', 'opacus'} & set(sys.modules)\n"
        "ours = [m for m in sys.modules if m.startswith('fedmosaic.privacy')]\n"
        "print([*heavy, *(m for m in ours if 'key' in m or 'cipher' in m or 'seal' in m)])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
