"""The directory of a consortium, opened to sign, and the answers that it writes to those who asked."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedmosaic.privacy.configuration import read_configuration
from fedmosaic.privacy.federation import identity, kits
from fedmosaic.privacy.federation.install import install
from fedmosaic.privacy.federation.kits import FederationConfig, ServerEntry
from fedmosaic.privacy.federation.requests import KeyRequest, read_request
from fedmosaic.privacy.federation.roster import Roster
from fedmosaic.protos.errors import ConfigurationError, IdentityError

ANSWERS = "answers"
PLACE, FOUNDING = "consortium", "founding.json"
AUTHORITY_KEY, ROSTER_KEY = "authority.key", "roster.key"


@dataclass(frozen=True)
class Office:
    """The directory of a consortium, opened to sign."""

    directory: Path
    authority: identity.Authority
    founding: FederationConfig | None
    roster: Roster | None

    @property
    def basis(self) -> Path | None:
        """File of the public basis, if the terms name one."""
        places = (self.directory / kits.BASIS, self.directory / "server" / kits.BASIS)
        return next((place for place in places if place.exists()), None)

    @property
    def federation(self) -> str:
        """Name of the federation; ConfigurationError if nothing here tells it."""
        known = self.roster or self.founding
        if known is None:
            raise ConfigurationError(f"{self.directory} has no roster and no {FOUNDING}: restore them")
        return known.federation

    def kept(self, member: str) -> Path:
        """Where the approved request of a member lies, or of the server."""
        place = self.directory / PLACE / "approved"
        return place / "clients" / f"{member}.json" if member else place / "server.json"

    def approved(self, member: str) -> KeyRequest | None:
        """The request of a member, or of the server, that was approved last."""
        path = self.kept(member)
        return read_request(path) if path.exists() else None

    def retire(self, member: str) -> None:
        """Put the approved request of a member aside: its keys are never taken again."""
        if (old := self.approved(member)) is not None:
            former = self.directory / PLACE / "former"
            former.mkdir(exist_ok=True)
            self.kept(member).replace(former / f"{old.tls_key_sha256}.json")


def is_sealed(directory: Path) -> bool:
    """Whether the consortium's keys are under a passphrase; IdentityError if there are none."""
    if not (directory / PLACE).is_dir():
        raise IdentityError(f"{directory / PLACE}: no consortium; give what `fedmosaic keys init` made")
    return identity.is_sealed(directory / PLACE / AUTHORITY_KEY)


def open_office(directory: Path, passphrase: str | None) -> Office:
    """Read what signs; IdentityError if the passphrase is missing, or not the right one."""
    place = directory / PLACE
    if is_sealed(directory) and passphrase is None:
        raise IdentityError(f"the keys in {place} are under a passphrase, and none was given")
    file = place / kits.AUTHORITY_CERTIFICATE  # where a version before kept it
    certificate = identity.read_certificate(file if file.exists() else directory / kits.AUTHORITY_CERTIFICATE)
    key = identity.read_private_key(place / AUTHORITY_KEY, passphrase)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(f"{place / AUTHORITY_KEY}: expected a P-256 key, got {type(key).__name__}")
    signing_key = identity.read_signing_key(place / ROSTER_KEY, passphrase)
    authority = identity.Authority(certificate, key, signing_key)
    founding, roster = place / FOUNDING, directory / kits.ROSTER
    return Office(
        directory,
        authority,
        read_configuration(founding, FederationConfig) if founding.exists() else None,
        Roster.read(roster, signing_key.public_key()) if roster.exists() else None,
    )


def publish(office: Office, roster: Roster, asked: set[str]) -> tuple[Roster, dict[str, Path]]:
    """Sign a roster and write the answer of every party, with certificates for those who asked.

    Kits that lie here, since the federation was founded on one machine, take in theirs at once.
    """
    directory = office.directory
    if not roster.signature:
        roster = roster.signed(office.authority.signing_key)
        roster.write(directory / kits.ROSTER)
    names = ["", *(party.id for party in roster.parties)]
    for gone in (directory / ANSWERS / "clients").glob("*"):
        if gone.name not in names:
            shutil.rmtree(gone)
    answers = {}
    for name in names:
        party = Path("clients", name) if name else Path("server")
        answer = directory / ANSWERS / party
        write_answer(office, answer, office.approved(name) if name in asked else None, shutil.copyfile)
        roster.write(answer / kits.ROSTER)
        # Where the owner of a kit here has made other keys at home, the answer is for the owner.
        with suppress(IdentityError):
            if (directory / party).is_dir():
                install(answer, directory / party, None)
                shutil.rmtree(answer)
                continue
        if name in asked:
            answers[name] = answer
    return roster, answers


def write_answer(
    office: Office, answer: Path, request: KeyRequest | None, copy: Callable[[Path, Path], object]
) -> None:
    """Write what a party is to have but for the roster; a certificate only for whoever asked for one."""
    answer.mkdir(parents=True, exist_ok=True)
    authority = office.authority
    write_vouching(authority, answer)
    if office.basis is not None:
        copy(office.basis, answer / kits.BASIS)
    if request is not None and request.id:
        pem = identity.certify_client(authority, request.tls_key, request.federation, request.id)
        (answer / kits.TLS_CERTIFICATE).write_bytes(pem)
    elif request is not None:
        pem = identity.certify_server(authority, request.tls_key, request.hosts)
        (answer / kits.TLS_CERTIFICATE).write_bytes(pem)
        entry = office.founding.server if office.founding else ServerEntry()
        (answer / kits.SERVER_SETTINGS).write_text(_OPERATOR.format(port=entry.port), encoding="utf-8")


def write_vouching(authority: identity.Authority, place: Path) -> None:
    """Write what certificates and rosters are verified with."""
    certificate = authority.certificate.public_bytes(serialization.Encoding.PEM)
    (place / kits.AUTHORITY_CERTIFICATE).write_bytes(certificate)
    pinned = identity.public_hex(authority.signing_key.public_key()) + "\n"
    (place / kits.CONSORTIUM_KEY).write_text(pinned, encoding="ascii")


_OPERATOR = """# The server's configuration; the terms of the federation are in roster.json.
listen = "0.0.0.0:{port}"
state_dir = "state"
# store_url = "postgresql+psycopg://user@host/database"   # default: SQLite in state_dir
# grace_seconds = 600   # after the last round, to wait for statements that are missing
"""
