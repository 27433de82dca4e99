"""The web server of the dashboard: two pages for whoever has the password, over TLS or on loopback."""

import hmac
import ipaddress
import logging
import secrets
import socket
import socketserver
import ssl
import sys
import threading
import time
from base64 import b64encode
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedmosaic.privacy.federation.identity import check_pair
from fedmosaic.privacy.statement import plain
from fedmosaic.privacy.statement.words import ADVERSARY_NAMES
from fedmosaic.protos.errors import ConfigurationError, FedMosaicError
from fedmosaic.server.dashboard.metrics import CONTENT_TYPE, exposition
from fedmosaic.server.dashboard.records import Records, Snapshot
from fedmosaic.server.settings import TlsFiles

log = logging.getLogger(__name__)
USER: Final = "operator"
_REQUESTS: Final = 16
"""Answered at once; a connection more is closed."""
_AGE_SECONDS: Final = 1.0
"""How old an answer may be, so that many requests cost the database one look."""
_TEXT: Final = "text/plain; charset=utf-8"


class Site(socketserver.ThreadingTCPServer):
    """Serves the dashboard; `with` closes its port."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, listen: str, records: Records, password: str, tls: TlsFiles | None) -> None:
        """Take the port of a `ListenAddress`.

        Raises:
            ConfigurationError: it cannot be listened on, or others reach it and there is no certificate.
            IdentityError: certificate and key do not fit together.
        """
        self._records = records
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(_REQUESTS)
        self._seen: tuple[float, Snapshot] | None = None
        self.expected = b"Basic " + b64encode(f"{USER}:{password}".encode())
        host, _, port = listen.rpartition(":")
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
            self.address_family, address = found[0], str(found[4][0])
            local = _is_loopback(address)
            self.tls = None if local else tls
            if self.tls is not None:
                check_pair(self.tls.certificate, self.tls.private_key)
            elif not local:
                raise ConfigurationError(
                    f"others reach {listen}, so it needs the server's certificate: give --kit, or a loopback "
                    "address such as 127.0.0.1:7444"
                )
            super().__init__((address, int(port)), _Handler)
        except OSError as error:
            raise ConfigurationError(f"cannot listen on {listen}: {error.strerror}") from None
        self.url = f"http{'s' if self.tls else ''}://{host}:{self.server_address[1]}/"

    def look(self) -> Snapshot:
        """The server as it is now, or was a moment ago."""
        with self._lock:
            if self._seen is None or time.monotonic() - self._seen[0] > _AGE_SECONDS:
                self._seen = time.monotonic(), self._records.look()
            return self._seen[1]

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection; its handshake is for the thread that answers. The files may be renewed."""
        connection, address = super().get_request()
        if self.tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.load_cert_chain(self.tls.certificate, self.tls.private_key)
            connection = context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, if one is free."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and let the next one in."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what went wrong; a peer that broke off, or spoke no TLS, is no news."""
        ours = not isinstance(sys.exc_info()[1], OSError)
        log.log(logging.ERROR if ours else logging.DEBUG, "a request failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: Site
    timeout = 10.0
    server_version, sys_version = "fedmosaic", ""

    def log_message(self, format: str, *args: object) -> None:
        log.debug(format, *args)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self._answer(code, f"{HTTPStatus(code).phrase}\n", _TEXT)

    def do_GET(self) -> None:
        given = self.headers.get("Authorization", "").encode("latin-1")
        path = self.path.partition("?")[0]
        if not hmac.compare_digest(given, self.server.expected):
            self.send_error(HTTPStatus.UNAUTHORIZED)
        elif path not in ("/", "/metrics"):
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            nonce = secrets.token_urlsafe(16)
            try:
                seen = self.server.look()
            except (FedMosaicError, OSError) as error:
                log.error("%s", error)
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n", _TEXT)
                return
            if path == "/":
                self._answer(HTTPStatus.OK, html(seen, nonce), "text/html; charset=utf-8", nonce)
            else:
                self._answer(HTTPStatus.OK, exposition(seen), CONTENT_TYPE)

    def _answer(self, code: int, content: str, kind: str, nonce: str = "") -> None:
        style = f"'nonce-{nonce}'" if nonce else "'none'"
        body = content.encode()
        self.send_response(code)
        if code == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", 'Basic realm="fedmosaic dashboard", charset="UTF-8"')
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": f"default-src 'none'; style-src {style}; base-uri 'none'; "
            "form-action 'none'; frame-ancestors 'none'",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def html(seen: Snapshot, nonce: str) -> str:
    """The page of a snapshot; every value is escaped, and `nonce` is that of its only style sheet."""
    environment = Environment(
        loader=PackageLoader("fedmosaic.server.dashboard", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"moment": _moment, "span": _span, "size": _size, "epsilon": plain.epsilon_text}
    return environment.get_template("page.html.j2").render(
        seen=seen, nonce=nonce, adversary_names=ADVERSARY_NAMES, delta_text=plain.delta_text
    )


def _moment(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _span(seconds: float) -> str:
    whole = max(0, round(seconds))
    return f"{whole} s" if whole < 120 else f"{whole // 60} min" if whole < 7200 else f"{whole // 3600} h"


def _size(count: int) -> str:
    return f"{count / 1e6:,.2f} MB" if count >= 10_000 else f"{count:,} B"
