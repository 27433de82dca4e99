"""The consortium: the one directory that can sign, and what it signs.

    DIR/consortium/           authority.key, roster.key   signs certificates and rosters; stays here
                              founding.json               who may found the federation, on which terms
                              approved/, former/          requests that were signed; those keys that are over
    DIR/roster.json           public, like consortium.pub, authority.pem and the basis beside it
    DIR/answers/server/       what is handed back to whoever runs the server: public
    DIR/answers/clients/<id>/ what is handed back to a member: public

Where the whole federation is on one machine, `create` also makes every party's keys, in DIR/server and
DIR/clients/<id>. Whoever has such a directory can pose as any member.
"""

import datetime as dt
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedmosaic.privacy.configuration import read_configuration, validate
from fedmosaic.privacy.federation import identity, kits
from fedmosaic.privacy.federation.kits import FederationConfig, lonely, too_few
from fedmosaic.privacy.federation.office import (
    AUTHORITY_KEY,
    FOUNDING,
    PLACE,
    ROSTER_KEY,
    Office,
    open_office,
    publish,
    write_answer,
    write_vouching,
)
from fedmosaic.privacy.federation.requests import KeyRequest, make_request, read_request
from fedmosaic.privacy.federation.roster import Member, Roster, Witness
from fedmosaic.privacy.federation.terms_checks import settled, with_bounded_delta
from fedmosaic.privacy.files import sync_directory, write_atomically
from fedmosaic.protos.errors import ConfigurationError, IdentityError


@dataclass(frozen=True)
class Approval:
    """What came of approving requests: no roster while the founding waits; answers to hand back, by id."""

    roster: Roster | None
    answers: dict[str, Path]
    waiting: tuple[str, ...]


def create_federation(
    config: FederationConfig | Path | str, out: Path | str = "federation", basis: Path | str | None = None
) -> Roster:
    """Found a federation on one machine, as `fedmosaic keys init --for-demo` does: every party's keys.

    Whoever holds `out` can pose as any member; members on machines of their own use `fedmosaic keys request`.

    Raises:
        ConfigurationError: the file is wrong, no client's noise could be planned, or `out` is not empty.
        MechanismError: `basis`, a file, is damaged, or not the public basis that the terms name.
    """
    return create(planned(config), Path(out), Path(basis) if basis is not None else None)


def planned(config: FederationConfig | Path | str) -> FederationConfig:
    """A founding configuration, or that of a file, whose terms were tried and have their noise written in."""
    if not isinstance(config, FederationConfig):
        config = read_configuration(Path(config), FederationConfig)
    terms = settled(with_bounded_delta(config.terms), config.members)
    return config.model_copy(update={"terms": terms})


def begin(
    config: FederationConfig, directory: Path, passphrase: str | None, basis: Path | None = None
) -> None:
    """Make a consortium's own keys; the federation is founded once all members' requests are approved.

    All of it is made beside its place and moved there in one step, so that a founding that was stopped leaves
    nothing that looks like a federation. Without a passphrase, whoever can read the files has the keys.
    """
    with _made_at_once(config, directory, basis) as making:
        _begin(config, making, passphrase)


def create(
    config: FederationConfig, directory: Path, basis: Path | None = None, *, simulated: bool = False
) -> Roster:
    """Found a federation on one machine: all keys are made here, without a passphrase; see `begin`.

    That of a simulation stays as it is, and in one place: nothing is checked that was made a moment ago, or
    waits for the disk, and the kits of thousands share one file of the roster, and of the basis.
    """
    with _made_at_once(config, directory, basis, simulated=simulated) as making:
        _begin(config, making, None)
        requests = [make_request(making / "server", config.federation, hosts=config.server.hosts)]
        for member in config.parties:
            kit = making / "clients" / member.id
            requests.append(make_request(kit, config.federation, member.id, member.family))
        if simulated:
            return _settle(open_office(making, None), config, requests)
        approve(making, requests)
        return kits.open_kit(making / "server").roster


