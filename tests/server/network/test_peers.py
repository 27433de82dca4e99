"""Who is calling is read from a verified certificate, and from nothing else."""

from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from fedmosaic.privacy.federation.identity import public_key_sha256
from fedmosaic.protos.refusal import Refusal
from fedmosaic.server.network.peers import identify


@pytest.fixture
def pem(authority: Any) -> bytes:
    return authority.client("clinic-a")[0].read_bytes()


def context(pem: bytes, name: str = "spiffe://fedmosaic/fed/client/clinic-a", **changes: list[bytes]) -> Any:
    return {
        "x509_subject_alternative_name": [name.encode()],
        "x509_pem_cert": [pem],
        "ssl_tls_version": [b"TLSv1.3"],
    } | changes


def test_a_member_is_identified(federation: Any, tmp_path: Path, pem: bytes) -> None:
    settings = federation.settings(tmp_path)
    assert identify(context(pem), settings) == "clinic-a"
    pin = public_key_sha256(x509.load_pem_x509_certificate(pem))
    pinned = settings.model_copy(update={"tls_key_sha256": {"clinic-a": pin}})
    assert identify(context(pem), pinned) == "clinic-a"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x509_pem_cert": []}, "no certificate"),
        ({"x509_subject_alternative_name": []}, "exactly one"),
        ({"x509_subject_alternative_name": [b"spiffe://fedmosaic/fed/client/clinic-a"] * 2}, "exactly one"),
        ({"x509_subject_alternative_name": [b"localhost"]}, "certificate names 'localhost'"),
        ({"x509_subject_alternative_name": [b"spiffe://fedmosaic/fed/client/\xff"]}, "certificate names"),
        ({"x509_subject_alternative_name": [b"spiffe://fedmosaic/fed/client/clinic-a/x"]}, "names"),
        ({"x509_subject_alternative_name": [b"spiffe://fedmosaic/other/client/clinic-a"]}, "'other'"),
        ({"x509_subject_alternative_name": [b"spiffe://fedmosaic/fed/client/mallory"]}, "not on the roster"),
        ({"ssl_tls_version": [b"TLSv1.2"]}, "uses TLSv1.2, expected TLSv1.3"),
    ],
)
def test_everybody_else_is_refused(
    federation: Any, tmp_path: Path, pem: bytes, changes: dict[str, list[bytes]], words: str
) -> None:
    with pytest.raises(Refusal, match=words):
        identify(context(pem, **changes), federation.settings(tmp_path))


def test_a_certificate_with_another_key_than_pinned_is_refused(
    federation: Any, tmp_path: Path, pem: bytes
) -> None:
    settings = federation.settings(tmp_path, tls_key_sha256={"clinic-a": "0" * 64})
    with pytest.raises(Refusal, match="another key"):
        identify(context(pem), settings)
