"""Refused handshakes are explained; nothing else that is written to standard error is touched."""

import logging
import os

import pytest

from fedmosaic.server.native_log import explain, translated_native_log

LINE = (
    "I1121 08:00:38.437806    8672 ssl_transport_security.cc:2563] Handshake failed with error "
    "SSL_ERROR_SSL: error:1000007d:SSL routines:OPENSSL_internal:"
)


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("CERTIFICATE_VERIFY_FAILED: certificate has expired", "has expired; renew it"),
        ("CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate", "not from this federation"),
        ("CERTIFICATE_VERIFY_FAILED: unsupported certificate purpose", "not one for a client"),
        ("PEER_DID_NOT_RETURN_A_CERTIFICATE: Invalid context", "showed no certificate"),
        ("NO_SHARED_CIPHER: Invalid certificate verification context", "does not speak TLS 1.3"),
        ("SOMETHING_NEW: unheard of", "unheard of"),
    ],
)
def test_reasons_are_given_in_words(end: str, words: str) -> None:
    message = explain(LINE + end + "\n")
    assert message is not None
    assert message.startswith("refused a connection: ")
    assert words in message


def test_other_lines_are_not_explained() -> None:
    assert explain("W1121 some other warning of the C core\n") is None


def test_lines_pass_through_or_become_records_once(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    expired = (LINE + "CERTIFICATE_VERIFY_FAILED: certificate has expired\n").encode()
    with caplog.at_level(logging.WARNING), translated_native_log() as real:
        os.write(2, b"a traceback\n")
        os.write(2, expired * 5)
        os.write(2, b"the end\n")
        real.write("from a handler\n")
    assert "refused a connection: its certificate has expired" in caplog.text
    assert len(caplog.records) == 1
    written = capfd.readouterr().err
    assert "a traceback" in written
    assert "the end" in written
    assert "from a handler" in written
    assert "Handshake failed" not in written
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "afterwards\n"
