"""The network side of a server: gRPC over mutual TLS, with its health, on one port."""

import contextlib
import errno
import logging
import socket
from typing import Final

import grpc
from cryptography.hazmat.primitives import serialization
from grpc import aio
from grpc_health.v1 import (
    health,
    health_pb2,
    health_pb2_grpc,
)

from fedmosaic.privacy.federation.identity import check_pair, read_certificate
from fedmosaic.privacy.files import file_marks
from fedmosaic.protos import bounds
from fedmosaic.protos.errors import ConfigurationError, IdentityError
from fedmosaic.protos.v1 import federation_pb2 as pb
from fedmosaic.protos.v1 import federation_pb2_grpc as rpc
from fedmosaic.server.network.peers import Gate, channel_options
from fedmosaic.server.network.review import WitnessService
from fedmosaic.server.network.service import FederationService
from fedmosaic.server.settings import TlsFiles

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]  # a module cannot be typed as optional

log = logging.getLogger(__name__)
SERVICE: Final = pb.DESCRIPTOR.services_by_name["Federation"].full_name
_GRACE_SECONDS: Final = 5.0
_OWN_DESCRIPTORS: Final = 64
"""Files that are open in a server without any client, and some to spare."""
_BIND_PROBLEMS: Final = {
    errno.EADDRINUSE: "another program uses the port; stop it, or set another port in server.toml",
    errno.EADDRNOTAVAIL: "the address is not this machine's; set one of its own in server.toml, or 0.0.0.0",
    errno.EACCES: "ports below 1024 are the administrator's; set another port in server.toml",
}
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", bounds.MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", bounds.MAX_MESSAGE_BYTES),
    # Two servers on one port would share the connections between them.
    ("grpc.so_reuseport", 0),
    # A client that vanished without a word is noticed within a minute.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # What a ping is waited for, 60 s by default, whatever the line above says.
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)


class Listener:
    """One port, and the service and the health that are asked for on it."""

    def __init__(
        self,
        service: FederationService,
        review: WitnessService,
        listen: str,
        credentials: grpc.ServerCredentials,
        members: int,
    ) -> None:
        """Take the port; calls are answered once it is open. The number of members bounds the connections.

        Raises:
            ConfigurationError: the address cannot be listened on.
        """
        options = (*_OPTIONS, *channel_options(members, free_descriptors(members)))
        self._server = aio.server(interceptors=(Gate(service.audit),), options=options)
        self._checks = health.aio.HealthServicer()
        rpc.add_FederationServicer_to_server(service, self._server)
        rpc.add_WitnessServicer_to_server(review, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._checks, self._server)
        try:
            self.port = self._server.add_secure_port(listen, credentials)
        except RuntimeError:
            raise ConfigurationError(f"cannot listen on {listen}: {_why_not(listen)}") from None

    async def open(self) -> None:
        """Answer calls, and say so to whoever asks for the health."""
        await self._server.start()
        for name in ("", SERVICE):
            await self._checks.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def take_leave(self) -> None:
        """Tell whoever asks for the health that the server is about to stop."""
        await self._checks.enter_graceful_shutdown()

    async def close(self) -> None:
        """Take no more calls, and end those that are open after a few seconds."""
        await self._server.stop(_GRACE_SECONDS)


def free_descriptors(members: int) -> int:
    """Raise this process's limit of file descriptors, and tell how many are left for connections.

    Others are for the uploads, which are all open while they are summed, and for files of the process itself.
    """
    if resource is None:
        return bounds.MAX_MEMBERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # macOS says "unlimited" and means less
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    needed = 2 * members + _OWN_DESCRIPTORS
    if 0 <= limit < needed:
        log.warning(
            "this process may open %d files and %d members need %d: raise the hard limit (ulimit -Hn, or "
            "LimitNOFILE of a systemd unit), or some will not be served",
            limit,
            members,
            needed,
        )
    free = limit - members - _OWN_DESCRIPTORS
    return max(16, free) if limit >= 0 else bounds.MAX_MEMBERS * 4


def server_credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    """What the server shows, and whom it lets in: only certificates of the federation's authority.

    The files are read again at the first handshake after they have changed. Files that do not fit together
    are told once, and what was read before is shown on; an installation may be in the middle.

    Raises:
        IdentityError: a certificate or the key is missing or damaged, or they are no pair.
    """
    files = (tls.certificate, tls.private_key, tls.authority)
    seen = file_marks(files)

    def read() -> grpc.ServerCertificateConfiguration:
        certificate, key = check_pair(tls.certificate, tls.private_key)
        authority = read_certificate(tls.authority).public_bytes(serialization.Encoding.PEM)
        return grpc.ssl_server_certificate_configuration([(key, certificate)], authority)

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal seen
        if (marks := file_marks(files)) == seen:
            return None
        seen = marks
        try:
            configuration = read()
        except IdentityError as error:
            log.warning("the certificate of before is shown on: %s", error)
            return None
        log.info("the certificate in %s is shown from now on", tls.certificate)
        return configuration

    return grpc.dynamic_ssl_server_credentials(
        read(),
        changed,  # type: ignore[arg-type]  # its documentation has None for no change, the stubs do not
        require_client_authentication=True,
    )


def _why_not(listen: str) -> str:
    """Why an address cannot be listened on, which gRPC does not tell."""
    name, _, port = listen.rpartition(":")
    try:
        found = socket.getaddrinfo(name.strip("[]"), int(port), type=socket.SOCK_STREAM)
        with socket.socket(*found[0][:3]) as attempt:
            attempt.bind(found[0][4])
    except socket.gaierror:
        return "no machine has this name; give an address of this machine, or 0.0.0.0 for all of them"
    except OSError as error:
        return _BIND_PROBLEMS.get(error.errno or 0, str(error.strerror))
    return "the port was taken a moment ago; start again"
