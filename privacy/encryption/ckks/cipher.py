"""Back end `ckks`, client side: approximate homomorphic encryption through `tenseal.sealapi`.

SEAL makes keys, encodes, samples errors, encrypts, decrypts and decodes. Two things are done around it
(docs/encryption.md). *Seeded uploads*: the phase v = c0 + c1·s of SEAL's ciphertext is sent as (v − a·s, a)
with a uniform `a` expanded from a fresh 32-byte seed; it has the distribution of a fresh symmetric
encryption, since `a` is uniform and independent of v. *Complex slots*: value pairs (x, y) become slots x +
iy; weights are real, so both parts stay apart, and one ciphertext carries n values.

Decryptions are approximate: together with its ciphertext, one exact decrypted vector reveals the secret key.
What `decrypt` returns must stay in the process. Reference: Li and Micciancio, "On the security of homomorphic
encryption on approximate numbers" (EUROCRYPT 2021); Cheon, Kim, Kim and Song (ASIACRYPT 2017).

SEAL's serialized objects are made here of words that were checked against the modulus, and only these are
loaded: no byte from the network reaches SEAL's parser. Reference: Microsoft SEAL 4.x, native/src/seal:
serialization.h (SEALHeader), dynarray.h, plaintext.cpp and ciphertext.cpp (save_members).
"""

import functools
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmosaic.privacy.encryption.cipher import RANGE_TOLERANCE, ClientCipher, out_of_range
from fedmosaic.privacy.encryption.ckks import modular
from fedmosaic.privacy.encryption.ckks.modular import SEED_BYTES, WORD_BYTES, expand_seed
from fedmosaic.privacy.encryption.parameters import CkksParameters
from fedmosaic.privacy.encryption.records import RoundContext, ring_blocks
from fedmosaic.privacy.groupkey.key import GroupKey
from fedmosaic.protos.errors import CiphertextError, EncryptionError
from fedmosaic.protos.messages import WeightRow

_MAGIC = 0xA15E
_HEADER = struct.Struct("<HBBBBHQ")
_NO_COMPRESSION = 0


def generate_secret(parameters: CkksParameters) -> bytes:
    """A fresh ternary secret in evaluation form, `secret_bytes` bytes that only members may see."""
    seal = _engine(parameters)
    # `data` refers into the key, which has to outlive it.
    key = seal.api.KeyGenerator(seal.context).secret_key()
    return _packed(_residues(key.data(), parameters.ring_degree))


def secret_bytes(parameters: CkksParameters) -> int:
    """Return the length of a secret."""
    return parameters.ring_degree * WORD_BYTES


