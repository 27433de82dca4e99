"""SEAL's serialized objects as numpy arrays: the few containers that the client builds for itself.

Only words that were checked against the modulus enter a container, and only containers built here are
loaded: no byte from the network reaches SEAL's parser.

Reference: Microsoft SEAL 4.x, native/src/seal: serialization.h (SEALHeader), dynarray.h, plaintext.cpp and
ciphertext.cpp (save_members).
"""

import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MAGIC = 0xA15E
_HEADER = struct.Struct("<HBBBBHQ")
_NO_COMPRESSION = 0


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
