"""A mutually authenticated channel to the server, and the patience to try a failed call again."""

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import grpc
from cryptography.hazmat.primitives import serialization

from fedmosaic.client.transport.causes import explain
from fedmosaic.privacy.federation.identity import check_certificate, check_pair, read_certificate
from fedmosaic.privacy.federation.names import is_local
from fedmosaic.protos import bounds
from fedmosaic.protos.errors import IdentityError, TransportError
from fedmosaic.protos.refusal import Refusal, from_rpc_error

log = logging.getLogger(__name__)
T = TypeVar("T")
_FIRST_DELAY_SECONDS: Final = 0.25
_LONGEST_DELAY_SECONDS: Final = 10.0
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", bounds.MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", bounds.MAX_MESSAGE_BYTES),
    # gRPC's own retries stop silently above 256 KiB; `Patience` does them, and uploads are resumed.
    ("grpc.enable_retries", 0),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # What a ping is waited for, 60 s by default, whatever the line above says.
    ("grpc.http2.ping_timeout_ms", 20_000),
    # The least of it stays gRPC's 20 s: it is the time that a connection and its handshake have, too.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)


def credentials(authority: Path, certificate: Path, private_key: Path) -> grpc.ChannelCredentials:
    """What shows this client's certificate and accepts only the federation's server; all files are PEM.

    Raises:
        IdentityError: a file is missing or damaged, key and certificate are no pair, or the certificate is
            expired or not from this authority.
    """
    certificate_pem, key_pem = check_pair(certificate, private_key)
    check_certificate(certificate, authority)
    authority_pem = read_certificate(authority).public_bytes(serialization.Encoding.PEM)
    return grpc.ssl_channel_credentials(authority_pem, key_pem, certificate_pem)


def open_channel(address: str, authority: Path, certificate: Path, private_key: Path) -> grpc.Channel:
    """Open a channel with these `credentials`; IdentityError as there.

    The address is as `fedmosaic.privacy.federation.names.address` gives it.
    """
    direct = (("grpc.enable_http_proxy", 0),) if is_local(address) else ()
    shown = credentials(authority, certificate, private_key)
    return grpc.secure_channel(address, shown, options=(*_OPTIONS, *direct))


@dataclass(frozen=True)
class Patience:
    """For how many seconds without any progress a client tries again when the server cannot be reached."""

    address: str
    seconds: float

    def retry(self, call: str, attempt: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
        """Repeat an attempt while it fails (`grpc.RpcError`) for reasons that time may cure.

        Delays grow exponentially and are jittered, so that clients do not come back in step. Growth of the
        number `progress` renews the patience. Refusal if the server refused; IdentityError if it is not the
        federation's, which no patience cures; TransportError if the patience is over.
        """
        started, reached, delay = time.monotonic(), progress(), _FIRST_DELAY_SECONDS
        while True:
            try:
                return attempt()
            except grpc.RpcError as error:
                problem = from_rpc_error(error, call)
            if isinstance(problem, Refusal):
                raise problem
            cause = explain(str(problem), self.address)
            if cause.final:
                raise IdentityError(f"{self.address}: {cause.words}")
            if progress() > reached:
                started, reached, delay = time.monotonic(), progress(), _FIRST_DELAY_SECONDS
            waited = time.monotonic() - started
            if waited + delay > self.seconds:
                raise TransportError(f"{self.address} could not be reached for {waited:.0f} s: {cause.words}")
            log.warning("%s: %s; trying again in %.1f s", call, cause.words, delay)
            time.sleep(delay * (0.5 + secrets.randbelow(1000) / 2000))
            delay = min(2.0 * delay, _LONGEST_DELAY_SECONDS)
