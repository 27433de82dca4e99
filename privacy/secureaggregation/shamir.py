"""Shamir's secret sharing over the integers modulo 2^127 − 1.

Reference: Shamir, "How to share a secret", CACM 22(11), 1979.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Final

from fedmosaic.protos.errors import EncryptionError

PRIME: Final = 2**127 - 1
SHARE_BYTES: Final = 16

RandomBytes = Callable[[int], bytes]


def draw_element(random_bytes: RandomBytes) -> int:
    """Draw a uniform element, 0 … PRIME − 1."""
    while True:
        # 127 bits are below the prime but for one value in 2^127, which is drawn again.
        value = int.from_bytes(random_bytes(SHARE_BYTES), "little") >> 1
        if value < PRIME:
            return value


def share(secret: int, threshold: int, holders: int, random_bytes: RandomBytes) -> tuple[int, ...]:
    """Split a secret so that any `threshold` shares, at points 1 …, give it back and fewer say nothing."""
    if not 0 <= secret < PRIME or not 1 <= threshold <= holders:
        raise EncryptionError(f"a secret cannot be shared {threshold} out of {holders}")
    coefficients = [secret, *(draw_element(random_bytes) for _ in range(threshold - 1))]
    return tuple(_evaluate(coefficients, point) for point in range(1, holders + 1))


def _evaluate(coefficients: Sequence[int], point: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % PRIME
    return value


def combine(shares: Sequence[int], weights: Sequence[int]) -> int:
    """The secret behind shares, as many as the threshold, by `lagrange_weights` of their points."""
    return sum(value * weight for value, weight in zip(shares, weights, strict=True)) % PRIME


def lagrange_weights(points: Sequence[int]) -> tuple[int, ...]:
    """Weights that turn the values of a polynomial at distinct points into its value at zero."""
    # Points are small, so products reduced once at the end are faster than ones reduced at every factor.
    whole, weights = prod(points), []
    for point in points:
        denominator = point * prod(other - point for other in points if other != point)
        weights.append(whole * pow(denominator, -1, PRIME) % PRIME)
    return tuple(weights)
