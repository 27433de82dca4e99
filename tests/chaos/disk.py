"""A disk on which only what was waited for survives that the power goes.

Of a file that is what it held at its last fsync, of a folder the names that it had at its own: whatever was
written, renamed or removed since is gone, as POSIX allows. SQLite's files stay as they are, as after a kill.
"""

import os
import pickle
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

Names = dict[str, tuple[int, bool]]
"""Inode by name, and whether it is a folder."""
_SQLITE = (".sqlite", ".db", "-wal", "-shm", "-journal")


class Disk:
    """What of one process's folder is on the disk, from the start of the process on."""

    def __init__(self, root: Path, left: Path) -> None:
        """Begin with all that is there now; `left` is where a cut writes what the disk has then."""
        self._root, self._left = root, left
        self._lock = threading.Lock()
        self._held: dict[int, int] = {}
        self._contents: dict[int, bytes] = {}
        self._names: dict[int, Names] = {}
        for path in (root, *root.rglob("*")):
            if not path.name.endswith(_SQLITE):
                self._keep(os.open(path, os.O_RDONLY))
        self._flush = os.fsync
        os.fsync = self._flushing

    def _flushing(self, fd: Any) -> None:
        self._flush(fd)
        with self._lock:  # for ever, once the power is gone: nobody learns that it was waited for
            self._keep(os.dup(fd if isinstance(fd, int) else fd.fileno()))

    def _keep(self, descriptor: int) -> None:
        """Note what is on the disk; the descriptor stays open, so that no other file gets its number."""
        number = os.fstat(descriptor).st_ino
        path = f"/proc/self/fd/{descriptor}"
        if os.path.isdir(path):
            self._names[number] = {e.name: (e.inode(), e.is_dir()) for e in os.scandir(path)}
        else:
            self._contents[number] = Path(path).read_bytes()
        if number in self._held:
            os.close(descriptor)
        else:
            self._held[number] = descriptor

    def leave(self) -> None:
        """Write what the disk has; no fsync returns any more."""
        self._lock.acquire()
        left = self._root.stat().st_ino, self._names, self._contents
        self._left.with_suffix(".part").write_bytes(pickle.dumps(left))
        self._left.with_suffix(".part").rename(self._left)

    def cut(self) -> None:
        """The power goes: end this process, and leave word of what the disk has."""
        self.leave()
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()


def put_back(root: Path, left: Path) -> bool:
    """Leave in a folder what the disk had, once the process is dead; whether its power was cut."""
    if not left.exists():
        return False
    number, names, contents = pickle.loads(left.read_bytes())  # noqa: S301  # our own child wrote it
    _restore(root, number, names, contents)
    left.unlink()
    return True


def _restore(folder: Path, number: int, names: dict[int, Names], contents: dict[int, bytes]) -> None:
    known = names.get(number, {})
    for path in folder.iterdir():
        if path.name not in known and not path.name.endswith(_SQLITE):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, (inode, is_folder) in known.items():
        path = folder / name
        if name.endswith(_SQLITE):
            continue
        if is_folder:
            path.mkdir(exist_ok=True, mode=0o700)
            _restore(path, inode, names, contents)
        elif not path.exists() or path.read_bytes() != contents.get(inode, b""):
            path.unlink(missing_ok=True)
            path.touch(0o600)
            path.write_bytes(contents.get(inode, b""))
