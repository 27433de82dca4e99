"""Files that only their owner can read, and that a crash leaves whole.

Whatever a client or the server writes goes through here: mode 0600, in directories of mode 0700, whatever
the umask is and whoever made the directory. Windows has no such modes; there the rules of the folder hold.
"""

import errno
import logging
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from fedmosaic.protos.errors import StateError

try:
    import fcntl
except ImportError:  # Windows has no flock; two processes in one directory are then not detected.
    fcntl = None  # type: ignore[assignment]  # a module cannot be typed as optional

log = logging.getLogger(__name__)

_POSIX: Final = os.name == "posix"
_OTHERS: Final = 0o077


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the operating system name the file: a write that finds the disk full does not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_atomically(path: Path, content: bytes | memoryview, *, durable: bool = True) -> None:
    """Replace `path` by `content` so that a crash leaves the old or the new file, never a mixture.

    Only its owner can read the file afterwards. Unless `durable`, the disk is not waited for.
    """
    # A name of its own, since two runs may write the head of one ledger at once.
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.new")
    with naming(path), open(temporary, "wb", opener=private_opener) as file:
        file.write(content)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)
    if durable:
        sync_directory(path.parent)


def private_opener(path: str, flags: int) -> int:
    """Opener for `open`: the file is readable by its owner only, also if it was there before."""
    descriptor = os.open(path, flags, 0o600)
    if _POSIX:
        os.fchmod(descriptor, 0o600)
    return descriptor


def make_directory(directory: Path) -> None:
    """Make a directory that only its owner can enter, and those above it; what is there stays as it is.

    Their names are on the disk afterwards: with a name, a power cut takes all that was waited for below it.
    """
    for place in reversed((directory, *directory.parents)):
        if not place.exists():
            place.mkdir(exist_ok=True, mode=0o700)
            sync_directory(place.parent)


def private_directory(directory: Path) -> None:
    """`make_directory`, and close one that is open to others; StateError if that is somebody else's."""
    make_directory(directory)
    mode = directory.stat().st_mode
    if not _POSIX or not mode & _OTHERS:
        return
    try:
        directory.chmod(0o700)
    except OSError as error:
        raise StateError(
            f"{directory} can be entered by other users (mode {mode & 0o777:04o}) and belongs to somebody "
            f"else ({error.strerror}): give a directory of your own"
        ) from None
    log.warning("%s could be entered by other users (mode %04o); it is 0700 now", directory, mode & 0o777)


def make_private(directory: Path) -> None:
    """Take a directory, and all that a library wrote into it, from everybody but the owner."""
    if not _POSIX:
        return
    for place in (directory, *directory.rglob("*")):
        if not place.is_symlink():
            place.chmod(0o700 if place.is_dir() else 0o600)


def sync_directory(directory: Path) -> None:
    """Wait until the names in a directory, or the content of a file, are on the disk."""
    if not _POSIX:
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_marks(paths: Iterable[Path]) -> list[tuple[int, ...]]:
    """What differs once a file was replaced or written to; an empty mark for one that is not there."""
    marks: list[tuple[int, ...]] = []
    for path in paths:
        try:
            found = path.stat()
        except OSError:
            marks.append(())
        else:
            marks.append((found.st_mtime_ns, found.st_size, found.st_ino))
    return marks


def hold_directory(path: Path, instead: str, *, wait: bool = False) -> IO[bytes]:
    """Hold a file's directory for one process, until it ends or the file is closed; StateError if held.

    The library `filelock` will not do: where a file system has no locks it falls back to a file that a killed
    process leaves behind. `instead` says what to do besides stopping the other process.
    """
    file = open(path, "ab", opener=private_opener)
    if fcntl is None:
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        file.close()
        # flock(2): EWOULDBLOCK is the only word for a lock that somebody else has.
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            raise StateError(f"{path.parent} is in use by another process; stop that, or {instead}") from None
        raise StateError(
            f"{path.parent} is on a file system that has no locks ({error.strerror}), so nothing would keep "
            "two processes apart; give a directory on a local disk"
        ) from None
    return file
