"""Identities: the consortium's authority, TLS certificates, and signing keys.

Two keys per client, because they do different work: a P-256 key whose X.509 certificate opens the
mutual TLS connection (the client's id stands in a SPIFFE URI, so it is never taken from a message),
and an Ed25519 key, pinned by the roster, that signs uploads and key-agreement messages end to end.
"""

import datetime as dt
import hashlib
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmosaic.protos.errors import IdentityError

AUTHORITY_DAYS = 3650
CERTIFICATE_DAYS = 90
_SPIFFE = re.compile(r"^spiffe://fedmosaic/(?P<federation>[a-z0-9-]+)/client/(?P<client>[a-z0-9-]+)$")
_CLOCK_SKEW = dt.timedelta(minutes=5)


@dataclass(frozen=True)
class Authority:
    """The consortium's certificate authority (P-256) and roster-signing key (Ed25519)."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    signing_key: Ed25519PrivateKey


@dataclass(frozen=True)
class TlsIdentity:
    """A certificate and its private key, both PEM, and the hash the roster pins."""

    certificate_pem: bytes
    key_pem: bytes
    key_sha256: str


def spiffe_id(federation: str, client: str) -> str:
    """The URI that names a client in its certificate (SPIFFE ID, URI subject alternative name)."""
    return f"spiffe://fedmosaic/{federation}/client/{client}"


def parse_spiffe_id(uri: str) -> tuple[str, str]:
    """Federation and client id of a SPIFFE URI; IdentityError if it is not one of ours."""
    match = _SPIFFE.match(uri)
    if match is None:
        raise IdentityError(
            f"certificate names {uri!r}; expected spiffe://fedmosaic/<federation>/client/<id>"
        )
    return match["federation"], match["client"]


def create_authority(federation: str, now: dt.datetime | None = None) -> Authority:
    """Make a new certificate authority and roster-signing key for a federation."""
    key = ec.generate_private_key(ec.SECP256R1())
    # A common name has at most 64 characters (RFC 5280, appendix A), so the federation stands by itself.
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
            x509.NameAttribute(NameOID.COMMON_NAME, "FedMosaic consortium"),
        ]
    )
    builder = _builder(name, name, key, AUTHORITY_DAYS, now, authority=True)
    return Authority(builder.sign(key, hashes.SHA256()), key, Ed25519PrivateKey.generate())


def issue_server(
    authority: Authority, hosts: Sequence[str], days: int = CERTIFICATE_DAYS, now: dt.datetime | None = None
) -> TlsIdentity:
    """Issue a server certificate for DNS names and IP addresses, valid for `days` days."""
    if not hosts:
        raise IdentityError("a server certificate needs at least one host name or address")
    names: list[x509.GeneralName] = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    # Clients compare the names above (RFC 9525, §6.2); a host name may be too long for a common name.
    return _issue(authority, "FedMosaic server", names, ExtendedKeyUsageOID.SERVER_AUTH, days, now)


def issue_client(
    authority: Authority,
    federation: str,
    client: str,
    days: int = CERTIFICATE_DAYS,
    now: dt.datetime | None = None,
) -> TlsIdentity:
    """Issue a client certificate that names `client` in a SPIFFE URI, valid for `days` days."""
    names = [x509.UniformResourceIdentifier(spiffe_id(federation, client))]
    return _issue(authority, client, names, ExtendedKeyUsageOID.CLIENT_AUTH, days, now)


def _issue(
    authority: Authority,
    common_name: str,
    names: Sequence[x509.GeneralName],
    usage: x509.ObjectIdentifier,
    days: int,
    now: dt.datetime | None,
) -> TlsIdentity:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    certificate = (
        _builder(subject, authority.certificate.subject, key, days, now, authority=False)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(issuer, critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return TlsIdentity(
        certificate.public_bytes(serialization.Encoding.PEM), private_pem(key), public_key_sha256(certificate)
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    days: int,
    now: dt.datetime | None,
    *,
    authority: bool,
) -> x509.CertificateBuilder:
    """What every certificate has: an authority's signs certificates, any other signs handshakes."""
    now = now or dt.datetime.now(dt.UTC)
    usage = x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.BasicConstraints(authority, 0 if authority else None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def public_key_sha256(certificate: x509.Certificate) -> str:
    """Hex SHA-256 of the certificate's DER SubjectPublicKeyInfo (RFC 7469, §2.4)."""
    encoded = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(encoded).hexdigest()


def read_certificate(path: Path) -> x509.Certificate:
    """Read a PEM certificate; IdentityError if it cannot be read, or is none."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise IdentityError(f"{path}: cannot read this certificate: {error.strerror}") from None
    except ValueError:
        raise IdentityError(f"{path}: not a PEM certificate; take it from the kit again") from None


def certificate_names(certificate: x509.Certificate) -> list[str]:
    """Names and addresses of the server that a certificate is for; empty if it names none."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    addresses = names.get_values_for_type(x509.IPAddress)
    return [*names.get_values_for_type(x509.DNSName), *map(str, addresses)]


def certificate_uris(path: Path) -> list[str]:
    """The URIs that a client's certificate names; IdentityError if it cannot be read or names nothing."""
    try:
        names = read_certificate(path).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (ValueError, x509.ExtensionNotFound) as error:
        raise IdentityError(f"{path}: not a certificate of this federation ({error})") from None
    return names.value.get_values_for_type(x509.UniformResourceIdentifier)


def check_pair(certificate: Path, key: Path) -> tuple[bytes, bytes]:
    """Read a certificate and its private key, both PEM, and see that they belong together.

    gRPC ends the whole process, or blames the port, when it is given a pair that is none.

    Raises:
        IdentityError: one of them is missing, damaged or open to others, or they are not a pair.
    """
    public = read_certificate(certificate).public_key()
    private = read_private_key(key)
    encoding = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    if private.public_key().public_bytes(*encoding) != public.public_bytes(*encoding):
        raise IdentityError(f"{key} is not the key of {certificate}; take both from one kit")
    return certificate.read_bytes(), read_private(key)


def private_pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    """PKCS#8 PEM without a passphrase; written only by `write_private`."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def public_hex(key: Ed25519PublicKey) -> str:
    """Raw 32-byte Ed25519 public key as 64 hexadecimal digits."""
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()


def public_from_hex(text: str, source: str) -> Ed25519PublicKey:
    """Parse 64 hexadecimal digits into an Ed25519 public key; IdentityError otherwise."""
    try:
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(text.strip()))
    except ValueError:
        raise IdentityError(f"{source}: not an Ed25519 public key (64 hexadecimal digits)") from None


def write_private(path: Path, content: bytes) -> None:
    """Create a file that only its owner can read or write (mode 0600); refuses to overwrite."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise IdentityError(
            f"{path} exists already; a private key is never overwritten, move it away first"
        ) from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_private(path: Path) -> bytes:
    """Read a private key file; IdentityError if it is missing, or others can read it."""
    try:
        mode = path.stat().st_mode & 0o777
        content = path.read_bytes()
    except OSError as error:
        raise IdentityError(f"{path}: cannot read this private key: {error.strerror}") from None
    if os.name == "posix" and mode & 0o077:
        raise IdentityError(
            f"{path} can be read by other users (mode {mode:04o}); run `chmod 600 {path}`, and if others had "
            "access to it, rotate this key"
        )
    return content


def read_private_key(path: Path) -> PrivateKeyTypes:
    """Read a private key; IdentityError if it is missing, open to others, damaged, or has a passphrase."""
    try:
        return serialization.load_pem_private_key(read_private(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise IdentityError(
            f"{path}: not a private key in PEM without a passphrase; take it from the kit again, or have the "
            "consortium make a new one (`fedmosaic keys rotate`, for the server `rotate-server`)"
        ) from None


def read_signing_key(path: Path) -> Ed25519PrivateKey:
    """Read an Ed25519 private key (PKCS#8 PEM)."""
    key = read_private_key(path)
    if not isinstance(key, Ed25519PrivateKey):
        raise IdentityError(f"{path}: expected an Ed25519 key, got {type(key).__name__}")
    return key
