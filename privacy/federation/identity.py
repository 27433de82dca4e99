"""Identities: the consortium's authority, TLS certificates, and signing keys.

Two keys per client: a P-256 key whose X.509 certificate opens the mutual TLS connection (the client's id
stands in a SPIFFE URI, so it is never taken from a message), and an Ed25519 key, pinned by the roster, that
signs uploads and key-agreement messages end to end.
"""

import datetime as dt
import hashlib
import ipaddress
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmosaic.protos.errors import IdentityError

AUTHORITY_DAYS = 3650
CERTIFICATE_DAYS = 90
ANNOUNCED_BEFORE = dt.timedelta(days=14)
RENEW = "have the consortium sign the request anew (`fedmosaic keys approve`)"
_SPIFFE = re.compile(r"^spiffe://fedmosaic/(?P<federation>[a-z0-9-]+)/client/(?P<client>[a-z0-9-]+)$")
_SEALED = b"scrypt n=2^17 r=8 p=1 salt "
_CLOCK_SKEW = dt.timedelta(minutes=5)
UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    InternalError,
    x509.InvalidVersion,
    x509.ExtensionNotFound,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
"""What the library says of keys and certificates that are none."""


@dataclass(frozen=True)
class Authority:
    """The consortium's certificate authority (P-256) and roster-signing key (Ed25519)."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    signing_key: Ed25519PrivateKey


def spiffe_id(federation: str, client: str) -> str:
    """The URI that names a client in its certificate (SPIFFE ID, URI subject alternative name)."""
    return f"spiffe://fedmosaic/{federation}/client/{client}"


def parse_spiffe_id(uri: str) -> tuple[str, str]:
    """Federation and client id of a SPIFFE URI; IdentityError if it is not one of ours."""
    match = _SPIFFE.match(uri)
    if match is None:
        raise IdentityError(f"certificate names {uri!r}, not spiffe://fedmosaic/<federation>/client/<id>")
    return match["federation"], match["client"]


def create_authority(federation: str) -> Authority:
    """Make a new certificate authority and roster-signing key for a federation."""
    key = ec.generate_private_key(ec.SECP256R1())
    # A common name has at most 64 characters (RFC 5280, appendix A), so the federation stands by itself.
    organization = x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation)
    name = x509.Name([organization, x509.NameAttribute(NameOID.COMMON_NAME, "FedMosaic consortium")])
    builder = _builder(name, name, key.public_key(), dt.datetime.now(dt.UTC), authority=True)
    return Authority(builder.sign(key, hashes.SHA256()), key, Ed25519PrivateKey.generate())


def certify_server(
    authority: Authority, key: ec.EllipticCurvePublicKey, hosts: Sequence[str], now: dt.datetime | None = None
) -> bytes:
    """A PEM certificate for a server's key and its DNS names and IP addresses."""
    if not hosts:
        raise IdentityError("a server certificate needs at least one host name or address")
    # Clients compare the names (RFC 9525, §6.2); a host name may be too long for a common name.
    usage = ExtendedKeyUsageOID.SERVER_AUTH
    return _certify(authority, key, "FedMosaic server", host_names(hosts), usage, now)


def certify_client(
    authority: Authority,
    key: ec.EllipticCurvePublicKey,
    federation: str,
    client: str,
    now: dt.datetime | None = None,
) -> bytes:
    """A PEM certificate for a client's key that names `client` in a SPIFFE URI."""
    names = [x509.UniformResourceIdentifier(spiffe_id(federation, client))]
    return _certify(authority, key, client, names, ExtendedKeyUsageOID.CLIENT_AUTH, now)


def host_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """Names and addresses of a server as a certificate carries them."""
    names: list[x509.GeneralName] = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    return names


