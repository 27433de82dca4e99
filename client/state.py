"""What one client keeps on disk, so that a restart goes on where the last process stopped.

    STATE/session.json             which run, the last acknowledged round, what the server said
    STATE/adapter/round-0002/      every adapter branch and the gate after that round
    STATE/rows.json                the weight row that was accepted in every round
    STATE/upload-0003.bin          bytes of the newest upload, to send again until its round is closed
    STATE/given-up.json            the last round whose aggregate no training was possible with
    STATE/keys/                    group keys of the current and the previous epoch, until the run is over
    STATE/picture-features/        what the frozen encoder makes of the client's own images
    STATE/model.json               base model and terms, with which the result is loaded again
    STATE/traffic.json             bytes sent and received so far
    STATE/audit.jsonl              what mattered to security (see `fedmosaic.privacy.audit`)
    STATE/roster.json, authority.pem, consortium.pub   what the statement's roster is checked with
    STATE/ledger.json              which privacy ledger is charged (see `fedmosaic.client.ledger`)

Every file is written beside its place, flushed to the disk, and renamed: a kill at any point leaves
the old file or the new one, never half of one. Nobody but the owner can read any of it.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

from fedmosaic.privacy import files
from fedmosaic.privacy.audit import AuditLog
from fedmosaic.privacy.configuration import read_own
from fedmosaic.privacy.encryption.records import row_digest
from fedmosaic.privacy.federation.roster import Roster, RosterMark
from fedmosaic.privacy.files import write_atomically
from fedmosaic.protos.errors import PolicyError, StateError
from fedmosaic.protos.messages import WeightRow

OLDER_COPY: Final = (
    "is an older copy of itself, whose ledger may have forgotten what was spent since. Restore the newest; "
    "if it is lost, leave this run, as what was spent can no longer be told"
)
"""What to say of a state directory that does not know what this client has sent."""
_VERSION: Final = 1
_SESSION: Final = "session.json"
_ADAPTERS: Final = "adapter/round-*"
_UPLOADS: Final = "upload-*.bin"


class SessionRecord(BaseModel):
    """Which run this state belongs to and how far it got.

    Attributes:
        federation: name of the federation.
        client: this client's id.
        run_id: the server's run; empty before the first enrolment.
        completed_round: last round whose upload the server acknowledged; 0 before any.
        received_round: last round that began with an aggregate of the others; 0 before any.
        received_rounds: how many rounds did.
        server_round: newest round that the server said was open; 0 before any.
        server_head: hexadecimal, what the server said of all rounds before that one.
        roster: what a later roster is judged by; None before the first enrolment.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    federation: str
    client: str
    run_id: str = ""
    completed_round: int = Field(default=0, ge=0)
    received_round: int = Field(default=0, ge=0)
    received_rounds: int = Field(default=0, ge=0)
    server_round: int = Field(default=0, ge=0)
    server_head: str = ""
    roster: RosterMark | None = None


def read_record(directory: Path) -> SessionRecord | None:
    """What a state directory says of its run, without taking hold of it; StateError if it is damaged."""

    def read(data: dict[str, Any]) -> SessionRecord:
        if data.pop("version") != _VERSION:
            raise ValueError("unknown version")
        return SessionRecord(**data)

    remedy = (
        "restore it from a backup, or start over with a new state_dir (the privacy ledger beside the data "
        "goes on: what was spent stays spent)"
    )
    record = read_own(directory / _SESSION, read, remedy)
    left = [path for pattern in (_ADAPTERS, _UPLOADS) for _, path in _numbered(directory, pattern)]
    if record is None and left:
        # Of a run without DP, the adapter would go on without noise in one with DP.
        raise StateError(f"{directory / _SESSION} is missing, of which {left[0]} is left: {remedy}")
    return record


def newest_adapter(directory: Path) -> tuple[int, Path] | None:
    """The newest adapter in a state directory and its round, without taking hold of it; None before any."""
    return max(_numbered(directory, _ADAPTERS), default=None)


def _numbered(directory: Path, pattern: str) -> list[tuple[int, Path]]:
    found = ((path.stem.rpartition("-")[2], path) for path in directory.glob(pattern))
    return [(int(number), path) for number, path in found if number.isdecimal()]


