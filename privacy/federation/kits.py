"""Make and maintain a federation on disk: authority, kits for server and clients, roster.

One directory belongs to the consortium and stays with it. Each kit inside is handed, over a channel
the receiver trusts, to the one party it is for:

    DIR/consortium/       authority.pem, authority.key, roster.key    stays here
    DIR/roster.json       public; every kit has a copy
    DIR/server/           the server's kit
    DIR/clients/<id>/     one client's kit: TLS certificate and key, identity key, roster, pinned keys
    DIR/witness/          the witness's kit, if there is one
"""

import datetime as dt
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, model_validator

from fedmosaic.privacy.configuration import Frozen
from fedmosaic.privacy.federation import identity
from fedmosaic.privacy.federation.names import Family, Host, MemberId, Port
from fedmosaic.privacy.federation.roster import Member, Roster, Seconds, Terms, Witness, check_witnessed
from fedmosaic.privacy.files import sync_directory
from fedmosaic.protos import bounds
from fedmosaic.protos.errors import ConfigurationError, IdentityError

AUTHORITY_CERTIFICATE = "authority.pem"
CONSORTIUM_KEY = "consortium.pub"
ROSTER = "roster.json"
BASIS = "public_basis.safetensors"
TLS_CERTIFICATE = "tls.pem"
TLS_KEY = "tls.key"
IDENTITY_KEY = "identity.key"
SERVER_SETTINGS = "server.toml"
WITNESS = "witness"


class MemberEntry(Frozen):
    """A client as the founding configuration names it."""

    id: MemberId
    """Name of the member: lower-case letters, digits and hyphens."""
    family: Family = ""
    """Architecture of its model. Members of different families need an aligned basis, see `adapter.basis`."""


class WitnessEntry(Frozen):
    """Who recomputes every aggregate from the signed uploads and countersigns it; never a member."""

    id: MemberId
    """Name of the witness: lower-case letters, digits and hyphens."""
    seconds: Seconds = 600
    """How long a round waits for it; whoever then has no countersignature trains the round alone."""


class ServerEntry(Frozen):
    """Where the server will listen, and under which names it is reached."""

    hosts: tuple[Host, ...] = Field(default=("localhost", "127.0.0.1"), min_length=1)
    """Names and addresses that clients will use; its certificate carries them."""
    port: Port = 7443
    """Port that it listens on."""


class FederationConfig(Frozen):
    """The founding configuration, `federation.toml`."""

    federation: MemberId
    """Name of the federation: lower-case letters, digits and hyphens."""
    members: tuple[MemberEntry, ...] = Field(min_length=1, max_length=bounds.MAX_MEMBERS)
    server: ServerEntry = ServerEntry()
    witness: WitnessEntry | None = None
    terms: Terms

    @model_validator(mode="after")
    def _enough_members(self) -> "FederationConfig":
        problem = _too_few(len(self.members), self.terms)
        if problem:
            raise ValueError(problem)
        if self.witness is not None:
            check_witnessed(self.terms)
        ids = [member.id for member in (*self.members, *((self.witness,) if self.witness else ()))]
        twice = sorted({name for name in ids if ids.count(name) > 1})
        if twice:
            raise ValueError(f"member id {twice[0]} appears more than once")
        return self


def _too_few(members: int, terms: Terms) -> str:
    """What so many members cannot do under these terms; empty if they can."""
    needed = terms.policy.fewest_contributors + 1
    if members < needed:
        return (
            f"{members} members cannot receive anything under a policy of "
            f"{terms.policy.fewest_contributors} contributors other than the recipient: name at "
            f"least {needed}"
        )
    if terms.schedule.quorum > members:
        return f"terms.schedule.quorum is {terms.schedule.quorum} with {members} members"
    least = terms.group_sums.minimum_contributors
    if terms.adapter.in_group_sums and least > members:
        return (
            f"terms.group_sums.minimum_contributors is {least} with {members} members: no sum is ever formed"
        )
    return ""


