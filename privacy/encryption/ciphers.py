"""Choose a back end, at the client. The homomorphic library is loaded when `ckks` first makes use of it."""

from typing import Any

from fedmosaic.privacy.encryption.cipher import ClientCipher
from fedmosaic.privacy.encryption.ckks.cipher import CkksCipher, generate_secret, secret_bytes
from fedmosaic.privacy.encryption.mask.cipher import MaskCipher
from fedmosaic.privacy.encryption.parameters import (
    CkksParameters,
    MaskParameters,
    Parameters,
    check_plaintext_allowed,
)
from fedmosaic.privacy.encryption.plain.cipher import PlainCipher
from fedmosaic.privacy.policy import AggregationPolicy


def create_cipher(
    parameters: Parameters, client: str, policy: AggregationPolicy, *, allow_plaintext: bool = False
) -> ClientCipher[Any]:
    """Return the client's side of a back end.

    Args:
        parameters: Agreed parameters; their type names the back end.
        client: Id of the client that this process acts for.
        policy: Limits every weight row must keep.
        allow_plaintext: Must be true for `plain`.

    Raises:
        ConfigurationError: If the parameters protect nothing and that was not allowed.
    """
    check_plaintext_allowed(parameters, allow_plaintext=allow_plaintext)
    if isinstance(parameters, CkksParameters):
        return CkksCipher(parameters, client, policy)
    if isinstance(parameters, MaskParameters):
        return MaskCipher(parameters, client, policy)
    return PlainCipher(parameters, client, policy)


def generate_group_secret(parameters: Parameters) -> bytes:
    """Return what the leader of a key agreement adds to the 32-byte group key: a CKKS secret, or nothing."""
    return generate_secret(parameters) if isinstance(parameters, CkksParameters) else b""


def group_secret_bytes(parameters: Parameters) -> int:
    """Return the length of `generate_group_secret(parameters)`."""
    return secret_bytes(parameters) if isinstance(parameters, CkksParameters) else 0
