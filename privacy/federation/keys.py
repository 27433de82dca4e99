"""`fedmosaic keys`: found a federation and maintain its members, whose private keys stay at home."""

import datetime as dt
import getpass
import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import tyro
from rich.console import Console
from rich.table import Table

from fedmosaic.privacy.federation import consortium, kits
from fedmosaic.privacy.federation.consortium import create_federation, planned
from fedmosaic.privacy.federation.identity import expires_soon, read_certificate
from fedmosaic.privacy.federation.install import consortium_fingerprint, install
from fedmosaic.privacy.federation.office import ANSWERS, is_sealed
from fedmosaic.privacy.federation.requests import STRENGTH, make_request, member_fingerprint, read_request
from fedmosaic.privacy.federation.roster import Roster
from fedmosaic.privacy.files import sync_directory, write_atomically
from fedmosaic.protos.errors import ConfigurationError, IdentityError

_VARIABLE: Final = "FEDMOSAIC_PASSPHRASE"
_FEWEST: Final = 12
_LONGEST_PASSPHRASE: Final = 1024


Directory = Annotated[Path, tyro.conf.arg(help="Directory that `keys init` made.")]
PassphraseFd = Annotated[int | None, tyro.conf.arg(help="File descriptor to read the passphrase from.")]


@dataclass(frozen=True)
class Init:
    """Make the consortium's own keys, under a passphrase. Members and the server make theirs at home.

    The passphrase is asked for, or read from FEDMOSAIC_PASSPHRASE or --passphrase-fd.
    """

    config: tyro.conf.Positional[Path]
    """The founding configuration, federation.toml: name, members, terms."""
    out: Path = Path("federation")
    """Directory to create."""
    basis: Path | None = None
    """Public basis of the task profile, if the terms name one."""
    for_demo: bool = False
    """Make every party's keys here, at once and without a passphrase. Whoever holds the directory can pose as
    any member: only for a federation on one machine."""
    passphrase_fd: PassphraseFd = None

    def run(self, console: Console) -> None:
        """Found the federation."""
        out = self.out
        if self.for_demo:
            roster = create_federation(self.config, out, self.basis)
            console.print(
                f"federation {roster.federation!r} with {len(roster.members)} members in {out}/\n"
                "  FOR ONE MACHINE ONLY: every private key was made here; whoever holds "
                f"{out}/ can pose as any member\n"
                f"  the server's kit is {out}/server/, the clients' are {out}/clients/<id>/\n"
                f"{_promise(roster)}"
            )
            _warn(console, roster)
            return
        config = planned(self.config)
        consortium.begin(config, out, _new_passphrase(self.passphrase_fd), self.basis)
        name = config.federation
        console.print(
            f"the consortium of federation {name!r} is in {out}/, and no member's key\n"
            f"  keep {out}/consortium/ to yourself: with its passphrase it can add members and sign rosters\n"
            f"  members       fedmosaic keys request ID --federation {name}\n"
            f"                for {', '.join(member.id for member in config.members)}\n"
            f"  the server    fedmosaic keys request --federation {name} --hosts "
            f"{' '.join(config.server.hosts)}\n"
            "  then you      fedmosaic keys approve FILE …\n"
            f"  fingerprint   {consortium_fingerprint(out)}   read it to everybody over the telephone\n"
            f"                {STRENGTH}"
        )


@dataclass(frozen=True)
class Request:
    """Make the keys of a member, or with --hosts of the server, in a kit; write the request to hand out.

    The private keys wait in KIT/pending, and never leave the kit.
    """

    federation: str
    """Name of the federation."""
    id: tyro.conf.Positional[str] = ""
    """Name of the member: lower-case letters, digits and hyphens. Left out for the server."""
    kit: Path = Path("kit")
    """Directory of the party's keys, made if absent. What runs from it is not disturbed."""
    family: str = ""
    """Architecture of the member's model; clients of one family may share more than P and Q."""
    hosts: tuple[str, ...] = ()
    """For the server: the names and addresses that clients will use."""
    out: Path | None = None
    """File of the request; by default ID.request.json, or server.request.json."""

    def run(self, console: Console) -> None:
        """Make the keys and write the request."""
        request = make_request(self.kit, self.federation, self.id, self.family, self.hosts)
        for part in (self.kit / kits.PENDING / kits.REQUEST, self.kit / kits.PENDING, self.kit):
            sync_directory(part)  # what is handed out now is worth nothing without these keys
        out = self.out or Path(f"{request.id or 'server'}.request.json")
        write_atomically(out, (self.kit / kits.PENDING / kits.REQUEST).read_bytes())
        console.print(
            f"the private keys of {request.who} are in {self.kit}/{kits.PENDING}/ and stay there\n"
            f"  hand out      {out}   to the consortium\n"
            f"  fingerprint   {request.fingerprint}   read it to the consortium over the telephone\n"
            f"                {STRENGTH}\n"
            f"  then          fedmosaic keys install ANSWER --kit {self.kit}"
        )


