"""Masks from seeds, and vectors of b-bit integers as bytes."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedmosaic.privacy.groupkey.messages import sha256
from fedmosaic.privacy.secureaggregation.shamir import SHARE_BYTES
from fedmosaic.protos.errors import EncryptionError

WordArray = npt.NDArray[np.unsignedinteger[Any]]
_KEY_BYTES: Final = 32


def derive(secret: bytes, *info: bytes) -> bytes:
    """32 bytes of HKDF-SHA256 (RFC 5869) of a secret, for one purpose."""
    return HKDF(hashes.SHA256(), _KEY_BYTES, salt=None, info=b"|".join(info)).derive(secret)


def private_key(seed: int, digest: bytes) -> X25519PrivateKey:
    """The X25519 key for pairwise masks that a seed stands for: whoever has the one has the other."""
    return X25519PrivateKey.from_private_bytes(
        derive(seed.to_bytes(SHARE_BYTES, "little"), b"fedmosaic/secure-sum/mask-key", digest)
    )


def self_mask_key(seed: int, digest: bytes) -> bytes:
    """Key of a member's own mask."""
    return derive(seed.to_bytes(SHARE_BYTES, "little"), b"fedmosaic/secure-sum/self-mask", digest)


def pair_mask_key(own: X25519PrivateKey, other: bytes, digest: bytes, pair: tuple[str, str]) -> bytes:
    """Key of the mask that two members have in common; `digest` is that of the openings.

    Their names are in it: a member that opens with another's key has no mask in common with that one, which
    could take it off with its own.
    """
    names = sha256(b"secure-sum/pair", *(name.encode() for name in sorted(pair)))
    return derive(agree(own, other), b"fedmosaic/secure-sum/pair-mask", digest, names)


def agree(own: X25519PrivateKey, other: bytes) -> bytes:
    """X25519 (RFC 7748); EncryptionError where the other's key is of small order."""
    try:
        return own.exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError:
        raise EncryptionError("a member's public key is no usable X25519 key") from None


class Masks:
    """Masks of D words of b bits, each made in the same buffer: one is gone when the next is asked for."""

    def __init__(self, dimensions: int, bits: int) -> None:
        kind = _words(bits)
        self._zeros = bytes(kind.itemsize * dimensions)
        # The cipher asks for room for one block more, less a byte.
        self._stream = bytearray(len(self._zeros) + 15)
        self._words = np.frombuffer(self._stream, dtype=kind, count=dimensions)

    def of(self, key: bytes) -> WordArray:
        """(D,) words of AES-256 in counter mode, uniform modulo 2**bits; a key serves one mask only.

        Higher bits take part in sums, which are reduced once at the end.
        """
        Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update_into(self._zeros, self._stream)
        return self._words


def to_words(values: npt.NDArray[np.int64], bits: int) -> WordArray:
    """Integers as words modulo 2**bits, negative ones in two's complement."""
    return _reduced(values.astype(np.uint64).astype(_words(bits)), bits)


def from_words(words: WordArray, bits: int) -> npt.NDArray[np.int64]:
    """The integers in [−2**(bits−1), 2**(bits−1)) that words modulo 2**bits stand for."""
    values = _reduced(words, bits).astype(np.int64)
    return np.where(values >= 1 << (bits - 1), values - (1 << bits), values)


def pack(words: WordArray, bits: int) -> bytes:
    """D words as ⌈D·bits/8⌉ bytes, lowest bit first."""
    kind = _words(bits)
    plain = _reduced(words, bits).astype(kind)
    if bits == 8 * kind.itemsize:
        return plain.tobytes()
    rows = np.unpackbits(plain.view(np.uint8).reshape(len(plain), kind.itemsize), axis=1, bitorder="little")
    return np.packbits(rows[:, :bits].ravel(), bitorder="little").tobytes()


def unpack(data: bytes, dimensions: int, bits: int) -> WordArray:
    """What `pack` was given; EncryptionError for another length."""
    expected = (dimensions * bits + 7) // 8
    if len(data) != expected:
        raise EncryptionError(f"a masked vector of {len(data)} bytes, expected {expected}")
    kind = _words(bits)
    if bits == 8 * kind.itemsize:
        return np.frombuffer(data, dtype=kind)
    flat = np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=dimensions * bits, bitorder="little")
    rows = np.zeros((dimensions, 8 * kind.itemsize), dtype=np.uint8)
    rows[:, :bits] = flat.reshape(dimensions, bits)
    return np.packbits(rows, axis=1, bitorder="little").view(kind).ravel()


def _words(bits: int) -> "np.dtype[np.unsignedinteger[Any]]":
    return np.dtype("<u4") if bits <= 32 else np.dtype("<u8")


def _reduced(words: WordArray, bits: int) -> WordArray:
    kind = words.dtype
    if bits == 8 * kind.itemsize:
        return words
    return words & kind.type((1 << bits) - 1)
