"""A kit: the folder of one party, its own private keys beside what the consortium has signed.

    tls.key, identity.key                   made by the party itself, for whom they stand; they never leave
    tls.pem, roster.json                    what the consortium signs: certificate and roster
    authority.pem, consortium.pub           what both are verified with, pinned at the first installation
    public_basis.safetensors                of the task profile, if the terms name one
    pending/                                keys of a request that waits for its answer

`requests` makes the keys, `consortium` signs, `install` takes the answer in.
"""

import datetime as dt
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, model_validator

from fedmosaic.privacy.configuration import Frozen
from fedmosaic.privacy.federation import identity
from fedmosaic.privacy.federation.names import Family, Host, MemberId, Port
from fedmosaic.privacy.federation.roster import Member, Roster, check_distinct
from fedmosaic.privacy.federation.terms import CommonTerms, Seconds, Terms, check_witnessed
from fedmosaic.privacy.files import write_atomically
from fedmosaic.privacy.groupkey.agreement import MINIMUM_MEMBERS
from fedmosaic.protos import bounds
from fedmosaic.protos.errors import IdentityError

AUTHORITY_CERTIFICATE = "authority.pem"
CONSORTIUM_KEY = "consortium.pub"
ROSTER = "roster.json"
BASIS = "public_basis.safetensors"
PROFILE = "profile.json"
"""The task profile's terms as `fedmosaic probe` writes them, beside its basis."""
TLS_CERTIFICATE = "tls.pem"
TLS_KEY = "tls.key"
IDENTITY_KEY = "identity.key"
SERVER_SETTINGS = "server.toml"
PENDING = "pending"
_RARELY = 0.001
"""Share of rounds that may be drawn without enough of a family before the founder is told."""
REQUEST = "request.json"


class MemberEntry(Frozen):
    """A client as the founding configuration names it."""

    id: MemberId
    """Name of the member: lower-case letters, digits and hyphens."""
    family: Family = ""
    """Architecture of its model. Members of different families receive nothing from each other, see
    `relevance.across_families`."""


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

    @property
    def parties(self) -> tuple[MemberEntry, ...]:
        """The members, and the witness if there is one."""
        return (*self.members, *((MemberEntry(id=self.witness.id),) if self.witness else ()))

    @model_validator(mode="after")
    def _enough_members(self) -> "FederationConfig":
        if problem := too_few(len(self.members), self.terms):
            raise ValueError(problem)
        if self.witness is not None:
            check_witnessed(self.terms)
        check_distinct("member id", [party.id for party in self.parties])
        return self


def _smallest_family(members: Sequence[Member | MemberEntry], terms: CommonTerms) -> tuple[str, int, int]:
    """Of the families that exchange apart from others: the smallest, its members, and how many there are."""
    counts = Counter("" if terms.relevance.across_families else member.family for member in members)
    family = min(sorted(counts), key=counts.__getitem__)
    return family, counts[family], len(counts)


def lonely(members: Sequence[Member | MemberEntry], terms: CommonTerms) -> str:
    """Which family could not exchange under terms that keep families apart; empty if all can."""
    family, kin, families = _smallest_family(members, terms)
    sums = terms.group_sums if terms.adapter.in_group_sums else None
    needed = terms.least_group(len(members)) if sums else terms.policy.fewest_contributors + 1
    if families > 1 and kin < needed:
        return (
            f"family {family!r} has {kin} of the {len(members)} members, who receive from their own family "
            f"only, and of fewer than {needed} nobody receives anything: name at least {needed} of it, or "
            "none, or, where `fedmosaic align evaluate` has shown that the models help each other, write "
            "terms.relevance.across_families = true"
        )
    if sums and sums.groups < families:
        return (
            f"terms.group_sums.groups is {sums.groups} with members of {families} families, which share no "
            f"sum: write at least {families}, or terms.relevance.across_families = true"
        )
    return ""


def too_few(members: int, terms: Terms) -> str:
    """What so many members cannot do under these terms; empty if they can."""
    fewest, sampled = terms.policy.fewest_contributors, terms.schedule.sampled_clients
    if members <= fewest:
        return (
            f"{members} members cannot receive anything under a policy of {fewest} contributors other than "
            f"the recipient: name at least {fewest + 1}"
        )
    if terms.adapter.encrypted and members < MINIMUM_MEMBERS:
        return (
            f"{members} members agree on no group key, which {MINIMUM_MEMBERS} at least must hold: name as "
            "many, or take another adapter.protection"
        )
    if terms.schedule.quorum > members:
        return f"terms.schedule.quorum is {terms.schedule.quorum} with {members} members"
    if members > bounds.MAX_CONTRIBUTORS and sampled is None:
        return (
            f"{members} members in every round are more than {bounds.MAX_CONTRIBUTORS}; name how many take "
            "part in one in terms.schedule.sampled_clients"
        )
    if (sampled or 0) > members:
        return f"terms.schedule.sampled_clients is {sampled} with {members} members"
    least = terms.group_sums.minimum_contributors
    if terms.adapter.in_group_sums and least > members:
        return f"terms.group_sums.minimum_contributors is {least} with {members} members: no sum is formed"
    return ""