@dataclass(frozen=True)
class Approve:
    """Compare the fingerprints of requests, and sign certificates and the roster.

    A new name is added to the roster; a request that was signed before renews the certificate.
    """

    requests: tyro.conf.Positional[tuple[Path, ...]]
    """Files that members, or whoever runs the server, handed out."""
    directory: Directory = Path("federation")
    fingerprint: tuple[str, ...] = ()
    """What the senders read to you, instead of being asked for it; 20 digits each, in quotes."""
    replace: bool = False
    """A member that is known has made new keys."""
    passphrase_fd: PassphraseFd = None

    def run(self, console: Console) -> None:
        """Compare, sign, and say what to hand back."""
        if not self.requests:
            raise ConfigurationError("name the files of the requests to approve")
        requests = [read_request(path) for path in self.requests]
        told = {_digits(text) for text in self.fingerprint}
        for request in requests:
            matching = told & {_digits(request.fingerprint)}
            _compare(request.who, request.fingerprint, next(iter(matching or told), ""), "--fingerprint")
            console.print(f"{request.who}: fingerprint {request.fingerprint}, as it was read")
        passphrase = _passphrase(self.directory, self.passphrase_fd)
        approval = consortium.approve(self.directory, requests, passphrase, replace=self.replace)
        if approval.waiting:
            console.print(f"waiting for requests of {', '.join(approval.waiting)}", markup=False)
        if approval.roster is None:
            return
        for name, answer in approval.answers.items():
            console.print(f"  hand back     {answer}/   to {name or 'whoever runs the server'}; it is public")
        _tell_roster(console, self.directory, approval.roster)
        _warn(console, approval.roster)
        console.print(_promise(approval.roster))


@dataclass(frozen=True)
class Install:
    """Take in what the consortium sent back, if it is about this kit's own keys; also a new roster later.

    A client or server that runs from the kit takes it up by itself.
    """

    answer: tyro.conf.Positional[Path]
    """Folder that the consortium handed back."""
    kit: Path = Path("kit")
    """Directory in which `keys request` made the keys."""
    consortium: str = ""
    """The consortium's fingerprint as it was read to you, instead of being asked for it; in quotes."""

    def run(self, console: Console) -> None:
        """Check the answer and take it in."""
        confirm = partial(_compare, "the consortium", told=self.consortium, option="--consortium")
        kit = install(self.answer, self.kit, confirm)
        console.print(
            f"installed in {kit.directory}/: roster {kit.roster.serial} of federation "
            f"{kit.roster.federation!r}, certificate valid until {kit.expires:%Y-%m-%d}\n"
            f"  it names {len(kit.roster.members)} members; `fedmosaic keys show {kit.directory}` shows\n"
            "  their fingerprints: ring them up and compare, so that nobody poses as one"
        )


@dataclass(frozen=True)
class Revoke:
    """Take a client off the roster, at once and for good: its certificate is worth nothing afterwards."""

    id: tyro.conf.Positional[str]
    """The client."""
    directory: Directory = Path("federation")
    passphrase_fd: PassphraseFd = None

    def run(self, console: Console) -> None:
        """Sign the roster without the client."""
        passphrase = _passphrase(self.directory, self.passphrase_fd)
        roster = consortium.revoke_member(self.directory, self.id, passphrase)
        _warn(console, roster, families=False)
        _tell_roster(console, self.directory, roster)