def check_run(record: SessionRecord, directory: Path, run_id: str) -> None:
    """Refuse with StateError to go on with another run than the one that a state directory is of."""
    if record.run_id and record.run_id != run_id:
        raise StateError(
            f"{directory} holds round {record.completed_round} of run {record.run_id}, but the server is on "
            f"run {run_id}; to start over, give a new state_dir. The privacy ledger beside the data goes "
            "on: what was spent stays spent"
        )


def contradicts(record: SessionRecord, server_round: int, head: bytes) -> bool:
    """Whether the open round that the server says, or its hash of those before, is not what it said."""
    if server_round == record.server_round:
        return head.hex() != record.server_head
    return server_round < record.server_round


def check_server(record: SessionRecord, server_round: int, head: bytes) -> None:
    """Refuse with StateError a server that `contradicts` what it said."""
    before = record.server_round
    if contradicts(record, server_round, head):
        what = (
            f"is at round {server_round}, but was at round {before} before: it runs on an older copy of its "
            "state"
            if server_round < before
            else f"tells another past of round {server_round}: it runs on another copy of its state"
        )
        raise StateError(
            f"the server {what}. Nothing was sent to it. Its operator has to restore the newest "
            "state_dir with its database. If they are lost, begin a new run: a new state_dir at "
            "the server and at every client. The privacy ledgers stay where they are, beside the data"
        )


