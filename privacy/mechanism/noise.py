"""Where the randomness of private releases comes from.

Real runs draw from AES-256 in counter mode under a key that is fresh from the operating system for
every call, so that no state can be repeated by a fork, a thread or a restored snapshot of this
process. Every Gaussian is the sum of four independent Box-Muller variates, halved: recovering the noise
from its low bits (Mironov, CCS 2012) then means searching the joint space of all their uniforms (Holohan and
Braghin, "Secure random sampling in differential privacy", ESORICS 2021, section 4). And
`fedmosaic.privacy.mechanism.gaussian` adds it on a grid of integers, where rounding commutes with addition.
"""

import math
import os
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedmosaic.protos.errors import MechanismError

Float64Array = npt.NDArray[np.float64]
UInt64Array = npt.NDArray[np.uint64]
IntArray = npt.NDArray[np.int64]

GAUSSIANS_PER_VARIATE: Final = 4


class NoiseSource(Protocol):
    """A generator of Gaussian noise; whoever releases something private asks for one by argument."""

    @property
    def is_test(self) -> bool:
        """Whether the draws can be predicted, so that no privacy guarantee holds."""
        ...

    def gaussian(self, size: int, standard_deviation: float) -> Float64Array:
        """Draw (size,) independent centred Gaussians, of a finite standard deviation ≥ 0, in float64."""
        ...


class BitSource(Protocol):
    """A generator of uniform 64-bit words."""

    def words(self, size: int) -> UInt64Array:
        """Draw words of shape (size,), uniform over [0, 2**64)."""
        ...


class Randomness(NoiseSource, BitSource, Protocol):
    """What a release draws from: noise, and words for the Poisson sample."""


class SecureNoise:
    """Cryptographically secure noise, the default everywhere.

    Reference:
        NIST SP 800-38A section 6.5 (counter mode); Box and Muller 1958; Holohan and Braghin 2021.
    """

    @property
    def is_test(self) -> bool:
        """False: these draws support the guarantees that the report states."""
        return False

    def words(self, size: int) -> UInt64Array:
        """Draw words of shape (size,), uniform over [0, 2**64)."""
        _check_size(size)
        # A key serves one call only, so the counter can start at zero.
        stream = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16))).encryptor()
        return np.frombuffer(stream.update(bytes(8 * size)), dtype="<u8").astype(np.uint64)

    def gaussian(self, size: int, standard_deviation: float) -> Float64Array:
        """Draw Gaussians of shape (size,); see `NoiseSource.gaussian`."""
        _check_size(size)
        _check_standard_deviation(standard_deviation)
        words = self.words(GAUSSIANS_PER_VARIATE * size).reshape(2, GAUSSIANS_PER_VARIATE // 2, size)
        # (0, 1], so that the logarithm is finite; 53 bits, all that a double can hold.
        radius_uniform = ((words[0] >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53
        angle = (words[1] >> np.uint64(11)).astype(np.float64) * (2.0**-53 * math.tau)
        radius = np.sqrt(-2.0 * np.log(radius_uniform))
        # Cosine and sine of one pair are two independent variates: their sum has variance 2.
        total = (radius * (np.cos(angle) + np.sin(angle))).sum(axis=0)
        return np.asarray(total * (standard_deviation / math.sqrt(GAUSSIANS_PER_VARIATE)), dtype=np.float64)


class SeededTestNoise:
    """Repeatable noise for tests and experiments; a run that used it has no privacy guarantee."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(seed))

    @property
    def is_test(self) -> bool:
        """True: whoever knows the seed can take the noise off again."""
        return True

    def words(self, size: int) -> UInt64Array:
        """Draw words of shape (size,), uniform over [0, 2**64)."""
        _check_size(size)
        return self._generator.integers(0, 2**64, size=size, dtype=np.uint64)

    def gaussian(self, size: int, standard_deviation: float) -> Float64Array:
        """Draw Gaussians of shape (size,); see `NoiseSource.gaussian`."""
        _check_size(size)
        _check_standard_deviation(standard_deviation)
        return self._generator.standard_normal(size) * standard_deviation


def poisson_sample(size: int, rate: float, source: BitSource) -> IntArray:
    """Include each of `size` examples independently with probability `rate`; ascending indices, int64.

    The probability is rounded down to a multiple of 2**-64, so no example is ever more likely to take part
    than the accountant was told. The sample may be empty: the caller must then release noise alone, and pay
    for it.

    Reference:
        Mironov, Talwar and Zhang 2019, "Rényi differential privacy of the sampled Gaussian mechanism".
    """
    _check_size(size)
    if not 0.0 < rate <= 1.0:
        raise MechanismError(f"The sampling rate is {rate!r}, but must be in (0, 1]; 1 uses every example.")
    if rate == 1.0:
        return np.arange(size, dtype=np.int64)
    threshold = np.uint64(math.floor(math.ldexp(rate, 64)))
    return np.flatnonzero(source.words(size) < threshold).astype(np.int64)


def _check_size(size: int) -> None:
    if size < 0:
        raise MechanismError(f"{size} random numbers were asked for; ask for 0 or more.")


def _check_standard_deviation(standard_deviation: float) -> None:
    if not math.isfinite(standard_deviation) or standard_deviation < 0.0:
        raise MechanismError(f"the noise's standard deviation is {standard_deviation!r}, not finite and ≥ 0")
