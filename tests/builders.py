"""What many tests need: a public mechanism, a federation to found, certificates, a charge to a ledger."""

import datetime as dt
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.federation import consortium, identity
from fedmosaic.privacy.federation.install import install
from fedmosaic.privacy.federation.kits import FederationConfig, MemberEntry
from fedmosaic.privacy.federation.office import open_office
from fedmosaic.privacy.federation.requests import make_request
from fedmosaic.privacy.federation.roster import Roster
from fedmosaic.privacy.federation.terms import Terms
from fedmosaic.privacy.ledger.ledger import Ledger, data_epoch
from fedmosaic.privacy.mechanism.profile import ProfileMechanism, Reduction

EPOCH = data_epoch(["a", "b", "c"])
DIGEST = "a" * 64


def tiny_mechanism(sizes: tuple[int, int, int] = (8, 16, 32), **changes: Any) -> ProfileMechanism:
    """The mechanism of a task profile, by default of a probe that nobody has to have.

    The sizes are the probe's hidden and intermediate one, and how many numbers a profile has.
    """
    names = ("hidden_size", "intermediate_size", "projection_dimensions")
    reduction = Reduction(**dict(zip(names, sizes, strict=True)))
    fields = {"probe": "tiny", "probe_sha256": "0" * 64, "reduction": reduction}
    return ProfileMechanism.model_validate(fields | changes)


def founding(*ids: str, name: str = "clinics", **changes: Any) -> FederationConfig:
    """A federation of these members, with other terms than the defaults where they are given."""
    terms = Terms.model_validate({"profile": tiny_mechanism()} | changes)
    members = tuple(MemberEntry(id=member) for member in ids or "abcd")
    return FederationConfig(federation=name, members=members, terms=terms)


def with_schedule(roster: Roster, **changes: Any) -> Roster:
    """The roster with another schedule, that nobody has signed."""
    schedule = roster.terms.schedule.model_copy(update=changes)
    return roster.model_copy(update={"terms": roster.terms.model_copy(update={"schedule": schedule})})


def enrol_member(directory: Path, member: str, family: str = "", *, replace: bool = False) -> Roster:
    """Have a member, new or known, make keys in its kit here, and take in what the consortium answers."""
    kit = directory / "clients" / member
    name = open_office(directory, None).federation
    answers = consortium.approve(directory, [make_request(kit, name, member, family)], replace=replace)
    for answer in answers.answers.values():
        install(answer, kit, None)
    assert answers.roster is not None
    return answers.roster


@dataclass(frozen=True)
class TlsIdentity:
    """A certificate and its private key, both PEM."""

    certificate_pem: bytes
    key_pem: bytes


def issue_server(
    authority: identity.Authority, hosts: Sequence[str], now: dt.datetime | None = None
) -> TlsIdentity:
    """A new key of a server, and a certificate for it."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = identity.certify_server(authority, key.public_key(), hosts, now)
    return TlsIdentity(certificate, identity.private_pem(key))


@functools.cache
def tls_key(client: str) -> ec.EllipticCurvePrivateKey:
    """The key of this client's certificates, in all tests."""
    return ec.generate_private_key(ec.SECP256R1())


def issue_client(
    authority: identity.Authority,
    federation: str,
    client: str,
    now: dt.datetime | None = None,
    key: ec.EllipticCurvePrivateKey | None = None,
) -> TlsIdentity:
    """A certificate for a client's key, the one of all tests unless another is given."""
    key = key or tls_key(client)
    certificate = identity.certify_client(authority, key.public_key(), federation, client, now)
    return TlsIdentity(certificate, identity.private_pem(key))


def charge(
    ledger: Ledger,
    event: GaussianEvent,
    channel: str = "adapter",
    round: int = 0,
    *,
    ids: list[str] | None = None,
    digest: str | None = None,
    **changes: Any,
) -> int:
    """Reserve a release, with evidence if ids are given, and record it as made if a digest is.

    Returns:
        Sequence of the reservation.
    """
    fields: dict[str, Any] = {
        "data_epoch": data_epoch(ids) if ids else EPOCH,
        "secure_noise": True,
        "clipping_norm": 1.0,
        "dimensions": 8,
        "example_ids": ids,
    }
    sequence = ledger.reserve(channel, round, event, **(fields | changes))  # type: ignore[arg-type]  # a literal
    if digest is not None:
        ledger.released(sequence, digest)
    return sequence
