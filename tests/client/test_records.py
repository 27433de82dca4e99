from pathlib import Path

import pytest

from fedmosaic.client.records import ClippingRecord
from fedmosaic.protos.errors import StateError


def test_counts_add_up_over_releases_and_restarts(tmp_path: Path) -> None:
    path = tmp_path / "clipping.json"
    ClippingRecord(path).add("adapter", 3, 10)
    ClippingRecord(path).add("adapter", 2, 30)
    ClippingRecord(path).add("profile", 7, 7)
    assert ClippingRecord(path).shares() == {"adapter": 5 / 40, "profile": 1.0}
    assert path.stat().st_mode & 0o077 == 0


def test_a_channel_that_saw_no_example_has_no_share(tmp_path: Path) -> None:
    record = ClippingRecord(tmp_path / "clipping.json")
    assert record.shares() == {}
    record.add("adapter", 0, 0)
    assert record.shares() == {}


@pytest.mark.parametrize("content", ["", "[]", '{"adapter": 1}', '{"adapter": [1]}'])
def test_a_damaged_record_names_the_remedy(tmp_path: Path, content: str) -> None:
    path = tmp_path / "clipping.json"
    path.write_text(content)
    with pytest.raises(StateError, match="delete it"):
        ClippingRecord(path).shares()