def _certify(
    authority: Authority,
    key: ec.EllipticCurvePublicKey,
    common_name: str,
    names: Sequence[x509.GeneralName],
    usage: x509.ObjectIdentifier,
    now: dt.datetime | None,
) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    certificate = (
        _builder(subject, authority.certificate.subject, key, now or dt.datetime.now(dt.UTC), authority=False)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(issuer, critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: dt.datetime,
    *,
    authority: bool,
) -> x509.CertificateBuilder:
    """What every certificate has: an authority's signs certificates, any other signs handshakes."""
    days = AUTHORITY_DAYS if authority else CERTIFICATE_DAYS
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
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.BasicConstraints(authority, 0 if authority else None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def public_key_sha256(certificate: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """Hex SHA-256 of the DER SubjectPublicKeyInfo in a certificate or a request (RFC 7469, §2.4)."""
    return spki_sha256(certificate.public_key())


def spki_sha256(key: PublicKeyTypes) -> str:
    """Hex SHA-256 of a public key's DER SubjectPublicKeyInfo."""
    encoding = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(*encoding)).hexdigest()


def read_certificate(path: Path) -> x509.Certificate:
    """Read a PEM certificate; IdentityError if it cannot be read, or is none."""
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        certificate.public_key()  # decoded when it is asked for, and every reader asks for it
        return certificate
    except OSError as error:
        raise IdentityError(f"{path}: cannot read this certificate: {error.strerror}") from None
    except UNREADABLE:
        raise IdentityError(f"{path}: not a PEM certificate; take it from the kit again") from None


def certificate_names(certificate: x509.Certificate) -> list[str]:
    """Names and addresses of the server that a certificate is for; empty if it names none."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except UNREADABLE:
        return []
    addresses = names.get_values_for_type(x509.IPAddress)
    return [*names.get_values_for_type(x509.DNSName), *map(str, addresses)]


def check_certificate(source: Path, authority: Path, now: dt.datetime | None = None) -> x509.Certificate:
    """Refuse a certificate that the other side would refuse: TLS only says that the connection closed."""
    now = now or dt.datetime.now(dt.UTC)
    certificate = read_certificate(source)
    if now >= certificate.not_valid_after_utc:
        raise IdentityError(
            f"{source} expired on {certificate.not_valid_after_utc:%Y-%m-%d}; {RENEW}, and install it"
        )
    if now < certificate.not_valid_before_utc:
        raise IdentityError(f"{source} is valid from {certificate.not_valid_before_utc} on; check this clock")
    try:
        certificate.verify_directly_issued_by(read_certificate(authority))
    except (*UNREADABLE, InvalidSignature):
        raise IdentityError(f"{source} is not of this authority; take all files from one kit") from None
    return certificate


def expires_soon(expiry: dt.datetime, now: dt.datetime | None = None) -> str:
    """What to announce of a certificate in its last days; empty before."""
    left = expiry - (now or dt.datetime.now(dt.UTC))
    if left > ANNOUNCED_BEFORE:
        return ""
    when = f"expired on {expiry:%Y-%m-%d}" if left <= dt.timedelta() else f"expires in {left.days} days"
    return f"the certificate {when}, at {expiry:%Y-%m-%d %H:%M} UTC: {RENEW}"


def certificate_uris(path: Path) -> list[str]:
    """The URIs that a client's certificate names; IdentityError if it cannot be read or names nothing."""
    try:
        names = read_certificate(path).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except UNREADABLE as error:
        raise IdentityError(f"{path}: not a certificate of this federation ({error})") from None
    return names.value.get_values_for_type(x509.UniformResourceIdentifier)


def check_pair(certificate: Path, key: Path) -> tuple[bytes, bytes]:
    """Read a certificate and its private key, both PEM; IdentityError unless they belong together.

    gRPC ends the whole process, or blames the port, when it is given a pair that is none.
    """
    public, private = read_certificate(certificate), read_private_key(key)
    if spki_sha256(private.public_key()) != public_key_sha256(public):
        raise IdentityError(f"{key} is not the key of {certificate}; take both from one kit")
    return certificate.read_bytes(), read_private(key)


def private_pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey, passphrase: str | None = None) -> bytes:
    """PKCS#8 PEM, written only by `write_private`.

    PKCS#8 itself stretches a passphrase little (PBKDF2, 2048 iterations here), so scrypt does it first; its
    salt stands in a line before the PEM (RFC 7468, §2, allows such lines).
    """
    plain: serialization.KeySerializationEncryption = serialization.NoEncryption()
    head = b""
    if passphrase is not None:
        salt = os.urandom(16)
        head = _SEALED + salt.hex().encode() + b"\n"
        plain = serialization.BestAvailableEncryption(_stretched(passphrase, salt))
    return head + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)


def _stretched(passphrase: str, salt: bytes) -> bytes:
    """256 bits in hexadecimal; a guess costs 128 MiB and about half a second."""
    return Scrypt(salt, length=32, n=2**17, r=8, p=1).derive(passphrase.encode()).hex().encode()


def is_sealed(path: Path) -> bool:
    """Whether a private key is under a passphrase; IdentityError as of `read_private`."""
    return read_private(path).startswith(_SEALED)


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
        raise IdentityError(f"{path} exists already; move it away: no private key is overwritten") from None
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
            "access, rotate this key"
        )
    return content


def read_private_key(path: Path, passphrase: str | None = None) -> PrivateKeyTypes:
    """Read a private key; IdentityError if it is missing, open to others, damaged, or sealed otherwise."""
    content, password = read_private(path), None
    if content.startswith(_SEALED) and passphrase is not None:
        head = content.partition(b"\n")[0].removeprefix(_SEALED)
        with suppress(ValueError):
            password = _stretched(passphrase, bytes.fromhex(head.decode("ascii", "replace")))
    try:
        return serialization.load_pem_private_key(content, password=password)
    except UNREADABLE:
        sealed = "the passphrase is not the right one, or the file is damaged"
        bare = (
            "not a private key in PEM without a passphrase; restore it, or make new keys with "
            "`fedmosaic keys request`"
        )
        raise IdentityError(f"{path}: {sealed if content.startswith(_SEALED) else bare}") from None


def read_signing_key(path: Path, passphrase: str | None = None) -> Ed25519PrivateKey:
    """Read an Ed25519 private key (PKCS#8 PEM)."""
    key = read_private_key(path, passphrase)
    if not isinstance(key, Ed25519PrivateKey):
        raise IdentityError(f"{path}: expected an Ed25519 key, got {type(key).__name__}")
    return key
