"""Everything the server has to know, fixed when it starts: from a file, or a kit and its roster."""

import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Final, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from fedmosaic.privacy.configuration import Frozen, read_configuration, validate
from fedmosaic.privacy.federation.kits import SERVER_SETTINGS, open_kit, too_few, unaligned
from fedmosaic.privacy.federation.names import ListenAddress
from fedmosaic.privacy.federation.roster import Member, Roster
from fedmosaic.privacy.federation.terms import Terms
from fedmosaic.privacy.groupkey.agreement import MINIMUM_MEMBERS
from fedmosaic.protos.messages import SectionName

log = logging.getLogger(__name__)


def _store_url(text: str) -> str:
    try:
        backend = make_url(text).get_backend_name()
    except (ArgumentError, ValueError):
        backend = ""
    if backend not in ("sqlite", "postgresql"):
        raise ValueError(
            "this is no URL of a database that is known; write postgresql+psycopg://user@host/database, or "
            "sqlite:////folder/server.db"
        )
    return text


def _collector(text: str) -> str:
    found = urlsplit(text)
    if found.scheme != "https" and (found.scheme, found.hostname) not in _LOCAL_COLLECTORS:
        raise ValueError("write https://collector.example.org:4318/v1/traces; http:// only on this machine")
    return text


_LOCAL_COLLECTORS: Final = {("http", host) for host in ("localhost", "127.0.0.1", "::1")}
StoreUrl = Annotated[str, AfterValidator(_store_url)]
"""SQLAlchemy URL of a SQLite or PostgreSQL database."""
CollectorUrl = Annotated[str, AfterValidator(_collector)]
"""Where an OpenTelemetry collector takes traces."""


class TlsFiles(Frozen):
    """PEM files of the server's side of mutual TLS; clients' certificates must come from the authority."""

    certificate: Path
    private_key: Path
    authority: Path


class OperatorSettings(Frozen):
    """`server.toml`: what the server's operator decides. Paths are relative to the kit."""

    listen: ListenAddress = "127.0.0.1:7443"
    """Address and port; port 0 takes a free one."""
    state_dir: Path = Path("state")
    """Directory of all that must survive a restart."""
    store_url: StoreUrl | None = None
    """SQLAlchemy URL of the database; SQLite in `state_dir` by default."""
    traces_url: CollectorUrl | None = None
    """OpenTelemetry collector (OTLP over HTTP) that is told of every round's stages; nobody by default."""
    grace_seconds: float = Field(default=600.0, ge=0.0, le=1e9)
    """After the last round, how long the server stays for members that have not handed over a statement."""


class ServerSettings(OperatorSettings):
    """One run of one federation: the roster, which all sides hold, and what the operator decides.

    Attributes:
        roster: members, terms and witness.
        state_dir: folder of everything that must survive a restart; what is not named here is the operator's.
        tls: certificates; without them only in-process use is possible.
        durable: False skips fsync; for simulations, whose state nobody needs after a crash.
        run_id: of a new run, 32 hexadecimal digits, for simulations, whose draws of clients follow from it;
            random by default.
    """

    roster: Roster
    state_dir: Path
    tls: TlsFiles | None = None
    durable: bool = True
    run_id: str | None = Field(default=None, pattern=r"^[0-9a-f]{32}$")

    @model_validator(mode="after")
    def _enough_members(self) -> Self:
        # The roster is signed, but it may be older than a rule of this program.
        if problem := too_few(len(self.roster.members), self.terms):
            raise ValueError(problem)
        return self

    def __copy__(self) -> Self:
        """Without what follows from the roster: the copy may be given another."""
        copied = super().__copy__()
        for name in ("members", "roster_hash"):
            copied.__dict__.pop(name, None)
        return copied

    @cached_property
    def members(self) -> Mapping[str, Member]:
        """The roster's members by id."""
        return {member.id: member for member in self.roster.members}

    @cached_property
    def roster_hash(self) -> bytes:
        """Hash of the roster, that all sides must hold."""
        return self.roster.hash

    @property
    def terms(self) -> Terms:
        """What all members have agreed on."""
        return self.roster.terms

    @property
    def encrypted(self) -> bool:
        """Whether uploads are encrypted, so that members must agree on a group key first."""
        return self.terms.encryption.backend != "plain"

    @property
    def minimum_epoch_members(self) -> int:
        """Fewest members of a key epoch: with fewer, no recipient could receive anything."""
        return max(self.terms.policy.fewest_contributors + 1, MINIMUM_MEMBERS if self.encrypted else 0)

    def family(self, client: str) -> str:
        """Family in which a member shares the LoRA of its other layers; empty if it shares none."""
        member = self.members.get(client)
        return member.family if member and member.family in self.terms.adapter.family_dimensions else ""

    def dimensions(self, client: str) -> dict[SectionName, int]:
        """Length of the vector of every section that a member may upload."""
        adapter, family = self.terms.adapter, self.family(client)
        sections: dict[SectionName, int] = {"shared": adapter.shared_dimensions}
        return {**sections, "family": adapter.family_dimensions[family]} if family else sections


def settings_from_kit(directory: Path) -> ServerSettings:
    """Settings of the run that a server's kit describes.

    Raises:
        ConfigurationError: `server.toml` or the roster is not valid.
        IdentityError: the roster is not signed by the pinned consortium key.
    """
    kit = open_kit(directory)
    if warning := unaligned(kit.roster):
        log.warning("%s", warning)
    operator = read_configuration(directory / SERVER_SETTINGS, OperatorSettings)
    content = {
        **dict(operator),
        "state_dir": kit.directory / operator.state_dir,
        "tls": TlsFiles(certificate=kit.tls_certificate, private_key=kit.tls_key, authority=kit.authority),
        "roster": kit.roster,
    }
    return validate(content, ServerSettings, f"the roster of {kit.directory}")
