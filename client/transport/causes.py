"""Why a call to the server failed: what it means, and what to do.

The C core of gRPC tells causes apart in words only; the words here are those of grpcio 1.74 to 1.85, and the
tests make each of them happen. What is not known is passed on, and tried again.
"""

import contextlib
import os
import re
import socket
import ssl
from typing import Final, NamedTuple

from cryptography import x509

from fedmosaic.privacy.federation.identity import certificate_names
from fedmosaic.privacy.federation.names import is_local

_HANDSHAKE_SECONDS: Final = 5.0
_PROXY_VARIABLES: Final = ("grpc_proxy", "https_proxy", "http_proxy")
"""In the order in which gRPC reads them."""
_CREDENTIALS: Final = re.compile(r"(?<=://)[^/@\s]*@|^[^/@\s]*@")
_FINAL: Final = {
    "certificate has expired": "the server's certificate has expired (if this machine's clock is right); "
    "have the consortium approve its request again (`fedmosaic keys approve`)",
    "certificate is not yet valid": "the server's certificate is not valid yet; compare the clocks of both "
    "machines",
    "unsupported certificate purpose": "what listens there shows a certificate that is not a server's; "
    "the server has to be started from federation/server",
    "CERTIFICATE_VERIFY_FAILED": "what listens there has no certificate of this federation's authority; "
    "check the address, and that both kits are of one federation",
    "WRONG_VERSION_NUMBER": "what listens there does not speak TLS, so it is not the federation's server; "
    "check address and port",
}
_PASSING: Final = {
    "errors resolving": "the name cannot be found; check it, and this machine's network",
    "address lookup failed": "the name cannot be found; check it, and this machine's network",
    "Connection refused": "nothing listens there; check the address and that the server runs",
    "No route to host": "there is no way to this machine; check the address, the network and firewalls",
    "Network is unreachable": "there is no way to this network; check this machine's connection",
    "Handshake read failed": "the connection was closed before TLS was agreed; check address and port",
    "Socket closed": "the server closed the connection; if this repeats, it refuses this client's "
    "certificate, and its log says why if it is started with GRPC_VERBOSITY=INFO",
    "DEADLINE_EXCEEDED": "no answer in time; check the address, the network and firewalls",
}


class Cause(NamedTuple):
    """Why a call failed: what it means and what to do, and whether trying again is in vain meanwhile."""

    words: str
    final: bool = False


def explain(text: str, address: str) -> Cause:
    """Say what a failed call to an address means, by gRPC's text with the status code.

    A proxy is named wherever it may stand in between.
    """
    if "Hostname Verification Check failed" in text:
        named = ", ".join(_presented_names(address)) or "other names"
        return Cause(
            f"the server's certificate is for {named}; set server in client.toml to one of these, or have "
            "the server request this one, too (`fedmosaic keys request --hosts`)",
            final=True,
        )
    through = _proxy(address)
    for mark, words in _FINAL.items():
        if mark in text:
            return Cause(words + through, final=True)
    for mark, words in _PASSING.items():
        if mark in text:
            return Cause(f"{words}{through} ({text})")
    return Cause(f"{text}{through}")


def _proxy(address: str) -> str:
    """The proxy that gRPC goes through, with its remedy; empty for none. Nothing secret is told."""
    host = address.rpartition(":")[0].strip("[]")
    without = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy", "")
    if is_local(address) or any(host.endswith(end.strip()) for end in without.split(",") if end.strip()):
        return ""
    for variable in _PROXY_VARIABLES:
        if value := os.environ.get(variable):
            shown = _CREDENTIALS.sub("", value)
            return (
                f"; {variable}={shown} is set, and leads there unless no_proxy names the server: "
                f"set no_proxy={host} to go without it"
            )
    return ""


def _presented_names(address: str) -> list[str]:
    """The names in the certificate that is shown at an address; empty if it cannot be had.

    The certificate is only quoted: gRPC has refused the connection already.
    """
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with (
        contextlib.suppress(OSError, ValueError),
        socket.create_connection((host.strip("[]"), int(port)), _HANDSHAKE_SECONDS) as plain,
        context.wrap_socket(plain) as connection,
    ):
        shown = connection.getpeercert(binary_form=True)
        if shown:
            names = certificate_names(x509.load_der_x509_certificate(shown))
            return [name for name in names if name.isprintable()][:20]
    return []
