"""Who is calling: the client's id from its certificate, never from a message."""

from collections.abc import Iterable, Mapping

from cryptography import x509

from fedmosaic.privacy.federation.identity import parse_spiffe_id, public_key_sha256
from fedmosaic.protos.errors import IdentityError
from fedmosaic.protos.refusal import Refusal, RefusalKind
from fedmosaic.server.settings import ServerSettings


def identify(auth: Mapping[str, Iterable[bytes]], settings: ServerSettings) -> str:
    """Id of the member whose verified certificate opened the connection.

    Args:
        auth: the `auth_context()` of a gRPC call; the certificate in it was verified by TLS.
        settings: federation, members and pinned certificate keys.

    Returns:
        The client id in the certificate's SPIFFE URI.

    Raises:
        Refusal: no such certificate, another federation, not on the roster, or another key than pinned.
    """
    names = [name.decode(errors="replace") for name in auth.get("x509_subject_alternative_name", ())]
    pem = next(iter(auth.get("x509_pem_cert", ())), None)
    if pem is None or len(names) != 1:
        raise _unauthenticated("the connection has no certificate with exactly one SPIFFE URI")
    version = next(iter(auth.get("ssl_tls_version", ())), b"TLSv1.3").decode(errors="replace")
    if version != "TLSv1.3":
        raise _unauthenticated(f"the connection uses {version}, expected TLSv1.3")
    try:
        federation, client = parse_spiffe_id(names[0])
    except IdentityError as error:
        raise _unauthenticated(str(error)) from None
    if federation != settings.federation:
        raise _unauthenticated(
            f"the certificate is for federation {federation!r}, this is {settings.federation!r}"
        )
    if client not in settings.members:
        raise Refusal(
            RefusalKind.NOT_PERMITTED,
            "NOT_ON_ROSTER",
            f"{client!r} has a valid certificate but is not on the roster of federation {federation!r}",
            "it was revoked, or the server has an old roster: ask the consortium",
        )
    pinned = settings.tls_key_sha256.get(client)
    if pinned is not None and public_key_sha256(x509.load_pem_x509_certificate(pem)) != pinned:
        raise _unauthenticated(f"the certificate of {client!r} has another key than the roster pins")
    return client


def _unauthenticated(message: str) -> Refusal:
    return Refusal(
        RefusalKind.UNAUTHENTICATED,
        "WRONG_CERTIFICATE",
        message,
        "use the certificate of the newest kit that the consortium handed out",
    )
