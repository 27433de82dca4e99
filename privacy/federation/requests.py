"""What a party asks the consortium to vouch for: public keys that it has made at home, with proof of both.

The TLS key proves itself by the signature of the CSR, whose subject alternative names say for whom it is; the
identity key signs the whole request. So no part of it can be replayed for another name. That it is really the
member's, only a comparison of fingerprints over another channel tells.

Reference: CSR, RFC 2986; Ed25519, RFC 8032; scrypt, RFC 7914.
"""

import hashlib
import shutil
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, StringConstraints

from fedmosaic.privacy.configuration import Frozen, Hex32, canonical_json, parse_json, validate
from fedmosaic.privacy.federation import identity
from fedmosaic.privacy.federation.kits import IDENTITY_KEY, PENDING, REQUEST, TLS_KEY
from fedmosaic.privacy.federation.names import Family, Host, MemberId
from fedmosaic.privacy.files import private_directory, write_atomically
from fedmosaic.protos.errors import ConfigurationError, IdentityError

LARGEST_REQUEST: Final = 1 << 16
STRENGTH: Final = "20 digits, 66 bits; a guess costs 16 MiB and about 40 ms (scrypt)"
_LABEL: Final = b"fedmosaic/key-request/v1\n"


class KeyRequest(Frozen):
    """Public keys of a member, or of the server; read one by `read_request`, which checks the proofs."""

    version: Literal[1] = 1
    federation: MemberId
    id: MemberId | Literal[""] = ""
    """Name of the member; empty for the server."""
    family: Family = ""
    """Architecture of the member's model."""
    hosts: Annotated[tuple[Host, ...], Field(max_length=32)] = ()
    """Names and addresses of the server; empty for a member."""
    identity_key: Hex32 | Literal[""] = ""
    """Ed25519 public key; empty for the server, which signs nothing."""
    csr: Annotated[str, StringConstraints(max_length=16_384)]
    """PEM; P-256."""
    signature: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{128})?$")] = ""
    """By the identity key, over `content`."""

    @property
    def content(self) -> bytes:
        """What is signed."""
        return _LABEL + canonical_json(self.model_dump(mode="json", exclude={"signature"})).encode()

    @property
    def who(self) -> str:
        """The party, for people."""
        return f"member {self.id!r}" if self.id else "the server"

    @property
    def tls_key(self) -> ec.EllipticCurvePublicKey:
        """Public key of the CSR."""
        key = self._csr.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise ValueError("its key is not on P-256")
        return key

    @property
    def tls_key_sha256(self) -> str:
        """As the roster pins it."""
        return identity.public_key_sha256(self._csr)

    @property
    def _csr(self) -> x509.CertificateSigningRequest:
        return x509.load_pem_x509_csr(self.csr.encode())

    @property
    def fingerprint(self) -> str:
        """What to compare over the telephone."""
        return member_fingerprint(self.federation, self.id, self.identity_key, self.tls_key_sha256)

    def check(self, source: str) -> None:
        """Refuse a request, with an IdentityError that names its source, whose proofs do not hold."""
        try:
            if bool(self.id) != bool(self.identity_key) or bool(self.id) == bool(self.hosts):
                raise ValueError("a member has an id and an identity_key, the server hosts")
            named = self._csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            if list(named) != _names(self.federation, self.id, self.hosts):
                raise ValueError(f"its CSR is for {_shown(named)}")
            if not (self.tls_key and self._csr.is_signature_valid):  # of P-256 alone: others may be dear
                raise ValueError("its CSR is not signed by the key in it")
            if self.id:
                public = identity.public_from_hex(self.identity_key, "identity_key")
                public.verify(bytes.fromhex(self.signature), self.content)
        except InvalidSignature:
            raise IdentityError(
                f"{source}: the request of {self.who} is not signed by its own identity key: it was altered, "
                "or taken for another name; ask for a new one"
            ) from None
        except identity.UNREADABLE as error:
            raise IdentityError(
                f"{source}: no valid request of {self.who} ({error}); make a new one (`fedmosaic keys "
                "request`)"
            ) from None


