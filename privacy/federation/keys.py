"""`fedmosaic keys`: create a federation and maintain its members."""

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from fedmosaic.privacy.configuration import validate
from fedmosaic.privacy.federation import kits as federation
from fedmosaic.privacy.federation.founding import create_federation
from fedmosaic.privacy.federation.identity import read_certificate
from fedmosaic.privacy.federation.roster import Roster

_RENEW_WITHIN = dt.timedelta(days=14)


@dataclass(frozen=True)
class Init:
    """Create a federation: the consortium's authority, one kit for the server and one per client.

    Hand every kit to its owner over a channel you both trust; keep DIR/consortium to yourself.
    """

    config: tyro.conf.Positional[Path]
    """The founding configuration, federation.toml: name, members, terms."""
    out: Path = Path("federation")
    """Directory to create."""
    basis: Path | None = None
    """Public basis of the task profile, if the terms name one."""


@dataclass(frozen=True)
class Add:
    """Enrol one more client and issue a new roster to every kit."""

    id: tyro.conf.Positional[str]
    """Name of the new client: lower-case letters, digits and hyphens."""
    directory: Path = Path("federation")
    """Directory that `keys init` made."""
    family: str = ""
    """Architecture of its model; clients of one family may share more than P and Q."""


@dataclass(frozen=True)
class Revoke:
    """Take a client off the roster, at once and for good: its certificate is worth nothing afterwards."""

    id: tyro.conf.Positional[str]
    """The client."""
    directory: Path = Path("federation")
    """Directory that `keys init` made."""


@dataclass(frozen=True)
class Rotate:
    """Give a client new keys and a new certificate, for example before the old one expires."""

    id: tyro.conf.Positional[str]
    """The client."""
    directory: Path = Path("federation")
    """Directory that `keys init` made."""


@dataclass(frozen=True)
class RotateServer:
    """Give the server a new key and certificate, before the old one expires or for other names."""

    hosts: tuple[str, ...] = ()
    """Names and addresses that clients will use; by default those that the certificate has."""
    directory: Path = Path("federation")
    """Directory that `keys init` made."""


@dataclass(frozen=True)
class Show:
    """List the members, the days their certificates are still good for, and the roster's fingerprint."""

    place: tyro.conf.Positional[Path | None] = None
    """Directory that `keys init` made; the same as --directory."""
    directory: Path = Path("federation")
    """Directory that `keys init` made."""


Command = (
    Annotated[Init, tyro.conf.subcommand("init")]
    | Annotated[Add, tyro.conf.subcommand("add")]
    | Annotated[Revoke, tyro.conf.subcommand("revoke")]
    | Annotated[Rotate, tyro.conf.subcommand("rotate")]
    | Annotated[RotateServer, tyro.conf.subcommand("rotate-server")]
    | Annotated[Show, tyro.conf.subcommand("show")]
)


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic keys` with its arguments."""
    command: Init | Add | Revoke | Rotate | RotateServer | Show = tyro.cli(
        Command,
        args=list(arguments),
        prog="fedmosaic keys",
        description=__doc__,
    )
    console = Console()
    match command:
        case Init(config, out, basis):
            roster = create_federation(config, out, basis)
            console.print(
                f"federation {roster.federation!r} with {len(roster.members)} members in {out}/\n"
                f"  keep      {out}/consortium/   (it can add members and sign rosters)\n"
                f"  hand out  {out}/server/       to whoever runs the server\n"
                f"  hand out  {out}/clients/<id>/ to each client, over a channel you both trust\n"
                f"  {_promise(roster)}",
                soft_wrap=True,
            )
            _warn(console, federation.fragile(len(roster.members), roster.terms))
            _warn(console, federation.unaligned(roster))
        case Add(member, directory, family):
            new = validate({"id": member, "family": family}, federation.MemberEntry, "keys add")
            roster = federation.add_member(directory, new)
            _warn(console, federation.unaligned(roster))
            _tell_new_roster(console, directory, roster.serial)
        case Revoke(member, directory):
            roster = federation.revoke_member(directory, member)
            _warn(console, federation.fragile(len(roster.members), roster.terms))
            _tell_new_roster(console, directory, roster.serial)
        case Rotate(member, directory):
            roster = federation.rotate_member(directory, member)
            _tell_new_roster(console, directory, roster.serial)
        case RotateServer(hosts, directory):
            entry = validate({"hosts": hosts} if hosts else {}, federation.ServerEntry, "keys rotate-server")
            names = federation.rotate_server(directory, entry.hosts if hosts else ())
            console.print(
                f"{directory}/server has a new certificate for {', '.join(names)}: hand tls.pem and tls.key "
                "to whoever runs the server, who restarts it; the clients need nothing",
                soft_wrap=True,
            )
        case Show(place, directory):
            _show(console, place or directory)
    return 0


def _promise(roster: Roster) -> str:
    """What these terms promise, and do not, of recipients who put their aggregates together."""
    policy, members = roster.terms.policy, len(roster.members)
    words = (
        f"with the aggregates of one round, {policy.withstands} recipient(s) of the {members} members solve "
        f"for no adapter, {policy.withstands + 1} may"
    )
    if policy.withstands < 2 and members > 4:
        words += "; policy.minimum_contributors = 4 would withstand two"
    if not roster.terms.adapter.private:
        words += "; against more recipients, or over rounds, only adapter.protection 'dp' helps"
    return words


def _warn(console: Console, problem: str) -> None:
    if problem:
        console.print(f"[bold yellow]Warning:[/] {problem}.")


def _tell_new_roster(console: Console, directory: Path, serial: int) -> None:
    console.print(
        f"roster {serial} is in {directory}/roster.json and in every kit: give it to the server and to every "
        "client and restart them; they refuse to work with anyone who has another roster",
        soft_wrap=True,
    )


def _show(console: Console, directory: Path) -> None:
    kit = federation.open_kit(directory / "server")
    roster = kit.roster
    table = Table(title=f"federation {roster.federation}, roster {roster.serial} of {roster.issued}")
    for column in ("member", "family", "identity key", "certificate"):
        table.add_column(column)
    for member in roster.members:
        certificate = directory / "clients" / member.id / federation.TLS_CERTIFICATE
        table.add_row(member.id, member.family or "-", member.identity_key[:16], _validity(certificate))
    table.add_row("(server)", "-", "-", _validity(kit.tls_certificate, "rotate-server"))
    console.print(table)
    console.print(f"roster fingerprint {roster.hash.hex()}")


def _validity(path: Path, command: str = "rotate") -> str:
    if not path.exists():
        return "kit not here"
    left = read_certificate(path).not_valid_after_utc - dt.datetime.now(dt.UTC)
    if left <= dt.timedelta():
        return f"EXPIRED: run `fedmosaic keys {command}`"
    days = f"{left.days} days left"
    return f"{days}: {command} soon" if left < _RENEW_WITHIN else days
