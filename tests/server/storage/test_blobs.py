"""Payload files: whole or absent, locked, and never outside their folder."""

import hashlib
from pathlib import Path

import pytest

from fedmosaic.protos.errors import StateError
from fedmosaic.server.storage.blobs import Blobs, map_file, section_hashes


def test_written_blobs_are_read_back(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "state", durable=True)
    blobs.write("aggregates", 2, "a.shared", b"one")
    blobs.write("aggregates", 2, "a.shared", b"two")
    assert bytes(blobs.read("aggregates", 2, "a.shared")) == b"two"
    assert not list((tmp_path / "state").rglob("*.new"))
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0


def test_an_interrupted_write_leaves_the_old_blob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = Blobs(tmp_path / "state", durable=True)
    blobs.write("aggregates", 2, "a", b"old")

    def fails(_: int) -> None:
        raise OSError(5, "I/O error")

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(OSError, match="I/O"):
        blobs.write("aggregates", 2, "a", b"new")
    assert bytes(blobs.read("aggregates", 2, "a")) == b"old"


def test_a_spooled_upload_moves_into_place_and_one_client_has_one_spool(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "state", durable=True)
    first = blobs.spool("a", b"1" * 32)
    first.write_bytes(b"partial")
    other = blobs.spool("a-b", b"1" * 32)
    other.write_bytes(b"another client's")
    assert blobs.spool("a", b"1" * 32).read_bytes() == b"partial"
    second = blobs.spool("a", b"2" * 32)
    assert not first.exists()
    assert other.exists()
    second.write_bytes(b"whole")
    blobs.adopt(second, 1, "a")
    assert bytes(blobs.read("uploads", 1, "a")) == b"whole"
    assert not second.exists()


def test_a_spool_that_vanished_is_not_adopted_as_an_empty_upload(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "state", durable=True)
    with pytest.raises(FileNotFoundError):
        blobs.adopt(blobs.spool("a", b"1" * 32), 1, "a")
    assert not blobs.path("uploads", 1, "a").exists()


def test_one_server_at_a_time(tmp_path: Path) -> None:
    first = Blobs(tmp_path / "state", durable=False)
    with pytest.raises(StateError, match="in use"):
        Blobs(tmp_path / "state", durable=False)
    first.close()
    Blobs(tmp_path / "state", durable=False).close()


def test_pieces_of_a_file_are_hashed_in_order(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"a" * 3_000_000 + b"b" * 5)
    hashes = section_hashes(path, [3_000_000, 5])
    assert hashes == [hashlib.sha256(b"a" * 3_000_000).digest(), hashlib.sha256(b"bbbbb").digest()]
    assert len(map_file(path)) == 3_000_005
    assert section_hashes(path, [4_000_000])[0] == hashlib.sha256(path.read_bytes()).digest()