class CkksCipher(ClientCipher[CkksParameters]):
    """Client side of the back end `ckks`."""

    def _seal(self, values: NDArray[np.float64], key: GroupKey | None, header: bytes, nonce: bytes) -> bytes:
        seal, secret = _engine(self.parameters), self._secret(key)
        degree, modulus = self.parameters.ring_degree, self.parameters.modulus
        blocks = ring_blocks(self.parameters, values.size)
        padded = np.zeros(blocks * degree)
        padded[: values.size] = values
        parts = padded.reshape(blocks, 2, degree // 2)
        slots = parts[:, 0] + 1j * parts[:, 1]
        seed = os.urandom(SEED_BYTES)
        uniform = np.empty((blocks, degree), dtype=np.uint64)
        expand_seed(seed, 0, uniform.reshape(-1), modulus)
        with seal_file() as file:
            secret_key = seal.secret_key(secret, file)
        encryptor = seal.api.Encryptor(seal.context, secret_key)
        decryptor = seal.api.Decryptor(seal.context, secret_key)
        plaintext, ciphertext, phase = seal.api.Plaintext(), seal.api.Ciphertext(), seal.api.Plaintext()
        first = np.empty((blocks, degree), dtype=np.uint64)
        for block in range(blocks):
            seal.encoder.encode(slots[block].tolist(), 2.0**self.parameters.scale_bits, plaintext)
            encryptor.encrypt_symmetric(plaintext, ciphertext)
            decryptor.decrypt(ciphertext, phase)
            masked = modular.modular_multiply(uniform[block], secret, modulus)
            first[block] = modular.modular_subtract(_residues(phase, degree), masked, modulus)
        return seed + _packed(first)

    def _open(
        self, payload: memoryview, key: GroupKey | None, context: RoundContext, row: WeightRow
    ) -> NDArray[np.float64]:
        seal, secret = _engine(self.parameters), self._secret(key)
        degree = self.parameters.ring_degree
        words = np.empty((2, ring_blocks(self.parameters, context.dimensions), degree), dtype=np.uint64)
        modular.unpack_words(bytes(2) + payload, 2, words.reshape(-1))
        if (words >= np.uint64(self.parameters.modulus)).any():
            raise CiphertextError("the aggregate holds residues that are not below the modulus")
        if not words[1].any(axis=1).all():
            raise CiphertextError("the aggregate has a second polynomial of zero: it needed no key")
        scale = 2.0 ** (self.parameters.scale_bits + self.parameters.weight_bits)
        values = np.empty((words.shape[1], 2, degree // 2))
        ciphertext, plaintext = seal.api.Ciphertext(), seal.api.Plaintext()
        with seal_file() as file:
            decryptor = seal.api.Decryptor(seal.context, seal.secret_key(secret, file))
            for block in range(words.shape[1]):
                container = seal.format.ciphertext(words[:, block].ravel(), scale)
                file.load(ciphertext, seal.context, container)
                decryptor.decrypt(ciphertext, plaintext)
                slots = np.array(seal.encoder.decode_complex(plaintext))
                values[block, 0], values[block, 1] = slots.real, slots.imag
        flat = values.ravel()
        padding = flat[context.dimensions :]
        # Padding was encrypted as zeros; anything else means altered words or another key.
        if padding.size and not np.abs(padding).max() <= RANGE_TOLERANCE:
            raise out_of_range(context, self.parameters.clip)
        return flat[: context.dimensions]

    def _secret(self, key: GroupKey | None) -> NDArray[np.uint64]:
        if key is None or len(key.ckks_secret) != secret_bytes(self.parameters):
            raise EncryptionError("back end 'ckks' needs a group key that was agreed with a CKKS secret")
        residues = np.empty(self.parameters.ring_degree, dtype=np.uint64)
        modular.unpack_words(bytes(2) + key.ckks_secret, 2, residues)
        if (residues >= np.uint64(self.parameters.modulus)).any():
            raise EncryptionError("the group's CKKS secret holds residues that are not below the modulus")
        return residues


class _Engine:
    """SEAL's objects that depend on public parameters only."""

    def __init__(self, parameters: CkksParameters) -> None:
        # Imported here so that only a client that encrypts loads the library.
        from tenseal import sealapi

        self.api: Any = sealapi
        settings = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.CKKS)
        settings.set_poly_modulus_degree(parameters.ring_degree)
        moduli = sealapi.CoeffModulus.Create(parameters.ring_degree, [parameters.modulus.bit_length()])
        if [modulus.value() for modulus in moduli] != [parameters.modulus]:
            raise EncryptionError(f"SEAL chooses other primes than {parameters.modulus}: install tenseal 0.3")
        settings.set_coeff_modulus(moduli)
        self.context: Any = sealapi.SEALContext(settings, True, sealapi.SEC_LEVEL_TYPE.TC128)
        if not self.context.parameters_set():
            raise EncryptionError(f"SEAL refuses the parameters: {self.context.parameters_error_message()}")
        self.encoder: Any = sealapi.CKKSEncoder(self.context)
        with seal_file() as file:
            version = file.version(settings)
        self.format = SealFormat(version, self.context.first_parms_id(), parameters.ring_degree)

    def secret_key(self, residues: NDArray[np.uint64], file: "SealFile") -> Any:
        """Return SEAL's secret key for (n,) residues of a secret in evaluation form."""
        key = self.api.SecretKey()
        file.load(key, self.context, self.format.plaintext(residues))
        return key


@functools.lru_cache(maxsize=4)
def _engine(parameters: CkksParameters) -> _Engine:
    return _Engine(parameters)


def _residues(plaintext: Any, degree: int) -> NDArray[np.uint64]:
    return np.fromiter(map(plaintext.__getitem__, range(degree)), dtype=np.uint64, count=degree)


def _packed(residues: NDArray[np.uint64]) -> bytes:
    packed = np.empty((1, residues.size * WORD_BYTES // 8), dtype="<u8")
    modular.pack_words(residues.reshape(1, -1), packed)
    return packed.tobytes()


class SealFile:
    """A place in memory with a path: sealapi reads and writes files only."""

    def __init__(self, path: str) -> None:
        self._path = path

    def load(self, target: Any, context: Any, content: bytes) -> None:
        """Load an object of sealapi from a container built here."""
        with open(self._path, "wb") as file:
            file.write(content)
        target.load(context, self._path)

    def version(self, source: Any) -> tuple[int, int]:
        """Return the major and minor version that this SEAL writes."""
        source.save(self._path)
        with open(self._path, "rb") as file:
            magic, _, major, minor, _, _, _ = _HEADER.unpack(file.read(_HEADER.size))
        if magic != _MAGIC:
            raise ValueError("the installed SEAL writes another format than 4.x")
        return major, minor


@contextmanager
def seal_file() -> Iterator[SealFile]:
    """Open a `SealFile`: anonymous memory on Linux, elsewhere a file that only this user can read.

    Secret keys pass through it, so elsewhere the temporary directory should be encrypted or in memory.
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("fedmosaic")
        try:
            yield SealFile(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield SealFile(os.path.join(folder, "object"))


class SealFormat:
    """Containers for one version and one set of parameters of SEAL, whose own hash of them is four words."""

    def __init__(self, version: tuple[int, int], parameters_id: list[int], ring_degree: int) -> None:
        self._version = version
        self._parameters_id = struct.pack("<4Q", *parameters_id)
        self._ring_degree = ring_degree

    def plaintext(self, residues: NDArray[np.uint64]) -> bytes:
        """A plaintext, or the one in a secret key, of (n,) residues in evaluation form."""
        body = self._parameters_id + struct.pack("<Qd", residues.size, 1.0) + self._array(residues)
        return self._with_header(body)

    def ciphertext(self, residues: NDArray[np.uint64], scale: float) -> bytes:
        """Two polynomials over one prime in evaluation form, of (2n,) residues, first polynomial first."""
        evaluation_form, polynomials, primes, correction = 1, 2, 1, 1
        metadata = struct.pack(
            "<BQQQdQ", evaluation_form, polynomials, self._ring_degree, primes, scale, correction
        )
        return self._with_header(self._parameters_id + metadata + self._array(residues))

    def _array(self, residues: NDArray[np.uint64]) -> bytes:
        content = residues.astype("<u8", copy=False).tobytes()
        return self._with_header(struct.pack("<Q", residues.size) + content)

    def _with_header(self, body: bytes) -> bytes:
        major, minor = self._version
        total = _HEADER.size + len(body)
        return _HEADER.pack(_MAGIC, _HEADER.size, major, minor, _NO_COMPRESSION, 0, total) + body
