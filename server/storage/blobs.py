"""Payloads as files: written beside their place, flushed to the disk, renamed into it.

    ROOT/lock                              held by the one server that uses this state
    ROOT/mark                              tells which database goes with this folder, if it stands elsewhere
    ROOT/spool/<client>.<hash>.part        an upload that is still arriving
    ROOT/uploads/000003/<client>.bin       sections of a stored upload, laid end to end
    ROOT/aggregates/000004/all.bin         what clients may load before round 4, laid end to end
    ROOT/aggregates/000004/<client>.<section>.bin   the same of one client, made anew or by an older program
    ROOT/relations/000003/all.bin          similarity and weight rows, where round 3 brought new ones
    ROOT/sums/000003/group-<n>.bin         sum of a group in round 3, public to the members

A kill at any point leaves a file whole or absent; the database row that names it is written afterwards.
Aggregates alone are not waited for: from uploads and weight rows, which are, they are made anew.
"""

import hashlib
import mmap
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal, get_args

from fedmosaic.privacy.files import (
    hold_directory,
    naming,
    private_directory,
    private_opener,
    sync_directory,
    write_atomically,
)
from fedmosaic.protos.errors import StateError


class MissingBlobError(StateError):
    """A file that the database names is not there: the folder was changed by hand, or its disk is failing."""


Area = Literal["uploads", "aggregates", "relations", "sums"]
WHOLE: Final = "all"
"""Name of the one blob of a round in `aggregates` and `relations`."""
_MAP_ABOVE: Final = 1 << 20
_READ_BYTES: Final = 1 << 20


class Blobs:
    """The payload files of one server; only one process may open a folder at a time."""

    def __init__(self, root: Path, *, durable: bool) -> None:
        """Open or create the folder; StateError if another server is using it.

        A folder that is open to other users is closed to them. Unless `durable`, nothing is fsynced.
        """
        self._root = root
        self._durable = durable
        private_directory(root)
        self._lock = hold_directory(root / "lock", "give this server its own state_dir")
        for name in ("spool", *get_args(Area)):
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
        return blob_path(self._root, area, round_number, name)

    def spool(self, client: str, content_hash: bytes) -> Path:
        """Where an upload arrives; what another upload of this client left behind is removed."""
        path = self._root / "spool" / f"{client}.{content_hash.hex()}.part"
        for name in os.listdir(path.parent):
            if name.startswith(f"{client}.") and name != path.name:
                (path.parent / name).unlink(missing_ok=True)
        return path

    def write(self, area: Area, round_number: int, name: str, content: bytes | memoryview) -> None:
        """Write a blob; one of this name is replaced."""
        path = self.path(area, round_number, name)
        self._ensure(path.parent)
        write_atomically(path, content, durable=self._durable)

    def write_pieces(self, area: Area, round_number: int, name: str, pieces: Iterable[memoryview]) -> None:
        """Write a blob that can be made anew, piece by piece; the disk is not waited for."""
        path = self.path(area, round_number, name)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = path.with_suffix(".new")
        with naming(path), open(temporary, "wb", opener=private_opener) as file:
            file.writelines(pieces)
        temporary.replace(path)

    def settle(self, spooled: Path) -> None:
        """Wait until an upload that has arrived is on the disk; many may wait at once."""
        if self._durable and spooled.exists():
            sync_directory(spooled)

    def adopt(self, spooled: Path, round_number: int, client: str) -> None:
        """Move an upload that is on the disk into its place; `settle_uploads` makes the names last."""
        path = self.path("uploads", round_number, client)
        self._ensure(path.parent)
        spooled.replace(path)

    def settle_uploads(self, round_number: int) -> None:
        """Wait until the names of all uploads that were adopted in a round are on the disk."""
        self._flush_directory(self.path("uploads", round_number, "").parent)

    def read(
        self, area: Area, round_number: int, name: str, start: int = 0, size: int | None = None
    ) -> memoryview:
        """Content of a blob, or of a part; a large one is mapped. MissingBlobError if there is no file."""
        path = _place(self._root, area, round_number, name)
        try:
            return map_file(path, start, size)
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


def blob_path(root: Path, area: Area, round_number: int, name: str) -> Path:
    """Where a blob stands below a state folder."""
    return Path(_place(root, area, round_number, name))


def _place(root: Path, area: Area, round_number: int, name: str) -> str:
    return (
        f"{root}/{area}/{round_number:06d}/{name}.bin"  # no `Path`: a round reads as many as it has members
    )


def map_file(path: Path | str, start: int = 0, size: int | None = None) -> memoryview:
    """Content of a file, or at most `size` bytes from `start`; if that is much, mapped and not copied."""
    file = os.open(path, os.O_RDONLY)  # no file object: a round reads as many as it has members
    try:
        if size is None or size >= _MAP_ABOVE:
            left = max(0, os.fstat(file).st_size - start)
            size = left if size is None else min(size, left)
        if size < _MAP_ABOVE:
            return memoryview(os.pread(file, size, start))
        return memoryview(mmap.mmap(file, 0, access=mmap.ACCESS_READ))[start : start + size]
    finally:
        os.close(file)


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
