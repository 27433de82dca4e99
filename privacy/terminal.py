"""The border between a command and the terminal: what every command does about errors, pipes and encodings.

A person sees one line that names the file and what to do. The trace is for `--traceback`, or for a machine
on which FEDMOSAIC_TRACEBACK is set; it may quote what a file holds, so it is not shown unasked.
"""

import codecs
import contextlib
import errno
import os
import re
import signal
import sqlite3
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Final, TextIO

from fedmosaic.protos.errors import FedMosaicError

TRACEBACK_OPTION: Final = "--traceback"
TRACEBACK_VARIABLE: Final = "FEDMOSAIC_TRACEBACK"
FAILED, WRONG_INPUT, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141
"""Exit statuses; the last two are 128 plus SIGINT and SIGPIPE, as shells have them."""

_FREE_SPACE: Final = "free some space and start again: what was stored before is kept"
_NO_ACCESS: Final = "give this user access to it, or give another path"
_REMEDIES: Final = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EROFS: "the file system is read-only; mount it for writing, or give another directory",
    errno.EACCES: _NO_ACCESS,
    errno.EPERM: _NO_ACCESS,
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file; give another path",
    errno.EISDIR: "it is a directory; give a file",
    errno.EEXIST: "move it away, or give another path",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ELOOP: "its links lead in a circle; give another path",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.EIO: "the disk reports an error; check it, and restore from a backup what it has lost",
    errno.ENOMEM: "there is not enough memory; close other programs, or take a smaller model or batch",
}
_OS_ERROR: Final = re.compile(r"\(os error (\d+)\)")
_SIGNS: Final = (
    "α alpha  β beta  δ delta  ε epsilon  μ mu  σ sigma  τ tau  Σ sum  ∞ infinity  √ sqrt  … ...  · *  × x  "
    "→ ->  ≤ <=  ≥ >=  ≠ !=  ± +-  ² ^2  − -  – -  — -  ─ -  ’ '  ‘ '  “ \"  ” \""
).split()
_ASCII: Final = dict(zip(_SIGNS[::2], _SIGNS[1::2], strict=True))
"""Signs of the reports, for terminals that have ASCII only: a statement in question marks says nothing."""


def guarded(name: str, run: Callable[[], int | None], *, trace: bool = False) -> int:
    """Run a command; whatever goes wrong becomes a line and an exit status.

    Status 0 done, 1 the machine failed, 2 wrong input, 130 stopped by the keyboard, 141 the reader went away.
    A fault of the program itself is raised: its trace is what helps then.
    """
    prepare_output()
    try:
        status = int(run() or 0)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        _close_output()
        return PIPE_CLOSED
    except SystemExit as stop:
        # So ends rich when the reader of its output goes away.
        if isinstance(stop.__context__, BrokenPipeError):
            return PIPE_CLOSED
        raise
    except KeyboardInterrupt:
        print(f"{name}: stopped by the keyboard", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        words = explain(error)
        if words is None:
            raise
        if trace or os.environ.get(TRACEBACK_VARIABLE):
            traceback.print_exc()
        with contextlib.suppress(OSError):
            print(f"{name}: {words}", file=sys.stderr)
        if isinstance(error, OSError) and error.filename is None:
            _close_output()
        return WRONG_INPUT if isinstance(error, FedMosaicError) else FAILED


@contextlib.contextmanager
def ending_children() -> Iterator[None]:
    """Let SIGTERM, SIGHUP and Ctrl-C end all processes that this one has started, and unwind the body.

    By themselves SIGTERM and SIGHUP end Python at once: no `finally` runs, and its children go on. What is
    ignored, as SIGHUP is under nohup, stays so. Only the main thread can do so; in others nothing changes.
    """
    import psutil

    def to_each(act: Callable[[psutil.Process], None], processes: list[psutil.Process]) -> None:
        for process in processes:
            with contextlib.suppress(psutil.Error):
                act(process)

    def goes_on(process: psutil.Process) -> bool:
        """Whether it is not stopped yet: the fork of a large process takes milliseconds to the end."""
        with contextlib.suppress(psutil.Error):
            return bool(process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE))
        return False

    def end(number: int, _frame: object) -> None:
        found: list[psutil.Process] = []
        # Stopped first: one that is started meanwhile, and loses its parent, would be found no more.
        while fresh := [each for each in psutil.Process().children(recursive=True) if each not in found]:
            to_each(psutil.Process.suspend, fresh)
            found += fresh
            deadline = time.monotonic() + 1.0
            while any(map(goes_on, fresh)) and time.monotonic() < deadline:
                time.sleep(0.001)
        to_each(psutil.Process.terminate, found)
        to_each(psutil.Process.resume, found)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    here = threading.current_thread() is threading.main_thread()
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT) if here}
    taken = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    try:
        for number in taken:
            signal.signal(number, end)
        yield
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)


def explain(error: BaseException) -> str | None:
    """One line for an error that a person can mend; None for a fault of the program itself."""
    if isinstance(error, FedMosaicError):
        return str(error)
    if isinstance(error, OSError):
        return _explain_os(error)
    database = getattr(error, "orig", error)  # SQLAlchemy keeps what the driver raised
    if isinstance(database, sqlite3.OperationalError) or type(database) is sqlite3.DatabaseError:
        return f"a database cannot be used ({database}); check space, mode and owner of its folder"
    # safetensors wraps what the operating system said; only the number tells that it was that.
    found = _OS_ERROR.search(str(error)) if type(error).__name__ == "SafetensorError" else None
    if found:
        number = int(found[1])
        return _explain_os(OSError(number, os.strerror(number)))
    return None


def _explain_os(error: OSError) -> str:
    if error.errno is None or error.strerror is None:
        return str(error) or type(error).__name__
    named = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    where = f"{' and '.join(named)}: " if named else ""
    remedy = _REMEDIES.get(error.errno)
    return f"{where}{error.strerror}" + (f"; {remedy}" if remedy else "")


def prepare_output() -> None:
    """Let no sign that the terminal lacks end a command: it is written in ASCII words instead."""
    codecs.register_error("fedmosaic", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="fedmosaic")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_ASCII.get(sign, "?") for sign in lacking), error.end


def _close_output() -> None:
    """Nobody reads any more: let Python's own flush at the end find a place that takes everything."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if not _writable(stream):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _writable(stream: TextIO) -> bool:
    try:
        stream.flush()
    except (OSError, ValueError):
        return False
    return True
