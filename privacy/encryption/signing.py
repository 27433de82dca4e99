"""Signatures on uploads: 64 bytes after the record, over all of it.

The header inside names federation, section, epoch, round, client, nonce and parameters, so a signature is
good for one place only.
"""

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedmosaic.protos.errors import CiphertextError

SIGNATURE_BYTES = 64
_LABEL = b"fedmosaic/upload/v1\n"


def sign_upload(upload: bytes, identity: Ed25519PrivateKey) -> bytes:
    """Append the contributor's signature to an upload.

    Args:
        upload: Record from `ClientCipher.encrypt`.
        identity: Long-term key that the roster pins for the contributor.

    Returns:
        The record and 64 bytes more.
    """
    return upload + identity.sign(_LABEL + upload)


def open_upload(signed: bytes, identity_key: bytes, client: str) -> bytes:
    """Verify and remove the signature of an upload.

    Args:
        signed: Bytes from the network.
        identity_key: Raw Ed25519 public key (32 bytes) that the roster pins for the contributor.
        client: Its id, for the message.

    Returns:
        The record, signed by this contributor but not yet checked otherwise.

    Raises:
        CiphertextError: If the signature is not good.
    """
    if len(signed) <= SIGNATURE_BYTES:
        raise CiphertextError(f"upload of {client!r} has {len(signed)} bytes, too short to be signed")
    upload, signature = signed[:-SIGNATURE_BYTES], signed[-SIGNATURE_BYTES:]
    try:
        Ed25519PublicKey.from_public_bytes(identity_key).verify(signature, _LABEL + upload)
    except InvalidSignature:
        raise CiphertextError(
            f"upload of {client!r} is not signed by the identity key that the roster pins for it"
        ) from None
    return upload
