"""What one client keeps on disk, so that a restart goes on where the last process stopped.

    STATE/session.json             which run, and the last round whose push was acknowledged
    STATE/adapter/round-0002/      every adapter branch and the gate after that round
    STATE/rows.json                the weight row that was accepted in every round
    STATE/upload-0003.bin          bytes of an upload that is not acknowledged yet, re-sent as they are
    STATE/given-up.json            the last round whose aggregate no training was possible with
    STATE/profile-<data>-<map>.npy a noised task profile release, re-used until data or public map change
    STATE/keys/                    group keys of the current and the previous epoch, until the run is over
    STATE/picture-features/        what the frozen encoder makes of the client's own pictures
    STATE/ledger.sqlite            the privacy ledger (see `fedmosaic.privacy.ledger`)

Every file is written beside its place, flushed to the disk, and renamed: a kill at any point leaves
the old file or the new one, never half of one. Nobody but the owner can read any of it.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from fedmosaic.privacy.configuration import parse_json
from fedmosaic.privacy.encryption.records import row_digest
from fedmosaic.privacy.files import (
    make_private,
    private_directory,
    private_opener,
    sync_directory,
    write_atomically,
)
from fedmosaic.privacy.policy import WeightRow
from fedmosaic.protos.errors import PolicyError, StateError

try:
    import fcntl
except ImportError:  # Windows has no flock; two processes in one directory are then not detected.
    fcntl = None  # type: ignore[assignment]  # a module cannot be typed as optional

_VERSION = 1


@dataclass(frozen=True)
class SessionRecord:
    """Which run this state belongs to and how far it got.

    Attributes:
        federation: name of the federation.
        client: this client's id.
        run_id: the server's run; empty before the first enrolment.
        completed_round: last round whose upload the server acknowledged; 0 before any.
    """

    federation: str
    client: str
    run_id: str = ""
    completed_round: int = 0


def hold_directory(path: Path, instead: str) -> IO[bytes]:
    """Hold a directory for one process; the operating system lets go when the process ends.

    Args:
        path: of a file in the directory, made if absent.
        instead: what to do besides stopping the other process.

    Returns:
        The open file; closing it lets go.

    Raises:
        StateError: another process holds the directory, or its file system has no locks.
    """
    file = open(path, "ab", opener=private_opener)
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise StateError(_why_not_held(error, path.parent, instead)) from None
    return file


def _why_not_held(error: OSError, directory: Path, instead: str) -> str:
    # flock(2): EWOULDBLOCK is the only word for a lock that somebody else has.
    if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
        return f"{directory} is in use by another process; stop that one first, or {instead}"
    return (
        f"{directory} is on a file system that has no locks ({error.strerror}), so nothing would keep two "
        "processes apart, and the privacy ledger needs locks as well; give a directory on a local disk"
    )


class ClientState:
    """The state directory of one client in one federation."""

    def __init__(self, directory: Path, federation: str, client: str) -> None:
        """Open or create the state.

        Args:
            directory: made if missing; closed to other users if it is open to them.
            federation: name of the federation.
            client: this client's id.

        Raises:
            StateError: the directory belongs to another federation or client, or is damaged.
        """
        self.directory = directory
        private_directory(directory)
        self._lock = hold_directory(directory / "lock", "give each client its own state_dir")
        self._file = directory / "session.json"
        self._rows = directory / "rows.json"
        self.record = SessionRecord(federation, client)
        if self._file.exists():
            self.record = self._read()
        if (self.record.federation, self.record.client) != (federation, client):
            raise StateError(
                f"{directory} belongs to client {self.record.client!r} of federation "
                f"{self.record.federation!r}, not to {client!r} of {federation!r}; give each client its own "
                "state_dir"
            )

    def release(self) -> None:
        """Let another process have the directory; done by the end of the process otherwise."""
        self._lock.close()

    def _read(self) -> SessionRecord:
        try:
            data: dict[str, Any] = parse_json(self._file.read_bytes())
            if data.pop("version") != _VERSION:
                raise ValueError("unknown version")
            record = SessionRecord(**data)
            names = (record.federation, record.client, record.run_id)
            if not all(isinstance(name, str) for name in names) or type(record.completed_round) is not int:
                raise ValueError("a value has another type")
            return record
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateError(
                f"{self._file} is damaged ({error}); restore it from a backup, or start over with a new "
                "state_dir (the privacy ledger in the old one must be kept: what it has spent stays spent)"
            ) from None

    def _write(self, record: SessionRecord) -> None:
        content = json.dumps({"version": _VERSION, **asdict(record)}, indent=2).encode()
        write_atomically(self._file, content)
        self.record = record

    def join_run(self, run_id: str) -> None:
        """Remember the run, or refuse a state that belongs to another one.

        Raises:
            StateError: the state is of another run; the remedy is named.
        """
        if self.record.run_id and self.record.run_id != run_id:
            raise StateError(
                f"{self.directory} holds round {self.record.completed_round} of run {self.record.run_id}, "
                f"but the server is on run {run_id}; to start over, give a new state_dir and copy "
                "ledger.sqlite, ledger.sqlite.head and profile-*.npy into it: what was spent on the same "
                "data stays spent"
            )
        self._write(
            SessionRecord(self.record.federation, self.record.client, run_id, self.record.completed_round)
        )

    def complete_round(self, round_number: int, save_adapter: Callable[[Path], None]) -> None:
        """Record that a round's upload is acknowledged: adapter first, then the record, then clean up.

        Args:
            round_number: the acknowledged round.
            save_adapter: writes the adapter into the directory that it is given.
        """
        self.save_adapter(round_number, save_adapter)
        record = self.record
        self._write(SessionRecord(record.federation, record.client, record.run_id, round_number))
        self.upload_path(round_number).unlink(missing_ok=True)
        for old in self._adapters():
            if int(old.name.removeprefix("round-")) < round_number:
                shutil.rmtree(old)

    def save_adapter(self, round_number: int, save: Callable[[Path], None]) -> None:
        """Store the adapter after a round's training, in a directory renamed into place."""
        place = self.adapter_path(round_number)
        if place.exists():
            return
        temporary = place.with_name("saving")
        if temporary.exists():
            shutil.rmtree(temporary)
        private_directory(temporary)
        save(temporary)
        make_private(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        temporary.rename(place)
        sync_directory(place.parent)

    def adapter_path(self, round_number: int) -> Path:
        """Where the adapter after `round_number` is stored."""
        return self.directory / "adapter" / f"round-{round_number:04d}"

    def latest_adapter(self) -> Path | None:
        """The adapter of the last completed round, or None before any."""
        place = self.adapter_path(self.record.completed_round)
        return place if place.exists() else None

    def _adapters(self) -> list[Path]:
        return sorted((self.directory / "adapter").glob("round-*"))

    def upload_path(self, round_number: int) -> Path:
        """Where the bytes of a round's upload wait for their acknowledgement."""
        return self.directory / f"upload-{round_number:04d}.bin"

    def accept_row(self, section: str, row: WeightRow) -> None:
        """Remember the weight row of a section and round, and refuse a second, different one.

        Several rows over the same uploads are equations in the single adapters. The record survives
        restarts, so that asking again does not give a second answer.

        Raises:
            PolicyError: another row was accepted for this section and round before.
            StateError: the record is damaged.
        """
        accepted = self._accepted_rows()
        digest = row_digest(row).hex()
        contributors = sum(weight > 0 for weight in row.weights)
        before, _ = accepted.setdefault(f"{row.round}/{section}", (digest, contributors))
        if before != digest:
            raise PolicyError(
                f"a different weight row of section {section!r} was already accepted for round {row.round}: "
                "one row per recipient and round is allowed"
            )
        write_atomically(self._rows, json.dumps(accepted, indent=0).encode())

    def smallest_row(self) -> int | None:
        """Fewest contributors of any row that was accepted; None before the first.

        Raises:
            StateError: the record is damaged.
        """
        return min((count for _, count in self._accepted_rows().values()), default=None)

    def _accepted_rows(self) -> dict[str, tuple[str, int]]:
        """Digest and number of contributors of every accepted row, by round and section."""
        if not self._rows.exists():
            return {}
        try:
            found = parse_json(self._rows.read_bytes())
            return {str(label): (str(digest), int(count)) for label, (digest, count) in found.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise StateError(
                f"{self._rows} is damaged ({error}); restore it from a backup, or start over with a new "
                "state_dir (the privacy ledger in the old one must be kept: what it has spent stays spent)"
            ) from None

    def give_up(self, round_number: int) -> None:
        """Remember that a round's aggregate is not to be loaded again: training failed with it."""
        write_atomically(self._given_up, json.dumps(round_number).encode())

    def gave_up(self, round_number: int) -> bool:
        """Whether a round's aggregate was given up, by this process or an earlier one."""
        return self._given_up.exists() and json.loads(self._given_up.read_text()) == round_number

    @property
    def _given_up(self) -> Path:
        return self.directory / "given-up.json"

    @property
    def ledger_path(self) -> Path:
        """Where the privacy ledger stands."""
        return self.directory / "ledger.sqlite"
