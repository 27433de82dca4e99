import io
from pathlib import Path

import numpy as np
import pytest

from fedmosaic.client.records import ClippingRecord, read_average, read_profile
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


@pytest.mark.parametrize("change", [(b"(32,", b"(32["), (b"}", b"\x00")])
def test_an_array_whose_header_is_no_python_is_damaged(change: tuple[bytes, bytes], tmp_path: Path) -> None:
    """NumPy parses the header as Python, and lets errors of the tokenizer through."""
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(32, dtype=np.float32))
    path = tmp_path / "profile.npy"
    path.write_bytes(buffer.getvalue().replace(*change))
    with pytest.raises(StateError, match="cannot be read"):
        read_profile(path, 32)
    with pytest.raises(StateError, match="is damaged"):
        read_average(path, 32)
