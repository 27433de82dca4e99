"""Choose a back end, at the client; and `plain`, float32 values that everybody who handles them can read.

The homomorphic library is loaded when `ckks` first makes use of it.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmosaic.privacy.encryption import parameters as back_ends
from fedmosaic.privacy.encryption.cipher import ClientCipher
from fedmosaic.privacy.encryption.ckks.cipher import CkksCipher, generate_secret, secret_bytes
from fedmosaic.privacy.encryption.mask.cipher import MaskCipher
from fedmosaic.privacy.encryption.records import RoundContext
from fedmosaic.privacy.groupkey.key import GroupKey
from fedmosaic.privacy.policy import AggregationPolicy
from fedmosaic.protos.messages import WeightRow


def create_cipher(
    parameters: back_ends.Parameters, client: str, policy: AggregationPolicy, *, allow_plaintext: bool = False
) -> ClientCipher[Any]:
    """The client's side of a back end; ConfigurationError if it protects nothing and that was not allowed."""
    back_ends.check_plaintext_allowed(parameters, allow_plaintext=allow_plaintext)
    if isinstance(parameters, back_ends.CkksParameters):
        return CkksCipher(parameters, client, policy)
    if isinstance(parameters, back_ends.MaskParameters):
        return MaskCipher(parameters, client, policy)
    return PlainCipher(parameters, client, policy)


def generate_group_secret(parameters: back_ends.Parameters) -> bytes:
    """What the leader of a key agreement adds to the 32-byte group key: a CKKS secret, or nothing."""
    return generate_secret(parameters) if isinstance(parameters, back_ends.CkksParameters) else b""


def group_secret_bytes(parameters: back_ends.Parameters) -> int:
    """The length of `generate_group_secret(parameters)`."""
    return secret_bytes(parameters) if isinstance(parameters, back_ends.CkksParameters) else 0


class PlainCipher(ClientCipher[back_ends.PlainParameters]):
    """Client side of the back end `plain`."""

    def _seal(self, values: NDArray[np.float64], key: GroupKey | None, header: bytes, nonce: bytes) -> bytes:
        return values.astype("<f4").tobytes()

    def _open(
        self, payload: memoryview, key: GroupKey | None, context: RoundContext, row: WeightRow
    ) -> NDArray[np.float64]:
        return np.frombuffer(payload, dtype="<f4").astype(np.float64)