def fragile(entries: Sequence[Member | MemberEntry], terms: Terms) -> str:
    """What one absence or an unlucky draw stops in a federation that is large enough; empty if nothing."""
    least, (family, members, apart) = terms.policy.minimum_contributors, _smallest_family(entries, terms)
    sampled, needed = terms.schedule.sampled_clients, terms.policy.fewest_contributors + 1
    others = len(entries) - members
    if sampled and apart > 1 and not terms.adapter.in_group_sums:
        # Hypergeometric: rounds are drawn without regard to families.
        unlucky = sum(math.comb(members, k) * math.comb(others, sampled - k) for k in range(needed))
        share = unlucky / math.comb(len(entries), sampled)
        if share > _RARELY:
            return (
                f"a round draws {sampled} of the {len(entries)} members whatever their family; in "
                f"{share:.1%} of rounds it is fewer than {needed} of family {family!r} ({members} in all), "
                "who then receive nothing. With terms.schedule.sampled_clients = "
                f"{others + needed} there are always enough"
            )
    where = f" in family {family!r}" if apart > 1 else ""
    if terms.adapter.in_group_sums:
        fewest, present = terms.group_sums.minimum_contributors, terms.schedule.share(members, len(entries))
        return (
            f"with {present} members{where} in a round and sums of at least {fewest}, one member that is "
            "away stops all sums: name more, or lower terms.group_sums.minimum_contributors"
            if present <= fewest
            else ""
        )
    if members > least + 1:
        return ""
    return (
        f"with {members} members{where} and a policy of {least} contributors other than the recipient, one "
        "member that is away stops all exchange: the others train alone while it is. Name at least "
        f"{least + 2}"
    )


def unaligned(roster: Roster) -> str:
    """Why members may gain nothing from others of another family, or of their own; empty if all is well."""
    families = sorted({member.family for member in roster.members if member.family})
    if not roster.terms.relevance.across_families:
        problem = lonely(roster.members, roster.terms)
        unnamed = [member.id for member in roster.members if not member.family]
        if problem or not families or not unnamed:
            return problem
        return (
            f"{', '.join(unnamed[:4])}{', …' if len(unnamed) > 4 else ''} name no family where others do, "
            "and receive from each other whatever their models are: name that of every member, or of none"
        )
    if len(families) < 2:
        return ""
    named = f"{', '.join(families[:4])}{', …' if len(families) > 4 else ''}"
    begun = f"the roster names models of {len(families)} families ({named})"
    if not roster.terms.adapter.basis:
        return (
            f"{begun} and no aligned basis: what one learns means nothing to another. Align them once with "
            "`fedmosaic align`, and found the federation with its adapter.basis, or with "
            "relevance.across_families = false"
        )
    return (
        f"{begun} on one aligned basis, which was shown to carry what they learn only between models that "
        "compute nearly the same: measure the transfer ratio with `fedmosaic align evaluate`, and where its "
        "interval holds 0 found the federation with relevance.across_families = false"
    )


@dataclass(frozen=True)
class Kit:
    """What one party was handed: its directory and the verified roster."""

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

    @property
    def expires(self) -> dt.datetime:
        """When the certificate does; IdentityError if it cannot be read."""
        return identity.read_certificate(self.tls_certificate).not_valid_after_utc

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


def keep_signed(kit: Path, roster: Roster, place: Path) -> None:
    """Write into a state directory what its statement is checked with: the roster, and what the kit pins."""
    for name in (AUTHORITY_CERTIFICATE, CONSORTIUM_KEY):
        write_atomically(place / name, (kit / name).read_bytes())
    write_atomically(place / ROSTER, (roster.model_dump_json(indent=2) + "\n").encode())


def open_kit(directory: Path) -> Kit:
    """Open a kit and verify its roster against the pinned consortium key; IdentityError if that fails."""
    pinned = directory / CONSORTIUM_KEY
    try:
        key = identity.public_from_hex(pinned.read_text(encoding="utf-8", errors="replace"), str(pinned))
    except OSError as error:
        raise IdentityError(
            f"{pinned}: cannot read the consortium's public key ({error.strerror}); is {directory} a kit "
            "that `fedmosaic keys install` has filled?"
        ) from None
    return Kit(directory, Roster.read(directory / ROSTER, key))
