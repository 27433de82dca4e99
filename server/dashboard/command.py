"""`fedmosaic dashboard`: a page and metrics of a federation's server, beside it and read only.

A password is asked for everywhere, so other users of the machine, and pages in the operator's browser that
reach for local ports, read nothing. An address that others reach has TLS 1.3 with the server's certificate.
"""

import argparse
import logging
import secrets
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fedmosaic.privacy.federation.identity import read_private
from fedmosaic.privacy.federation.names import listen_address
from fedmosaic.protos.errors import ConfigurationError
from fedmosaic.server.dashboard.records import Records
from fedmosaic.server.dashboard.site import USER, Site
from fedmosaic.server.server import Server
from fedmosaic.server.settings import ServerSettings

_SHORTEST_PASSWORD: Final = 16


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic dashboard` with its arguments, until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="fedmosaic dashboard", description=__doc__)
    parser.add_argument("--kit", type=Path, metavar="DIR", required=True, help="the server's kit")
    parser.add_argument(
        "--listen", default="127.0.0.1:7444", metavar="HOST:PORT", help="default: %(default)s"
    )
    parser.add_argument(
        "--password-file",
        type=Path,
        metavar="FILE",
        help="by default a new password is printed at each start",
    )
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(message)s")
    try:
        listen = listen_address(parsed.listen)
    except ValueError as error:
        raise ConfigurationError(f"--listen {parsed.listen}: {error}") from None
    password = secrets.token_urlsafe(16) if parsed.password_file is None else _password(parsed.password_file)

    def settings() -> ServerSettings:
        return Server(parsed.kit).settings

    with Site(listen, Records(settings), password, settings().tls) as site:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: threading.Thread(target=site.shutdown).start())
        secret = "" if parsed.password_file else f", password {password}"
        print(f"the dashboard is at {site.url}, user {USER}{secret}", flush=True)
        site.serve_forever()
    return 0


def _password(path: Path) -> str:
    password = read_private(path).decode("ascii", "replace").strip()
    if len(password) < _SHORTEST_PASSWORD or not password.isascii():
        raise ConfigurationError(
            f"{path}: the password has to have at least {_SHORTEST_PASSWORD} characters, all of them ASCII; "
            "`openssl rand -hex 16` prints one"
        )
    return password
