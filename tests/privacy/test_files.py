"""Files of one owner: written whole, and closed to others whatever was there before."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmosaic.privacy.files import make_private, private_directory, private_opener, write_atomically
from fedmosaic.protos.errors import StateError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")


def modes(place: Path) -> set[str]:
    return {f"{stat.S_IMODE(path.stat().st_mode):04o}" for path in place.iterdir()}


@pytest.fixture(autouse=True)
def _no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_an_older_file_that_others_could_read_is_closed_when_it_is_written(tmp_path: Path) -> None:
    private_directory(tmp_path)
    for name in ("whole", "growing"):
        (tmp_path / name).write_text("old")
        (tmp_path / name).chmod(0o666)
    write_atomically(tmp_path / "whole", b"new")
    with open(tmp_path / "growing", "a", opener=private_opener) as file:
        file.write(" and new")
    assert modes(tmp_path) == {"0600"}
    assert (tmp_path / "whole").read_text() == "new"
    assert (tmp_path / "growing").read_text() == "old and new"


def test_a_directory_that_others_can_enter_is_closed_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "state"
    place.mkdir()
    place.chmod(0o755)
    private_directory(place)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert "could be entered by other users (mode 0755)" in caplog.text
    caplog.clear()
    private_directory(place)
    assert caplog.text == ""


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "state"
    place.mkdir()
    place.chmod(0o755)

    def denied(self: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", denied)
    with pytest.raises(StateError, match=r"belongs to somebody else .* give a directory of your own"):
        private_directory(place)


def test_what_a_library_wrote_is_closed_all_the_way_down(tmp_path: Path) -> None:
    inner = tmp_path / "place" / "inner"
    inner.mkdir(parents=True)
    (inner / "tensors").write_text("x")
    outside = tmp_path / "outside"
    outside.write_text("x")
    outside.chmod(0o644)
    (inner / "link").symlink_to(outside)
    make_private(tmp_path / "place")
    assert modes(tmp_path) == {"0700", "0644"}, "what a link points at is not ours"
    assert modes(tmp_path / "place") == {"0700"}
    assert stat.S_IMODE((inner / "tensors").stat().st_mode) == 0o600