class ClientState:
    """The state directory of one client in one federation; `record` says how far the client got."""

    def __init__(self, directory: Path, federation: str, client: str) -> None:
        """Open or create the state; the directory is closed to other users.

        StateError if it belongs to another federation or client, is in use, or is damaged.
        """
        self.directory = directory
        files.private_directory(directory)
        self._lock = files.hold_directory(directory / "lock", "give each client its own state_dir")
        self.audit = AuditLog(directory)
        self._rows = directory / "rows.json"
        self._given_up = directory / "given-up.json"
        try:
            self.record = read_record(directory) or SessionRecord(federation=federation, client=client)
            if (self.record.federation, self.record.client) != (federation, client):
                raise StateError(
                    f"{directory} belongs to client {self.record.client!r} of federation "
                    f"{self.record.federation!r}, not to {client!r} of {federation!r}; give each client its "
                    "own state_dir"
                )
        except StateError:
            self._lock.close()
            raise

    def release(self) -> None:
        """Let another process have the directory; done by the end of the process otherwise."""
        try:
            self.audit.close()
        finally:
            self._lock.close()

    def _write(self, **changes: object) -> None:
        record = self.record.model_copy(update=changes)
        content = json.dumps({"version": _VERSION, **record.model_dump()}, indent=2).encode()
        write_atomically(self.directory / _SESSION, content)
        self.record = record

    def join_run(self, run_id: str) -> None:
        """Remember the run; StateError if the state is of another one."""
        check_run(self.record, self.directory, run_id)
        if run_id != self.record.run_id:
            self._write(run_id=run_id)

    def follow_roster(self, roster: Roster) -> None:
        """Remember the roster; IdentityError if it is older than the one before, or has other terms."""
        if self.record.roster is not None:
            self.record.roster.check(roster)
        mark = RosterMark.of(roster)
        if mark != self.record.roster:
            self._write(roster=mark)

    def see(self, server_round: int, head: bytes) -> None:
        """Remember where the server says the run is; StateError as of `check_server`."""
        check_server(self.record, server_round, head)
        if server_round > self.record.server_round:
            self._write(server_round=server_round, server_head=head.hex())

    def note_received(self, round_number: int, *, received: bool) -> None:
        """Remember whether a round began with an aggregate of the others; takes the same time if not."""
        news = received and round_number > self.record.received_round
        self._write(
            received_round=round_number if news else self.record.received_round,
            received_rounds=self.record.received_rounds + news,
        )

    def complete_round(self, round_number: int, save_adapter: Callable[[Path], None]) -> None:
        """Record that a round's upload is acknowledged: adapter first, then the record, then clean up."""
        self.save_adapter(round_number, save_adapter)
        self._write(completed_round=round_number)
        self.forget_uploads(round_number)
        for number, old in _numbered(self.directory, _ADAPTERS):
            if number < round_number:
                shutil.rmtree(old)

    def reopen_round(self, round_number: int) -> None:
        """Take back the upload of a round, acknowledged or not; the adapter that was trained stays."""
        if self.record.completed_round >= round_number:
            self._write(completed_round=round_number - 1)
        self.upload_path(round_number).unlink(missing_ok=True)

    def forget_uploads(self, before: int) -> None:
        """Remove the uploads of rounds below `before`: these are closed, so nobody asks for them again."""
        for number, old in _numbered(self.directory, _UPLOADS):
            if number < before:
                old.unlink()

    def save_adapter(self, round_number: int, save: Callable[[Path], None]) -> None:
        """Store the adapter after a round's training: `save` writes a directory, renamed into place."""
        place = self.adapter_path(round_number)
        if place.exists():
            return
        temporary = place.with_name("saving")
        if temporary.exists():
            shutil.rmtree(temporary)
        files.private_directory(place.parent)
        temporary.mkdir(mode=0o700)
        with files.naming(place):
            save(temporary)
        files.make_private(temporary)
        for part in (temporary, *temporary.rglob("*")):  # a folder too: its names are its own
            files.sync_directory(part)
        temporary.rename(place)
        files.sync_directory(place.parent)

    def adapter_path(self, round_number: int) -> Path:
        """Where the adapter after `round_number` is stored."""
        return self.directory / "adapter" / f"round-{round_number:04d}"

    def latest_adapter(self) -> tuple[int, Path] | None:
        """The newest adapter and its round, or None before any.

        It is of the last completed round or of a later one, trained but not acknowledged: what was released
        or charged is gone on from, never dropped.
        """
        return newest_adapter(self.directory)

    def unacknowledged_round(self) -> int | None:
        """The first round of a stored upload that the server has not acknowledged, or None."""
        rounds = (number for number, _ in _numbered(self.directory, _UPLOADS))
        return min((number for number in rounds if number > self.record.completed_round), default=None)

    def upload_path(self, round_number: int) -> Path:
        """Where the bytes of a round's upload are, until the round is closed."""
        return self.directory / f"upload-{round_number:04d}.bin"

    def accept_row(self, section: str, round_number: int, row: WeightRow) -> None:
        """Remember the weight row of a section and round of uploads, and refuse a second, different one.

        Several rows over the same uploads are equations in the single adapters; so the record survives
        restarts. PolicyError if another row was accepted before; StateError if the record is damaged.
        """
        accepted = self._accepted_rows()
        digest = row_digest(row, self.record.client, round_number).hex()
        contributors = sum(weight > 0 for weight in row.weights)
        before, _ = accepted.setdefault(f"{round_number}/{section}", (digest, contributors))
        if before != digest:
            raise PolicyError(
                f"a different weight row of section {section!r} was already accepted for round "
                f"{round_number}: one row per recipient and round is allowed"
            )
        write_atomically(self._rows, json.dumps(accepted, indent=0).encode())

    def smallest_row(self) -> int | None:
        """Fewest contributors of any row that was accepted, None before; StateError if damaged."""
        return min((count for _, count in self._accepted_rows().values()), default=None)

    def _accepted_rows(self) -> dict[str, tuple[str, int]]:
        """Digest and number of contributors of every accepted row, by round and section."""
        remedy = (
            "it may be of a version before: restore it from a backup, or delete it: a second weight row of "
            "the rounds so far would then not be told from the first"
        )
        found = read_own(self._rows, lambda kept: {k: (str(d), int(n)) for k, (d, n) in kept.items()}, remedy)
        return found or {}

    def give_up(self, round_number: int) -> None:
        """Remember that a round's aggregate is not to be loaded again: training failed with it."""
        write_atomically(self._given_up, json.dumps(round_number).encode())

    def gave_up(self, round_number: int) -> bool:
        """Whether a round's aggregate was given up, by this process or an earlier one."""
        remedy = "delete it: the aggregate that training failed with may then be tried once more"
        return read_own(self._given_up, int, remedy) == round_number

    @property
    def ledger_path(self) -> Path:
        """Where the privacy ledger of a simulated client stands; a real one's is beside its data."""
        return self.directory / "ledger.sqlite"