def fragile(members: int, terms: Terms) -> str:
    """What one absence would stop in a federation that is large enough; empty if the others go on."""
    needed = terms.policy.minimum_contributors + 1
    if members > needed:
        return ""
    return (
        f"with {members} members and a policy of {terms.policy.minimum_contributors} contributors other than "
        "the recipient, one member that is away stops all exchange: the others train alone while it is. Name "
        f"at least {needed + 1}"
    )


def unaligned(roster: Roster) -> str:
    """What the adapters of different architectures lack to mean the same; empty if nothing is known to."""
    families = sorted({member.family for member in roster.members if member.family})
    if roster.terms.adapter.basis or len(families) < 2:
        return ""
    return (
        f"the roster names models of {len(families)} families ({', '.join(families[:4])}"
        f"{', …' if len(families) > 4 else ''}) and no aligned basis: what one learns means nothing to "
        "another, unless they are one model cut to different depths. Align them once with `fedmosaic align`, "
        "and found the federation with its adapter.basis"
    )


@dataclass(frozen=True)
class Kit:
    """What one party was handed: its directory, the verified roster, and paths of its keys."""

    directory: Path
    roster: Roster

    @property
    def authority(self) -> Path:
        """PEM certificate of the consortium's authority."""
        return self.directory / AUTHORITY_CERTIFICATE

    @property
    def tls_certificate(self) -> Path:
        """PEM certificate of this party."""
        return self.directory / TLS_CERTIFICATE

    @property
    def tls_key(self) -> Path:
        """Private key of `tls_certificate`."""
        return self.directory / TLS_KEY

    @property
    def basis(self) -> Path:
        """The public basis of the profile mechanism, if it has one."""
        return self.directory / BASIS

    def signing_key(self) -> Ed25519PrivateKey:
        """The client's Ed25519 identity key."""
        return identity.read_signing_key(self.directory / IDENTITY_KEY)

    def member_id(self) -> str:
        """The id that this kit's certificate carries; IdentityError if it names another federation."""
        uris = identity.certificate_uris(self.tls_certificate)
        if len(uris) != 1:
            raise IdentityError(f"{self.tls_certificate}: expected one SPIFFE URI, found {len(uris)}")
        federation, client = identity.parse_spiffe_id(uris[0])
        if federation != self.roster.federation:
            raise IdentityError(
                f"{self.tls_certificate} is for federation {federation!r}, the roster beside it for "
                f"{self.roster.federation!r}; take both from one kit"
            )
        return client


def open_kit(directory: Path) -> Kit:
    """Open a server's or a client's kit and verify its roster against the pinned consortium key.

    Raises:
        IdentityError: a key is missing or the roster is not signed by the pinned key.
        ConfigurationError: the roster cannot be read.
    """
    pinned = directory / CONSORTIUM_KEY
    try:
        key = identity.public_from_hex(pinned.read_text(encoding="utf-8", errors="replace"), str(pinned))
    except OSError as error:
        raise IdentityError(
            f"{pinned}: cannot read the consortium's public key ({error.strerror}); is {directory} a kit "
            "made by `fedmosaic keys init`?"
        ) from None
    return Kit(directory, Roster.read(directory / ROSTER, key))