def _settle(office: Office, config: FederationConfig, requests: Sequence[KeyRequest]) -> Roster:
    """Sign the first roster and fill every kit where it lies."""
    members = tuple(_member(request) for request in requests if request.id)
    roster = _first(config, members).signed(office.authority.signing_key)
    roster.write(office.directory / kits.ROSTER)
    for request in requests:
        kit = office.directory / (f"clients/{request.id}" if request.id else "server")
        write_answer(office, kit, request, os.link)
        os.link(office.directory / kits.ROSTER, kit / kits.ROSTER)
        for made in (kit / kits.PENDING).iterdir():
            made.replace(kit / made.name)
        (kit / kits.PENDING).rmdir()
    return roster


@contextmanager
def _made_at_once(
    config: FederationConfig, directory: Path, basis: Path | None, *, simulated: bool = False
) -> Iterator[Path]:
    from fedmosaic.privacy.mechanism.projection import check_basis  # reads tensors, which a server never does

    check_basis(config.terms.profile, basis)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigurationError(f"{directory} is there already and not empty; give a new directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        if basis is not None:
            shutil.copyfile(basis, making / kits.BASIS)
        yield making
        # For thousands of kits that takes minutes, and a simulated server waits for no disk either.
        for path in () if simulated else (*making.rglob("*"), making):
            sync_directory(path)
        making.rename(directory)
        if not simulated:
            sync_directory(directory.parent)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise


def _begin(config: FederationConfig, directory: Path, passphrase: str | None) -> None:
    authority = identity.create_authority(config.federation)
    place = directory / PLACE
    place.mkdir(mode=0o700)
    identity.write_private(place / AUTHORITY_KEY, identity.private_pem(authority.key, passphrase))
    identity.write_private(place / ROSTER_KEY, identity.private_pem(authority.signing_key, passphrase))
    write_atomically(place / FOUNDING, config.model_dump_json(indent=1).encode(), durable=False)
    write_vouching(authority, directory)


def approve(
    directory: Path, requests: Sequence[KeyRequest], passphrase: str | None = None, *, replace: bool = False
) -> Approval:
    """Sign what members, or the server, have asked for, or nothing. Compare the fingerprints before.

    The first roster is signed once all members that the founding names have asked. Later, a request of a new
    name adds a member, one with the keys on the roster renews the certificate, and one with other keys needs
    `replace`.
    """
    office = open_office(directory, passphrase)
    seen: set[str] = set()
    for request in requests:
        request.check("the request")
        if request.id in seen:
            raise ConfigurationError(
                f"there are two requests of {request.who}: ask by the fingerprint which one it is, and give "
                "that"
            )
        seen.add(request.id)
        _check_name(office, request, replace=replace)
    _check_keys(office, requests)
    for request in requests:
        if (before := office.approved(request.id)) is not None and _keys(before) != _keys(request):
            office.retire(request.id)
        office.kept(request.id).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(office.kept(request.id), request.model_dump_json().encode())
    return _answer(office, requests)


def _keys(party: KeyRequest | Member) -> tuple[str, str]:
    return party.identity_key, party.tls_key_sha256


def _check_name(office: Office, request: KeyRequest, *, replace: bool) -> None:
    if request.federation != office.federation:
        raise ConfigurationError(
            f"the request of {request.who} is for federation {request.federation!r}, this is "
            f"{office.federation!r}"
        )
    if not request.id:
        return
    founding, roster = office.founding, office.roster
    present: KeyRequest | Member | None = office.approved(request.id)
    if roster is not None:
        present = next((party for party in roster.parties if party.id == request.id), None)
    elif founding is not None:
        entry = next((party for party in founding.parties if party.id == request.id), None)
        if entry is None or (entry.family and entry.family != request.family):
            raise ConfigurationError(
                f"the founding names no {request.who} of family {request.family!r}; it names "
                f"{', '.join(f'{m.id} ({m.family})' if m.family else m.id for m in founding.members)}"
            )
    if present is not None and _keys(present) != _keys(request) and not replace:
        raise ConfigurationError(
            f"{request.who} has other keys already. If it really has made new ones, which its fingerprint "
            "tells over the telephone, say --replace; those of before are then never taken again"
        )


def _check_keys(office: Office, requests: Sequence[KeyRequest]) -> None:
    """Refuse keys that are another party's, or that were given up: an old request proves nothing."""
    place = office.directory / PLACE
    present: list[KeyRequest | Member] = [read_request(path) for path in (place / "approved").rglob("*.json")]
    present += office.roster.parties if office.roster else ()
    owner = {key: party.id for party in present for key in _keys(party)}
    former = {key for path in (place / "former").rglob("*.json") for key in _keys(read_request(path))}
    for request in requests:
        for what, key in zip(("identity key", "TLS key"), _keys(request), strict=True):
            if key and owner.setdefault(key, request.id) != request.id:
                raise IdentityError(
                    f"the {what} in the request of {request.who} is that of "
                    f"{owner[key] or 'the server'!r}: one has copied the other's; ask both for new requests"
                )
            if key and key in former:
                raise IdentityError(
                    f"the {what} in the request of {request.who} was given up before: the request is an old "
                    "one, or a copy of it that somebody kept; ask for a new one"
                )


def _answer(office: Office, requests: Sequence[KeyRequest]) -> Approval:
    """Sign the roster where its members change, and write the answers."""
    no_server = () if office.approved("") else ("(server)",)
    if office.roster is None:
        founding = office.founding
        found = {party.id: office.approved(party.id) for party in (founding.parties if founding else ())}
        waiting = tuple(name for name, request in found.items() if request is None)
        if founding is None or waiting:
            return Approval(None, {}, (*waiting, *no_server))
        parties = {name: _member(request) for name, request in found.items() if request}
        witness = None
        if founding.witness is not None:
            witness = _witness(parties.pop(founding.witness.id), founding.witness.seconds)
        first = _first(founding, tuple(parties.values()), witness)
        return Approval(*publish(office, first, {"", *found}), no_server)
    new = {request.id: _member(request) for request in requests if request.id}
    if (witness := office.roster.witness) is not None and witness.id in new:
        witness = _witness(new.pop(witness.id), witness.seconds)
    members = {member.id: member for member in office.roster.members} | new
    roster = _next(office.roster, tuple(members.values()), witness)
    return Approval(*publish(office, roster, {request.id for request in requests}), no_server)


def _first(config: FederationConfig, members: tuple[Member, ...], witness: Witness | None = None) -> Roster:
    return Roster(
        federation=config.federation,
        serial=1,
        issued=_today(),
        members=members,
        terms=config.terms,
        witness=witness,
    )


def _witness(party: Member, seconds: float) -> Witness:
    return Witness(**dict(party), seconds=seconds)


def _member(request: KeyRequest) -> Member:
    identity_key, tls_key = _keys(request)
    return Member(id=request.id, identity_key=identity_key, tls_key_sha256=tls_key, family=request.family)


def _today() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


def _next(roster: Roster, members: tuple[Member, ...], witness: Witness | None) -> Roster:
    """The roster of these parties: the same one if they are the same."""
    if (members, witness) == (roster.members, roster.witness):
        return roster
    changes = {"serial": roster.serial + 1, "issued": _today(), "members": [dict(m) for m in members]}
    changes["witness"] = witness and dict(witness)
    return validate(roster.model_dump() | changes | {"signature": ""}, Roster, "the new roster")


def revoke_member(directory: Path, member_id: str, passphrase: str | None = None) -> Roster:
    """Take a client off the roster, unless too few members are left; its keys are never taken again."""
    office = open_office(directory, passphrase)
    if office.roster is None:
        raise ConfigurationError("no roster is signed yet, so nobody can be taken off it")
    office.roster.member(member_id)
    left = tuple(m for m in office.roster.members if m.id != member_id)
    if problem := too_few(len(left), office.roster.terms) or lonely(left, office.roster.terms):
        raise ConfigurationError(
            f"without {member_id!r}, {problem}; first add another member with `fedmosaic keys approve`, or "
            "found a new federation whose terms fit fewer members"
        )
    office.retire(member_id)
    return publish(office, _next(office.roster, left, office.roster.witness), set())[0]
