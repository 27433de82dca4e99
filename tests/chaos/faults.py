"""What befalls a process, its files or its database: each fault is one function, with moments from a seed."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedmosaic.privacy.audit import AUDIT

_FULL_BYTES = 1 << 17
_SPARED = ("-wal", "-shm", "lock", AUDIT, "vector.npz", "meta.json", "server.db")
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "shutil.rmtree")


def changes_disk(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an audited event is a durable step: a file opened to write, renamed, removed."""
    writing = os.O_WRONLY | os.O_RDWR
    opened = event == "open" and isinstance(arguments[2], int) and bool(arguments[2] & writing)
    return opened or event in _CHANGES


def kill(draw: random.Random) -> None:
    """SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full(draw: random.Random) -> None:
    """For some seconds no file can grow beyond 128 KiB, SQLite's included."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FULL_BYTES, hard))
    threading.Timer(draw.uniform(1, 3), resource.setrlimit, (resource.RLIMIT_FSIZE, (hard, hard))).start()


def read_only(draw: random.Random) -> None:
    """For some seconds no file can be opened to write, renamed or removed."""
    until = time.monotonic() + draw.uniform(1, 3)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if time.monotonic() < until and changes_disk(event, arguments):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), arguments[0])

    sys.addaudithook(hook)


def slow_disk(draw: random.Random) -> None:
    """Every fsync of ours takes 50 to 300 ms longer."""
    flush, seconds = os.fsync, draw.uniform(0.05, 0.3)

    def slowly(fd: Any) -> None:
        time.sleep(seconds)
        flush(fd)

    os.fsync = slowly


def clock_jump(draw: random.Random) -> None:
    """The clock on the wall is set by a minute to a month; not for gRPC, whose core does not ask Python."""
    clock, seconds = time.time, draw.choice((-1, 1)) * draw.choice((60, 3600, 30 * 86_400))

    def jumped() -> float:
        ours = str(sys._getframe(1).f_globals.get("__name__", "")).startswith("fedmosaic")
        return clock() + seconds * ours

    time.time = jumped


STEPS = {
    "kill": kill, "disk-full": disk_full, "read-only": read_only, "slow-disk": slow_disk, "clock": clock_jump,
}  # fmt: skip
"""What befalls a process at one of its durable steps."""
FAULTS = (*STEPS, "power-cut", "bit-flip", "rollback", "peers", "postgresql")


def flip_bit(state: Path, draw: random.Random) -> dict[Path, bytes]:
    """Flip a bit in a file of a process that is dead; returns what it held, and what SQLite keeps beside it.

    Some are spared: what SQLite writes ahead, of which it drops a damaged frame by design and without a word;
    the audit log, whose reader notices; the adapters, which belong to the learner of these tests; and the
    server's database, whose numbers have no checksum: a task profile that is flipped there changes weights.
    """
    files = [path for path in sorted(state.rglob("*")) if path.is_file() and path.stat().st_size]
    path = draw.choice([path for path in files if not path.name.endswith(_SPARED)])
    content = path.read_bytes()
    data = bytearray(content)
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return {beside: beside.read_bytes() for beside in path.parent.glob(f"{path.name}-*")} | {path: content}


def program(name: str) -> str | None:
    """Where a program of PostgreSQL's server stands: on the path, or where Debian puts it."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)]))


def lacking() -> str:
    """What is not here of all that a database of its own needs; empty if nothing."""
    missing = [name for name in ("initdb", "pg_ctl") if program(name) is None]
    return " and no ".join(missing + ([] if find_spec("psycopg") else ["psycopg"]))


class Postgresql:
    """A database of its own, which can be killed; its programs do not run as root."""

    def __init__(self) -> None:
        self._folder, self._user = tempfile.mkdtemp(prefix="pg-"), "nobody" if os.geteuid() == 0 else None
        if self._user:
            shutil.chown(self._folder, self._user)
        self.url = f"postgresql+psycopg://fedmosaic@/postgres?host={self._folder}"
        self._run("initdb", "--username=fedmosaic", "--auth=trust", "--no-instructions")
        self.start()

    def start(self) -> None:
        """Start it, after its recovery."""
        self._run("pg_ctl", "start", "--log", f"{self._folder}/log", f"--options=-k {self._folder} -h ''")

    def kill(self) -> None:
        """End every process of it at once, as a power cut would."""
        self._run("pg_ctl", "stop", "--mode=immediate")

    def remove(self) -> None:
        """End it, and leave nothing of it."""
        with suppress(subprocess.CalledProcessError):  # it did not run
            self.kill()
        shutil.rmtree(self._folder)

    def _run(self, name: str, *words: str) -> None:
        command = [str(program(name)), *words, "--pgdata", f"{self._folder}/data"]
        subprocess.run(command, check=True, user=self._user, stdout=subprocess.DEVNULL, cwd="/")