@dataclass(frozen=True)
class Show:
    """List the members, their fingerprints, and how long certificates are still good for.

    In a kit it shows what is installed there: ring a member up and compare what it reads of its own.
    """

    place: tyro.conf.Positional[Path | None] = None
    """A kit, or the directory that `keys init` made; the same as --directory."""
    directory: Directory = Path("federation")

    def run(self, console: Console) -> None:
        """Print the table."""
        place = self.place or self.directory
        kit = kits.open_kit(place)
        roster = kit.roster
        table = Table(title=f"federation {roster.federation}, roster {roster.serial} of {roster.issued}")
        for column in ("member", "family", "fingerprint", "certificate"):
            table.add_column(column, no_wrap=column == "fingerprint")
        for member in roster.parties:
            keys = member.identity_key, member.tls_key_sha256
            shown = member_fingerprint(roster.federation, member.id, *keys)
            valid = _validity(place, Path("clients", member.id))
            table.add_row(member.id, member.family or "-", shown, valid)
        table.add_row("(server)", "-", "-", _validity(place, Path("server")))
        console.print(table)
        if kit.tls_certificate.exists():
            console.print(f"the certificate here is {_left(kit.expires)}")
        console.print(f"consortium's fingerprint {consortium_fingerprint(place)}")
        console.print(f"roster's SHA-256 {roster.hash.hex()}")


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic keys` with its arguments."""
    command: Init | Request | Approve | Install | Revoke | Show = tyro.cli(
        Init | Request | Approve | Install | Revoke | Show,
        args=list(arguments),
        prog="fedmosaic keys",
        description=__doc__,
    )
    command.run(Console(soft_wrap=True, highlight=False))
    return 0


def _digits(text: str) -> str:
    return "".join(sign for sign in text if sign.isdecimal())


def _compare(who: str, shown: str, told: str, option: str) -> None:
    """Refuse a fingerprint that is not the one that was heard; ask for it where none was given.

    To type it, rather than to say yes, is what makes people compare it.
    """
    if not told:
        if not sys.stdin.isatty():
            raise ConfigurationError(f"nobody is here to type the fingerprint of {who}: give it as {option}")
        told = input(f"Type the fingerprint that {who} reads to you over the telephone: ")
    if _digits(told) != _digits(shown):
        raise IdentityError(
            f"what was read of {who} is not its fingerprint, {shown}: what came is not what was sent. "
            "Nothing was signed or installed; ask for it again over another channel"
        )


def _passphrase(directory: Path, descriptor: int | None) -> str | None:
    """The passphrase of a consortium's keys; None if they are under none."""
    if not is_sealed(directory):
        return None
    return _given_passphrase(descriptor) or _ask("Passphrase of the consortium's keys: ")


def _new_passphrase(descriptor: int | None) -> str:
    given = _given_passphrase(descriptor) or _ask("New passphrase of the consortium's keys: ", twice=True)
    if len(given) < _FEWEST:
        raise ConfigurationError(f"the passphrase has {len(given)} characters, and {_FEWEST} are the fewest")
    return given


def _given_passphrase(descriptor: int | None) -> str:
    if descriptor is None:
        return os.environ.get(_VARIABLE, "")
    with os.fdopen(descriptor, encoding="utf-8", errors="replace") as file:
        return file.read(_LONGEST_PASSPHRASE).rstrip("\r\n")


def _ask(words: str, *, twice: bool = False) -> str:
    if not sys.stdin.isatty():
        raise ConfigurationError(f"nobody is here to type the passphrase: set {_VARIABLE} or --passphrase-fd")
    typed = getpass.getpass(words)
    if twice and getpass.getpass("Once more: ") != typed:
        raise ConfigurationError("the two passphrases differ; begin again")
    return typed


def _promise(roster: Roster) -> str:
    """What these terms promise, and do not, of recipients who put together what they receive."""
    policy, members = roster.terms.policy, len(roster.members)
    if roster.terms.adapter.in_group_sums:
        sums = roster.terms.group_sums
        return _filled(
            f"a sum is formed of {sums.minimum_contributors} members or more, and its noise protects each "
            f"against the server with up to {sums.colluders} of the others; against more of them, only a "
            "member's own noise is left"
        )
    words = (
        f"the aggregates of one round give no single adapter away to {policy.withstands} of the {members} "
        f"members, and may to {policy.withstands + 1} together"
    )
    if policy.withstands < 2 and members > 4:
        words += "; policy.minimum_contributors = 4 would withstand two"
    if not roster.terms.adapter.private:
        words += "; against more recipients, or over rounds, only adapter.protection 'dp' helps"
    return _filled(words)


def _filled(words: str) -> str:
    """Prose in lines of at most 80 columns; commands, which are copied, are never broken."""
    return textwrap.fill(
        words, 80, initial_indent="  ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def _warn(console: Console, roster: Roster, *, families: bool = True) -> None:
    for problem in (kits.fragile(roster.members, roster.terms), families and kits.unaligned(roster)):
        if problem:
            console.print(f"[bold yellow]Warning:[/]\n{_filled(problem)}.")


def _tell_roster(console: Console, directory: Path, roster: Roster) -> None:
    console.print(
        f"roster {roster.serial} is in {directory}/{kits.ROSTER} and in every answer:\n"
        "  whoever has another one installs it, the server too; running clients and\n"
        "  servers take it up by themselves"
    )


def _validity(place: Path, party: Path) -> str:
    places = (place / party, place / ANSWERS / party)
    found = [folder / kits.TLS_CERTIFICATE for folder in places if (folder / kits.TLS_CERTIFICATE).exists()]
    return _left(read_certificate(found[0]).not_valid_after_utc) if found else "not here"


def _left(expiry: dt.datetime) -> str:
    left = expiry - dt.datetime.now(dt.UTC)
    if left <= dt.timedelta():
        return "EXPIRED: approve its request again"
    return f"good for {left.days} days{': approve its request again' if expires_soon(expiry) else ''}"
