"""Parameters: what they promise, that their hash covers every field, and who refuses the rest."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from fedmosaic.privacy.encryption.parameters import (
    CKKS_MODULUS,
    CKKS_RING_DEGREE,
    CkksParameters,
    MaskParameters,
    Parameters,
    PlainParameters,
)


def test_the_prime_is_the_largest_of_its_kind_and_supports_the_transform() -> None:
    # 54 bits give 128 bits of security at n = 2048, ternary secrets (Homomorphic Encryption Standard, 2018).
    assert (CKKS_RING_DEGREE, CKKS_MODULUS.bit_length()) == (2048, 48)
    assert CKKS_MODULUS % (2 * CKKS_RING_DEGREE) == 1
    # Fermat tests exclude all but rare composites; SEAL's own choice is compared in test_encryption_ckks.py.
    assert all(
        pow(base, CKKS_MODULUS - 1, CKKS_MODULUS) == 1 for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29)
    )
    larger = range(CKKS_MODULUS + 2 * CKKS_RING_DEGREE, 1 << 48, 2 * CKKS_RING_DEGREE)
    assert not any(pow(2, candidate - 1, candidate) == 1 for candidate in larger)


def test_hashes_are_pinned() -> None:
    """A change of a default or of the canonical form breaks every running federation: it must be seen."""
    digests = {
        type(p).__name__: p.digest().hex()[:16]
        for p in (CkksParameters(), MaskParameters(), PlainParameters())
    }
    assert digests == PINNED


PINNED = {
    "CkksParameters": "3141476f409bb1e1",
    "MaskParameters": "cca85fe94108b47f",
    "PlainParameters": "70fbb4b4c31ba175",
}


def test_every_field_enters_the_hash() -> None:
    fields: list[dict[str, Any]] = [{}, {"clip": 2.0}, {"weight_bits": 11}]
    kinds = (CkksParameters, MaskParameters, PlainParameters)
    variants: list[Parameters] = [kind(**changed) for kind in kinds for changed in fields]
    variants += [CkksParameters(scale_bits=28), MaskParameters(fraction_bits=15)]
    assert len({variant.digest() for variant in variants}) == len(variants)
    assert all(len(variant.digest()) == 32 for variant in variants)
    assert CkksParameters(clip=4).digest() == CkksParameters(clip=4.0).digest()


@pytest.mark.parametrize(
    "fields",
    [
        {"scale_bits": 30},
        {"weight_bits": 16},
        {"clip": 8.0},
        {"scale_bits": 27},
        {"weight_bits": 17},
        {"ring_degree": 1024},
        {"modulus": 281474976710597},
        {"security_bits": 192},
        {"clip": math.nan},
        {"clip": 0.0},
        {"unknown": 1},
    ],
)
def test_ckks_parameters_that_could_wrap_or_weaken_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        CkksParameters(**fields)


def test_the_alternative_for_many_members_is_allowed() -> None:
    assert CkksParameters(scale_bits=28, weight_bits=16).weight_bits == 16


@pytest.mark.parametrize(
    "fields", [{"weight_bits": 13}, {"fraction_bits": 17}, {"clip": 4.1}, {"weight_bits": 21}]
)
def test_mask_parameters_without_a_free_bit_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        MaskParameters(**fields)