def _names(federation: str, member: str, hosts: Sequence[str]) -> list[x509.GeneralName]:
    if member:
        return [x509.UniformResourceIdentifier(identity.spiffe_id(federation, member))]
    return identity.host_names(hosts)


def _shown(names: x509.SubjectAlternativeName) -> str:
    return ", ".join(repr(str(name.value))[:80] for name in list(names)[:4]) or "nobody"


def read_bounded(path: Path, limit: int, what: str) -> bytes:
    """Content of a file that somebody else has made; ConfigurationError if it is none, or has more bytes."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigurationError(f"{path}: no file; give {what}")
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read ({error.strerror}); give {what}") from None
    if len(content) > limit:
        raise ConfigurationError(f"{path} has more than {limit:,} bytes, too many for {what}")
    return content


def read_request(path: Path) -> KeyRequest:
    """Read a request and check its proofs; ConfigurationError if it is none, IdentityError if one fails."""
    content = read_bounded(path, LARGEST_REQUEST, "a request that `fedmosaic keys request` made")
    try:
        data = parse_json(content)
    except ValueError as error:
        raise ConfigurationError(f"{path}: not a request ({error}); ask for a new one") from None
    request = validate(data, KeyRequest, str(path))
    request.check(str(path))
    return request


def make_request(
    kit: Path, federation: str, member: str = "", family: str = "", hosts: Sequence[str] = ()
) -> KeyRequest:
    """Make the keys of a member, or of the server if hosts are given, and the request for them.

    The keys wait in the kit's `pending` folder until the answer is installed; those that the kit has stay in
    use until then. IdentityError if another request of this kit waits for its answer.
    """
    pending = kit / PENDING
    if pending.exists():
        raise IdentityError(
            f"{pending} holds keys of a request that waits for its answer: hand out {pending / REQUEST} "
            "again, or delete the folder to begin anew with other keys"
        )
    tls_key, signing_key = ec.generate_private_key(ec.SECP256R1()), Ed25519PrivateKey.generate()
    fields = {"federation": federation, "id": member, "family": family, "hosts": hosts, "csr": ""}
    fields["identity_key"] = identity.public_hex(signing_key.public_key()) if member else ""
    draft = validate(fields, KeyRequest, "the request")
    names = x509.SubjectAlternativeName(_names(draft.federation, draft.id, draft.hosts))
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    csr = builder.add_extension(names, critical=False).sign(tls_key, hashes.SHA256())
    draft = draft.model_copy(update={"csr": csr.public_bytes(serialization.Encoding.PEM).decode()})
    request = draft.model_copy(update={"signature": signing_key.sign(draft.content).hex() if member else ""})
    request.check("the new request")
    private_directory(kit)
    making = Path(tempfile.mkdtemp(prefix=".pending-", dir=kit))
    try:
        identity.write_private(making / TLS_KEY, identity.private_pem(tls_key))
        if member:
            identity.write_private(making / IDENTITY_KEY, identity.private_pem(signing_key))
        write_atomically(making / REQUEST, request.model_dump_json(indent=1).encode(), durable=False)
        making.rename(pending)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    return request


def member_fingerprint(federation: str, member: str, identity_key: str, tls_key_sha256: str) -> str:
    """Fingerprint of a party's keys, as request and roster have them; of the server if `member` is empty."""
    return fingerprint("party", federation, member, identity_key, tls_key_sha256)


def fingerprint(*parts: str) -> str:
    """Four groups of five digits for people to compare; see `STRENGTH`.

    Whoever wants other keys with the same digits has to find a second preimage, so a birthday attack is of
    no use, and the salt holds all but the digits, so no table is.
    """
    digest = hashlib.sha256(canonical_json(parts).encode()).digest()
    number = int.from_bytes(hashlib.scrypt(digest, salt=_LABEL + digest, n=2**14, r=8, p=1, dklen=32), "big")
    digits = f"{number % 10**20:020d}"
    return " ".join(digits[start : start + 5] for start in range(0, 20, 5))
