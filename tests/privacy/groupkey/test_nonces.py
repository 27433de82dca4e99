"""Counters on disk: epochs and rounds only go forward, and nothing is encrypted twice by accident."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmosaic.privacy.groupkey.nonces import NonceCounter, rotation_reason
from fedmosaic.protos.errors import EncryptionError, StateError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "counter.json"


def opened(path: Path, epoch: int = 1) -> NonceCounter:
    counter = NonceCounter(path, "f")
    counter.open_epoch(epoch)
    return counter


def test_nonces_are_fresh_and_one_per_upload(path: Path) -> None:
    counter = opened(path)
    nonces = [counter.take(1, r, section) for r in (0, 1, 2, 2) for section in ("shared", "family:x")]
    nonces.append(NonceCounter(path, "f").take(1, 2, "shared"))
    assert len(set(nonces)) == 9
    assert {len(nonce) for nonce in nonces} == {16}


def test_rounds_and_epochs_only_go_forward(path: Path) -> None:
    counter = opened(path, 5)
    counter.take(5, 7, "shared")
    with pytest.raises(EncryptionError, match="round 6 is over"):
        counter.take(5, 6, "shared")
    for epoch in (4, 6):
        with pytest.raises(EncryptionError, match=rf"epoch {epoch} is not the one opened last \(5\)"):
            counter.take(epoch, 8, "shared")
    for number in (5, 4, 0):
        with pytest.raises(EncryptionError, match="the next one is at least 6"):
            counter.open_epoch(number)
    counter.open_epoch(6)
    assert NonceCounter(path, "f").epoch == 6
    # A key that was replaced in the middle of a round: the same round, under the new key.
    counter.take(6, 7, "shared")


def test_nothing_can_be_taken_before_an_epoch_is_opened(path: Path) -> None:
    counter = NonceCounter(path, "f")
    assert counter.epoch is None
    with pytest.raises(EncryptionError, match="agree on a key first"):
        counter.take(0, 0, "shared")


def test_the_record_is_on_disk_before_the_nonce_is_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = opened(path)
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", synced.append)
    counter.take(1, 2, "shared")
    assert synced
    assert json.loads(path.read_text())["uploads"] == {"shared": 1}

    def crash(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(OSError, match="disk full"):
        counter.take(1, 3, "shared")
    # Nothing was recorded, so nothing was handed out, in memory or on disk.
    monkeypatch.undo()
    counter.take(1, 3, "shared")


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[1]", b'{"federation": "f", "epoch": -1}', b'{"federation": "f", "x": 1}', b"\xff"],
)
def test_a_damaged_counter_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(StateError, match="is damaged"):
        NonceCounter(path, "f")


def test_the_counter_of_another_federation_is_refused(path: Path) -> None:
    opened(path)
    with pytest.raises(StateError, match="is of federation 'f', expected 'g'"):
        NonceCounter(path, "g")


names = st.sets(st.sampled_from("abcdef"), min_size=1)


@given(holders=names, taking=names, used=st.integers(0, 100), every=st.integers(1, 100))
def test_a_key_rotates_on_any_change_and_in_time(
    holders: set[str], taking: set[str], used: int, every: int
) -> None:
    reason = rotation_reason(holders, taking, used, every)
    assert (reason is None) == (holders == taking and used < every)
    if taking - holders:
        assert reason == f"members without the key take part: {', '.join(sorted(taking - holders))}"
    elif holders - taking:
        assert (
            reason == f"members that hold the key no longer take part: {', '.join(sorted(holders - taking))}"
        )
    elif used >= every:
        assert reason == f"the key has served {used} of {every} rounds"
