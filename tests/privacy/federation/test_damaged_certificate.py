"""Certificates and keys that the library cannot make sense of are refused by name where they are read."""

import base64
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import builders
from fedmosaic.privacy.federation import identity
from fedmosaic.protos.errors import IdentityError

CURVE = bytes.fromhex("2a8648ce3d030107")
"""P-256, as DER writes it."""
ED25519 = b"\x06\x03\x2b\x65\x70"


VERSION = b"\xa0\x03\x02\x01"
"""What stands before the version in a certificate."""


@pytest.mark.parametrize(
    ("whole", "damage"),
    [(CURVE, CURVE[:-1] + b"\x63"), (CURVE, CURVE[:-1] + b"\x01"), (VERSION + b"\x02", VERSION + b"\x0a")],
    ids=["unknown curve", "another curve", "no version"],
)
def test_a_certificate_that_says_what_none_says_is_none(whole: bytes, damage: bytes, tmp_path: Path) -> None:
    path = damaged(tmp_path, whole, damage)
    with pytest.raises(IdentityError, match=r"tls\.pem: not a PEM certificate"):
        identity.read_certificate(path)


def damaged(folder: Path, whole: bytes, damage: bytes) -> Path:
    """A member's certificate with other bytes in it."""
    issued = builders.issue_client(identity.create_authority("vectors"), "vectors", "ben")
    der = x509.load_pem_x509_certificate(issued.certificate_pem).public_bytes(serialization.Encoding.DER)
    assert whole in der
    path = folder / "tls.pem"
    text = base64.encodebytes(der.replace(whole, damage, 1)).decode()
    path.write_text(f"-----BEGIN CERTIFICATE-----\n{text}-----END CERTIFICATE-----\n")
    return path


def test_a_certificate_with_an_extension_twice_names_nobody(tmp_path: Path) -> None:
    path = damaged(tmp_path, b"\x55\x1d\x0f", b"\x55\x1d\x11")  # key usage becomes alternative names
    with pytest.raises(IdentityError, match=r"tls\.pem: not a certificate of this federation"):
        identity.certificate_uris(path)
    assert identity.certificate_names(identity.read_certificate(path)) == []


def test_a_key_of_another_length_than_its_algorithm_has_is_none(tmp_path: Path) -> None:
    """Named X448 by one byte, OpenSSL fails on it in a way of its own."""
    whole = (serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    der = Ed25519PrivateKey.generate().private_bytes(*whole)
    text = base64.b64encode(der.replace(ED25519, ED25519[:-1] + b"\x6f")).decode()
    path = tmp_path / "identity.key"
    path.write_text(f"-----BEGIN PRIVATE KEY-----\n{text}\n-----END PRIVATE KEY-----\n")
    path.chmod(0o600)
    with pytest.raises(IdentityError, match=r"identity\.key: not a private key"):
        identity.read_signing_key(path)