def create(config: FederationConfig, directory: Path, basis: Path | None = None) -> Roster:
    """Make the authority, every kit and the first roster; `basis` is copied into every kit.

    All of it is made beside its place and moved there in one step, so that a founding that was stopped
    leaves nothing that looks like a federation.

    Raises:
        ConfigurationError: the directory is not empty, or the basis is not there; nothing is written then.
        MechanismError: the basis is damaged, or not the one that the terms name; nothing is written then.
    """
    from fedmosaic.privacy.mechanism.projection import check_basis  # reads tensors, which a server never does

    check_basis(config.terms.profile, basis)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigurationError(
            f"{directory} is there already and not empty; give a new directory, or move that one away"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        roster = _make(config, making, basis)
        _sync(making)
        making.rename(directory)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    return roster


def _sync(directory: Path) -> None:
    """Have every file and folder on the disk before its name is."""
    for path in (*directory.rglob("*"), directory, directory.parent):
        sync_directory(path)


def _make(config: FederationConfig, directory: Path, basis: Path | None) -> Roster:
    authority = identity.create_authority(config.federation)
    _write_authority(directory / "consortium", authority)
    _write_server(directory / "server", authority, config)
    clients = directory / "clients"
    members = tuple(_write_client(clients / m.id, authority, config.federation, m) for m in config.members)
    roster = Roster(
        federation=config.federation,
        serial=1,
        issued=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        members=members,
        terms=config.terms,
        witness=_write_witness(directory / WITNESS, authority, config.federation, config.witness),
    )
    return _publish(directory, roster, authority, basis)


def add_member(directory: Path, entry: MemberEntry) -> Roster:
    """Enrol one more client: its kit, and a new roster in every kit.

    Raises:
        ConfigurationError: the id or its directory is taken, or the federation is full.
    """
    authority, roster = _open_consortium(directory)
    if any(m.id == entry.id for m in (*roster.members, roster.witness) if m):
        raise ConfigurationError(f"{entry.id!r} is on the roster already; use `keys rotate` for new keys")
    if len(roster.members) >= bounds.MAX_MEMBERS:
        raise ConfigurationError(f"a federation has at most {bounds.MAX_MEMBERS} members")
    kit = directory / "clients" / entry.id
    if kit.exists():
        raise ConfigurationError(f"{kit} is the kit of a former member; move it away first")
    member = _write_client(kit, authority, roster.federation, entry)
    return _reissue(directory, authority, roster, (*roster.members, member))


def revoke_member(directory: Path, member_id: str) -> Roster:
    """Take a client off the roster. Its kit is kept but is worth nothing under the new roster.

    Raises:
        ConfigurationError: too few members would be left; nothing is changed then.
    """
    authority, roster = _open_consortium(directory)
    roster.member(member_id)
    left = tuple(m for m in roster.members if m.id != member_id)
    problem = _too_few(len(left), roster.terms)
    if problem:
        raise ConfigurationError(
            f"without {member_id!r}, {problem}; first add another member with `fedmosaic keys add`, or found "
            "a new federation whose terms fit fewer members"
        )
    return _reissue(directory, authority, roster, left)


def rotate_member(directory: Path, member_id: str) -> Roster:
    """Give a client, or the witness, new TLS and identity keys; the old kit is moved aside."""
    authority, roster = _open_consortium(directory)
    witness = roster.witness if roster.witness and roster.witness.id == member_id else None
    kit = directory / WITNESS if witness else directory / "clients" / roster.member(member_id).id
    if kit.exists():
        kit.rename(kit.with_name(f"{kit.name}.until-{roster.serial}"))
    if witness:
        entry = WitnessEntry(id=witness.id, seconds=witness.seconds)
        renewed = _write_witness(kit, authority, roster.federation, entry)
        return _reissue(directory, authority, roster.model_copy(update={"witness": renewed}), roster.members)
    old = roster.member(member_id)
    new = _write_client(kit, authority, roster.federation, MemberEntry(id=old.id, family=old.family))
    members = tuple(new if m.id == member_id else m for m in roster.members)
    return _reissue(directory, authority, roster, members)


def rotate_server(directory: Path, hosts: Sequence[str] = ()) -> tuple[str, ...]:
    """Give the server a new key and certificate; the roster does not name it, so clients notice nothing.

    The names are those of the certificate that it has, unless others are given. Returns the new one's.
    """
    authority, _ = _open_consortium(directory)
    kit = directory / "server"
    names = tuple(hosts or identity.certificate_names(identity.read_certificate(kit / TLS_CERTIFICATE)))
    making = Path(tempfile.mkdtemp(prefix=".server-", dir=directory))
    _write_tls(making, identity.issue_server(authority, names))
    # A stop in between leaves a pair that is none, which the server names; done again, it is whole.
    for name in (TLS_KEY, TLS_CERTIFICATE):
        (making / name).replace(kit / name)
    making.rmdir()
    return names


def _reissue(
    directory: Path, authority: identity.Authority, roster: Roster, members: tuple[Member, ...]
) -> Roster:
    issued = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    content = roster.model_dump() | {
        "serial": roster.serial + 1,
        "issued": issued,
        "members": [m.model_dump() for m in members],
        "signature": "",
    }
    basis = directory / "server" / BASIS
    return _publish(directory, Roster.model_validate(content), authority, basis if basis.exists() else None)


def _publish(directory: Path, roster: Roster, authority: identity.Authority, basis: Path | None) -> Roster:
    signed = roster.signed(authority.signing_key)
    kits = [directory / "server", *(directory / "clients" / m.id for m in signed.members)]
    kits += [directory / WITNESS] if signed.witness else []
    pinned = identity.public_hex(authority.signing_key.public_key()) + "\n"
    certificate = authority.certificate.public_bytes(serialization.Encoding.PEM)
    for place in (directory, *kits):
        signed.write(place / ROSTER)
    for kit in kits:
        (kit / CONSORTIUM_KEY).write_text(pinned, encoding="ascii")
        (kit / AUTHORITY_CERTIFICATE).write_bytes(certificate)
        if basis is not None and basis != kit / BASIS:
            shutil.copyfile(basis, kit / BASIS)
    return signed


def _write_authority(place: Path, authority: identity.Authority) -> None:
    place.mkdir(mode=0o700)
    (place / AUTHORITY_CERTIFICATE).write_bytes(
        authority.certificate.public_bytes(serialization.Encoding.PEM)
    )
    identity.write_private(place / "authority.key", identity.private_pem(authority.key))
    identity.write_private(place / "roster.key", identity.private_pem(authority.signing_key))


def _open_consortium(directory: Path) -> tuple[identity.Authority, Roster]:
    place = directory / "consortium"
    if not place.is_dir():
        raise IdentityError(f"{place}: no consortium here; give the directory of `fedmosaic keys init`")
    certificate = identity.read_certificate(place / AUTHORITY_CERTIFICATE)
    key = identity.read_private_key(place / "authority.key")
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(f"{place / 'authority.key'}: expected a P-256 key, got {type(key).__name__}")
    signing_key = identity.read_signing_key(place / "roster.key")
    roster = Roster.read(directory / ROSTER, signing_key.public_key())
    return identity.Authority(certificate, key, signing_key), roster


def _write_server(kit: Path, authority: identity.Authority, config: FederationConfig) -> None:
    kit.mkdir(mode=0o700)
    _write_tls(kit, identity.issue_server(authority, config.server.hosts))
    (kit / SERVER_SETTINGS).write_text(
        "# The server's configuration; the terms of the federation are in roster.json.\n"
        f'listen = "0.0.0.0:{config.server.port}"\n'
        'state_dir = "state"\n'
        '# store_url = "postgresql+psycopg://user@host/database"   # default: SQLite in state_dir\n'
        "# grace_seconds = 600   # after the last round, to wait for statements that are missing\n",
        encoding="utf-8",
    )


def _write_witness(
    kit: Path, authority: identity.Authority, federation: str, entry: WitnessEntry | None
) -> Witness | None:
    if entry is None:
        return None
    keys = _write_client(kit, authority, federation, MemberEntry(id=entry.id))
    return Witness(
        id=entry.id,
        identity_key=keys.identity_key,
        tls_key_sha256=keys.tls_key_sha256,
        seconds=entry.seconds,
    )


def _write_client(kit: Path, authority: identity.Authority, federation: str, entry: MemberEntry) -> Member:
    making = kit.with_name(f".{kit.name}")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True, mode=0o700)
    tls = identity.issue_client(authority, federation, entry.id)
    _write_tls(making, tls)
    signing_key = Ed25519PrivateKey.generate()
    identity.write_private(making / IDENTITY_KEY, identity.private_pem(signing_key))
    making.rename(kit)
    return Member(
        id=entry.id,
        identity_key=identity.public_hex(signing_key.public_key()),
        tls_key_sha256=tls.key_sha256,
        family=entry.family,
    )


def _write_tls(kit: Path, tls: identity.TlsIdentity) -> None:
    (kit / TLS_CERTIFICATE).write_bytes(tls.certificate_pem)
    os.chmod(kit / TLS_CERTIFICATE, 0o644)
    identity.write_private(kit / TLS_KEY, tls.key_pem)
