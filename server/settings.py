"""Everything the server has to know, fixed when it starts: from a file, or a kit and its roster."""

import logging
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, model_validator
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from fedmosaic.privacy.configuration import Frozen, Hex32, read_configuration, validate
from fedmosaic.privacy.encryption.parameters import Parameters, PlainParameters
from fedmosaic.privacy.federation.kits import SERVER_SETTINGS, open_kit, unaligned
from fedmosaic.privacy.federation.names import ListenAddress, MemberId
from fedmosaic.privacy.federation.roster import RosterMark, Witness, taking_part
from fedmosaic.privacy.federation.terms import GroupSumTerms, RelevanceTerms, ScheduleTerms
from fedmosaic.privacy.groupkey.agreement import MINIMUM_MEMBERS
from fedmosaic.privacy.policy import AggregationPolicy
from fedmosaic.protos import bounds
from fedmosaic.protos.messages import SectionName

log = logging.getLogger(__name__)


def _from_hex(value: Any) -> Any:
    return bytes.fromhex(value) if isinstance(value, str) else value


Bytes32 = Annotated[
    bytes,
    Field(min_length=32, max_length=32),
    BeforeValidator(_from_hex),
    PlainSerializer(bytes.hex, return_type=str),
]
"""32 bytes; 64 hexadecimal digits in files."""


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


class ServerSettings(OperatorSettings, ScheduleTerms, RelevanceTerms):
    """One run of one federation: what the operator decides, the terms of schedule and relevance, and these.

    Attributes:
        federation: id of the federation, as in the SPIFFE URIs of the certificates.
        members: Ed25519 public key (32 bytes) of every member, by id.
        tls_key_sha256: pinned SHA-256 of the SubjectPublicKeyInfo of each member's certificate; members
            without an entry need a valid certificate only.
        roster_hash: hash of the roster that all sides must hold.
        roster_mark: what a later roster is judged by; None lets any follow.
        adapter_spec_hash: of the adapter that clients enrol with.
        witness: who countersigns every aggregate, if somebody does.
        families: architecture name by member; members without an entry belong to no family.
        shared_dimensions: length d of the shared adapter vector.
        family_dimensions: length of the family's vector by family; families without an entry share none.
        profile_dimensions: length k of the task profile.
        profile_noise_variance: noise variance per coordinate of one fresh release, σ²C²; 0 in tests only.
        policy: limits on every weight row.
        group_sums: terms of the groups' sums, where members share these in place of adapters.
        encryption: parameters of the back end; they fix the bits of the weights.
        state_dir: folder of everything that must survive a restart; what is not named here is the operator's.
        tls: certificates; without them only in-process use is possible.
        durable: False skips fsync; for simulations, whose state nobody needs after a crash.
        run_id: of a new run, 32 hexadecimal digits, for simulations, whose draws of clients follow from it;
            random by default.
    """

    federation: MemberId
    members: dict[MemberId, Bytes32] = Field(min_length=1, max_length=bounds.MAX_MEMBERS)
    tls_key_sha256: dict[MemberId, Hex32] = Field(default_factory=dict)
    roster_hash: Bytes32
    roster_mark: RosterMark | None = None
    adapter_spec_hash: Bytes32
    witness: Witness | None = None
    families: dict[MemberId, str] = Field(default_factory=dict)
    shared_dimensions: int = Field(ge=1)
    family_dimensions: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    profile_dimensions: int = Field(ge=1, le=bounds.MAX_PROFILE_DIMENSIONS)
    profile_noise_variance: float = Field(ge=0.0, allow_inf_nan=False)
    policy: AggregationPolicy = AggregationPolicy()
    group_sums: GroupSumTerms | None = None
    encryption: Annotated[Parameters, Field(discriminator="backend")] = PlainParameters()
    state_dir: Path
    tls: TlsFiles | None = None
    durable: bool = True
    run_id: str | None = Field(default=None, pattern=r"^[0-9a-f]{32}$")

    @model_validator(mode="after")
    def _consistent(self) -> "ServerSettings":
        if self.quorum > len(self.members):
            raise ValueError(f"quorum is {self.quorum} with {len(self.members)} members")
        for what, named in (("families", self.families), ("tls_key_sha256", self.tls_key_sha256)):
            foreign = sorted(set(named) - set(self.members))
            if foreign:
                raise ValueError(f"{what} names {foreign[0]!r}, who is not a member")
        if self.minimum_epoch_members > len(self.members):
            raise ValueError(
                f"{len(self.members)} members cannot receive anything under a policy of "
                f"{self.policy.fewest_contributors} contributors other than the recipient and back end "
                f"{self.encryption.backend!r}: {self.minimum_epoch_members} are the fewest"
            )
        return self

    @property
    def encrypted(self) -> bool:
        """Whether uploads are encrypted, so that members must agree on a group key first."""
        return self.encryption.backend != "plain"

    @property
    def minimum_epoch_members(self) -> int:
        """Fewest members of a key epoch: with fewer, no recipient could receive anything."""
        return max(self.policy.fewest_contributors + 1, MINIMUM_MEMBERS if self.encrypted else 0)

    def taking_part(self, run_id: str, number: int) -> frozenset[str]:
        """Members that take part in a round; see `fedmosaic.privacy.federation.roster`."""
        return taking_part(tuple(self.members), self.sampled_clients, run_id, number)

    def family(self, client: str) -> str:
        """Family in which a member shares the LoRA of its other layers; empty if it shares none."""
        family = self.families.get(client, "")
        return family if family in self.family_dimensions else ""

    def receives_from(self, client: str) -> str:
        """Family whose members alone a member receives from; empty for all where families share."""
        return "" if self.across_families else self.families.get(client, "")

    def dimensions(self, client: str) -> dict[SectionName, int]:
        """Length of the vector of every section that a member may upload."""
        sections: dict[SectionName, int] = {"shared": self.shared_dimensions}
        family = self.family(client)
        return {**sections, "family": self.family_dimensions[family]} if family else sections


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
    roster, terms = kit.roster, kit.roster.terms
    content = {
        **dict(operator),
        "state_dir": kit.directory / operator.state_dir,
        "tls": TlsFiles(certificate=kit.tls_certificate, private_key=kit.tls_key, authority=kit.authority),
        "federation": roster.federation,
        "members": roster.identity_keys(),
        "tls_key_sha256": {member.id: member.tls_key_sha256 for member in roster.members},
        "roster_hash": roster.hash,
        "roster_mark": RosterMark.of(roster),
        "adapter_spec_hash": terms.adapter.spec_hash,
        "witness": roster.witness,
        "families": {member.id: member.family for member in roster.members if member.family},
        "shared_dimensions": terms.adapter.shared_dimensions,
        "family_dimensions": terms.adapter.family_dimensions,
        "profile_dimensions": terms.profile.dimensions,
        "profile_noise_variance": terms.profile.noise_variance,
        **dict(terms.schedule),
        **dict(terms.relevance),
        "policy": terms.policy,
        "group_sums": terms.group_sums if terms.adapter.in_group_sums else None,
        "encryption": terms.encryption,
    }
    # The roster is signed, but it may be older than a rule of this program.
    return validate(content, ServerSettings, f"the roster of {kit.directory}")
