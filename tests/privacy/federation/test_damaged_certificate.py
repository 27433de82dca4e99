"""A certificate whose key cannot be read is refused by name where it is read."""

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

import builders
from fedmosaic.privacy.federation import identity
from fedmosaic.protos.errors import IdentityError

CURVE = bytes.fromhex("2a8648ce3d030107")
"""P-256, as DER writes it."""


@pytest.mark.parametrize("curve", [CURVE[:-1] + b"\x63", CURVE[:-1] + b"\x01"], ids=["unknown", "another"])
def test_a_certificate_with_a_key_on_no_known_curve_is_none(curve: bytes, tmp_path: Path) -> None:
    issued = builders.issue_client(identity.create_authority("vectors"), "vectors", "ben")
    encoding = serialization.Encoding
    der = x509.load_pem_x509_certificate(issued.certificate_pem).public_bytes(encoding.DER)
    damaged = x509.load_der_x509_certificate(der.replace(CURVE, curve))
    path = tmp_path / "tls.pem"
    path.write_bytes(damaged.public_bytes(encoding.PEM))
    with pytest.raises(IdentityError, match=r"tls\.pem: not a PEM certificate"):
        identity.read_certificate(path)
