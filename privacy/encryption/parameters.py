"""The frozen parameters of each back end, their hash for the roster, and the security they rest on."""

import functools
import hashlib
import math
from typing import Literal

from pydantic import Field, model_validator

from fedmosaic.privacy.configuration import Frozen, canonical_json
from fedmosaic.protos.errors import ConfigurationError

CKKS_RING_DEGREE: Literal[2048] = 2048
# The largest prime below 2^48 that is 1 modulo 4096; what SEAL's CoeffModulus.Create(2048, [48]) returns.
CKKS_MODULUS: Literal[281474976694273] = 281474976694273
# Centred binomial error of SEAL: the difference of two sums of 21 bits.
CKKS_ERROR_BOUND = 21

# Its 48 bits are below the 54 that give 128 bits of classical security at this degree for ternary secrets,
# and below SEAL's 51 for quantum security (Albrecht et al., Homomorphic Encryption Standard, 2018). SEAL
# checks the pair again when a client makes its context (`SEC_LEVEL_TYPE.TC128`).


class _Parameters(Frozen):
    format_version: Literal[1] = 1
    """Version of this table."""
    clip: float = Field(default=4.0, gt=0.0, le=1024.0, allow_inf_nan=False)
    """Largest absolute value that is sent."""

    def digest(self) -> bytes:
        """The SHA-256 of the canonical form: 32 bytes that go into the roster and every record."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> bytes:
        canonical = canonical_json(self.model_dump(mode="json"))
        return hashlib.sha256(b"fedmosaic/encryption-parameters/v1\n" + canonical.encode()).digest()


class CkksParameters(_Parameters):
    """CKKS in one small ring with one prime: depth one, integer weights, no keys besides the secret one.

    Attributes:
        ring_degree: n; one ciphertext carries n real values as n/2 complex slots.
        modulus: q, a 48-bit prime that is 1 modulo 2n.
        security_bits: Classical security asked of the pair (n, q).
        scale_bits: Values are multiplied by 2**scale_bits before they are rounded to integers.
        weight_bits: Integer weights of a row sum to 2**weight_bits.
        clip: Largest absolute value that is encrypted.
    """

    backend: Literal["ckks"] = "ckks"
    """Name of the back end."""
    ring_degree: Literal[2048] = CKKS_RING_DEGREE
    modulus: Literal[281474976694273] = CKKS_MODULUS
    security_bits: Literal[128] = 128
    scale_bits: int = Field(default=29, ge=28, le=34)
    weight_bits: int = Field(default=15, ge=8, le=16)

    @model_validator(mode="after")
    def _decryption_is_correct(self) -> "CkksParameters":
        # A slot x+iy has magnitude ≤ clip·√2, a coefficient of the encoded polynomial at most the largest
        # slot times the scale, plus ½ for rounding and the error. A row sums to 2^weight_bits, so the sum
        # stays below q/2 and never wraps.
        fresh = math.ldexp(self.clip * math.sqrt(2.0), self.scale_bits) + CKKS_ERROR_BOUND + 1
        if math.ldexp(fresh, self.weight_bits) >= self.modulus / 2:
            raise ValueError(
                f"clip {self.clip}, scale_bits {self.scale_bits} and weight_bits {self.weight_bits} "
                f"overflow the {self.modulus.bit_length()}-bit modulus: lower one of them"
            )
        return self


class MaskParameters(_Parameters):
    """Additive stream cipher over 32-bit words: fixed-point values, exact sums.

    Attributes:
        fraction_bits: A value is rounded to a multiple of 2**-fraction_bits.
        weight_bits: Integer weights of a row sum to 2**weight_bits.
        clip: Largest absolute value that is encrypted.
    """

    backend: Literal["mask"] = "mask"
    """Name of the back end."""
    fraction_bits: int = Field(default=16, ge=8, le=24)
    weight_bits: int = Field(default=12, ge=8, le=20)

    @model_validator(mode="after")
    def _sums_leave_one_bit_free(self) -> "MaskParameters":
        # Sums fill at most half of the 32-bit range. What lies in the other half was not unmasked with the
        # right pads, and every one of thousands of words has one chance in two to show it.
        if math.ldexp(self.clip, self.fraction_bits + self.weight_bits) > 2**30:
            raise ValueError(
                f"clip {self.clip}, fraction_bits {self.fraction_bits} and weight_bits {self.weight_bits} "
                "need more than 31 bits: lower one of them"
            )
        return self


class PlainParameters(_Parameters):
    """No protection: float32 values that the server reads. For comparison only.

    Attributes:
        weight_bits: Integer weights of a row sum to 2**weight_bits.
        clip: Largest absolute value that is sent.
    """

    backend: Literal["plain"] = "plain"
    """Name of the back end."""
    weight_bits: int = Field(default=15, ge=8, le=20)


Parameters = CkksParameters | MaskParameters | PlainParameters


def check_plaintext_allowed(parameters: Parameters, *, allow_plaintext: bool) -> None:
    """Refuse the back end `plain`, with a ConfigurationError, unless it is asked for by name."""
    if isinstance(parameters, PlainParameters) and not allow_plaintext:
        raise ConfigurationError(
            "encryption back end 'plain' lets the server read every adapter: choose another, or "
            "allow_plaintext = true"
        )
