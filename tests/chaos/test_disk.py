"""What is on the disk when the power goes, by a disk that forgets whatever was not waited for."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import founding
from chaos.disk import Disk, put_back
from fedmosaic.client.state import ClientState
from fedmosaic.privacy.federation import consortium
from fedmosaic.privacy.federation.keys import Request
from fedmosaic.privacy.files import write_atomically
from fedmosaic.privacy.ledger.ledger import LEDGER, Ledger

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads what is open from /proc")


@pytest.fixture
def after_a_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Path], object]], Path]:
    """Does something in an empty folder, and gives what the disk has of it."""
    monkeypatch.setattr(os, "fsync", os.fsync)  # what `Disk` puts there goes with the test

    def cut(do: Callable[[Path], object]) -> Path:
        (tmp_path / "root").mkdir()
        disk = Disk(tmp_path / "root", tmp_path / "left")
        do(tmp_path / "root")
        disk.leave()
        assert put_back(tmp_path / "root", tmp_path / "left")
        return tmp_path / "root"

    return cut


def test_of_what_was_not_waited_for_nothing_is_left(after_a_cut: Callable[..., Path]) -> None:
    def do(root: Path) -> None:
        write_atomically(root / "kept", b"old")
        write_atomically(root / "kept", b"new", durable=False)
        (root / "kept.2").write_bytes(b"never waited for")

    root = after_a_cut(do)
    assert {path.name: path.read_bytes() for path in root.iterdir()} == {"kept": b"old"}


def test_an_adapter_a_ledger_and_keys_are_there_with_all_their_folders(
    after_a_cut: Callable[..., Path],
) -> None:
    """A folder's name, and the names in it, are waited for like what the files hold."""

    def save(directory: Path) -> None:
        (directory / "parts").mkdir()
        (directory / "parts" / "one").write_bytes(b"1")

    def do(root: Path) -> None:
        state = ClientState(root / "of" / "a" / "state", "vectors", "ada")
        state.save_adapter(1, save)
        state.release()
        Ledger.open(root / "data" / "train.jsonl.ledger" / LEDGER, "ada", 1e-5, 8.0).close()
        request = Request(federation="clinics", id="e", kit=root / "kit", out=root / "e.json")
        request.run(_Silent())  # type: ignore[arg-type]  # what it prints is not looked at
        consortium.create(founding(), root / "clinics")

    root = after_a_cut(do)
    assert (root / "of/a/state/adapter/round-0001/parts/one").read_bytes() == b"1"
    assert (root / "data/train.jsonl.ledger" / LEDGER).stat().st_size > 0
    assert (root / "data/train.jsonl.ledger" / f"{LEDGER}.head").stat().st_size > 0
    assert sorted(path.name for path in (root / "kit/pending").iterdir()) == [
        "identity.key",
        "request.json",
        "tls.key",
    ]
    assert (root / "clinics/clients/a/roster.json").stat().st_size > 0


class _Silent:
    def print(self, *_: object) -> None:
        pass
