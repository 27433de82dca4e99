"""Payloads as files: written beside their place, flushed to the disk, renamed into it.

    ROOT/lock                              held by the one server that uses this state
    ROOT/mark                              tells which database goes with this folder, if it stands elsewhere
    ROOT/spool/<client>.<hash>.part        an upload that is still arriving
    ROOT/uploads/000003/<client>.bin       sections of a stored upload, laid end to end
    ROOT/aggregates/000004/<client>.<section>.bin   what a client may load before round 4
    ROOT/sums/000003/group-<n>.bin         sum of a group in round 3, public to the members

A kill at any point leaves a file whole or absent; the database row that names it is written afterwards.
"""

import hashlib
import mmap
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal

from fedmosaic.privacy.files import hold_directory, private_directory, sync_directory, write_atomically
from fedmosaic.protos.errors import StateError


class MissingBlobError(StateError):
    """A file that the database names is not there: the folder was changed by hand, or its disk is failing."""


Area = Literal["uploads", "aggregates", "sums"]
_MAP_ABOVE: Final = 1 << 24
_READ_BYTES: Final = 1 << 20


class Blobs:
    """The payload files of one server; only one process may open a folder at a time."""

    def __init__(self, root: Path, *, durable: bool) -> None:
        """Open or create the folder.

        Args:
            root: the server's state folder, made if missing; closed to other users if it is open to them.
            durable: False skips fsync.

        Raises:
            StateError: another server is using the folder.
        """
        self._root = root
        self._durable = durable
        private_directory(root)
        self._lock = hold_directory(root / "lock", "give this server its own state_dir")
        for name in ("spool", "uploads", "aggregates", "sums"):
            private_directory(root / name)

    def close(self) -> None:
        """Let another server use the folder."""
        self._lock.close()

    def mark(self, name: str) -> str:
        """What is written in the file that marks this folder; made up at the first time."""
        path = self._root / name
        if not path.exists():
            write_atomically(path, uuid.uuid4().hex.encode(), durable=True)
        return path.read_text(encoding="utf-8", errors="replace").strip()

    @property
    def empty(self) -> bool:
        """Whether the folder holds no payload."""
        return not any(any((self._root / area).iterdir()) for area in ("uploads", "aggregates"))

    def path(self, area: Area, round_number: int, name: str) -> Path:
        """Where a blob stands."""
        return self._root / area / f"{round_number:06d}" / f"{name}.bin"

    def spool(self, client: str, content_hash: bytes) -> Path:
        """Where an upload arrives; what another upload of this client left behind is removed."""
        path = self._root / "spool" / f"{client}.{content_hash.hex()}.part"
        for other in path.parent.glob(f"{client}.*.part"):
            if other != path:
                other.unlink(missing_ok=True)
        return path

    def write(self, area: Area, round_number: int, name: str, content: bytes | memoryview) -> None:
        """Write a blob; one of this name is replaced."""
        path = self.path(area, round_number, name)
        self._ensure(path.parent)
        write_atomically(path, content, durable=self._durable)

    def adopt(self, spooled: Path, round_number: int, client: str) -> None:
        """Move an upload that has arrived into its place."""
        path = self.path("uploads", round_number, client)
        self._ensure(path.parent)
        with spooled.open("r+b") as file:
            if self._durable:
                os.fsync(file.fileno())
        spooled.replace(path)
        self._flush_directory(path.parent)

    def read(self, area: Area, round_number: int, name: str) -> memoryview:
        """Content of a blob; a large one is mapped, not copied.

        Raises:
            MissingBlobError: the file is missing.
        """
        path = self.path(area, round_number, name)
        try:
            return map_file(path)
        except FileNotFoundError:
            raise MissingBlobError(
                f"{path} is missing although the database names it; restore state_dir and database together"
            ) from None

    def remove_before(self, area: Area, round_number: int) -> None:
        """Remove the blobs of all rounds below `round_number`."""
        for folder in (self._root / area).iterdir():
            if folder.name.isdigit() and int(folder.name) < round_number:
                shutil.rmtree(folder, ignore_errors=True)

    def _ensure(self, folder: Path) -> None:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._flush_directory(folder.parent)

    def _flush_directory(self, folder: Path) -> None:
        if self._durable:
            sync_directory(folder)


def map_file(path: Path) -> memoryview:
    """Content of a file; a large one is mapped, not copied."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < _MAP_ABOVE:
            return memoryview(file.read())
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def section_hashes(path: Path, sizes: Iterable[int]) -> list[bytes]:
    """SHA-256 of consecutive pieces of a file; a piece beyond its end is cut short."""
    digests = []
    with path.open("rb") as file:
        for size in sizes:
            state, left = hashlib.sha256(), size
            while left > 0 and (data := file.read(min(left, _READ_BYTES))):
                state.update(data)
                left -= len(data)
            digests.append(state.digest())
    return digests
