"""Damaged files of a client's state: each is named, and what the message says to do puts the client right."""

import errno
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from builders import tiny_mechanism
from fedmosaic.client.planning import AdapterPlan
from fedmosaic.client.result.ending import ResultFile
from fedmosaic.client.round.records import ClippingRecord, read_average, read_profile
from fedmosaic.client.round.releases import Releases
from fedmosaic.client.state import ClientState, read_record
from fedmosaic.client.transport.grpc import Traffic
from fedmosaic.privacy.federation.terms import Terms
from fedmosaic.privacy.ledger.ledger import Ledger
from fedmosaic.privacy.mechanism.gaussian import ClippedSum
from fedmosaic.privacy.mechanism.noise import SecureNoise
from fedmosaic.protos.errors import StateError
from fedmosaic.protos.messages import WeightRow

DAMAGE = {
    "empty": b"",
    "cut": b'{"a',
    "binary": bytes(range(256)),
    "another type": b"[1]",
    "deep": b"[" * 100_000,
    "NaN": b'{"a": NaN}',
    "archive": b"PK\x03\x04" + bytes(60),
    "array": b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 60,
}
damaged = pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE.keys())
MECHANISM = tiny_mechanism()
ROW = WeightRow(("ben", "cid", "dee"), (2, 3, 3), 3)


@damaged
def test_a_damaged_session_is_named(content: bytes, tmp_path: Path) -> None:
    ClientState(tmp_path, "f", "ada").release()
    (tmp_path / "session.json").write_bytes(content)
    with pytest.raises(StateError, match=r"session\.json is damaged.*new state_dir"):
        ClientState(tmp_path, "f", "ada")
    # The remedy: a new directory with the ledger of the old one.
    state = ClientState(tmp_path / "new", "f", "ada")
    state.join_run("0" * 32)


@pytest.mark.parametrize("left", ["adapter/round-0002", "upload-0003.bin"])
def test_what_a_lost_session_has_left_is_not_taken_for_another_run_s(left: str, tmp_path: Path) -> None:
    """P and Q that a run without DP has trained would go on, unnoised, as those of a run with DP."""
    (tmp_path / left).mkdir(parents=True)
    for opening in (lambda: ClientState(tmp_path, "f", "ada"), lambda: read_record(tmp_path)):
        with pytest.raises(StateError, match=r"session\.json is missing.*new state_dir"):
            opening()


def test_a_damaged_mark_of_a_roster_is_named_like_the_rest_of_the_session(tmp_path: Path) -> None:
    state = ClientState(tmp_path, "f", "ada")
    state.join_run("0" * 32)
    state.release()
    path = tmp_path / "session.json"
    for mark in ({"serial": 1, "sha256": "f" * 64, "terms": {"adapter": "g" * 64}}, {"serial": 0}, "roster"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"roster": mark}))
        with pytest.raises(StateError, match=r"session\.json is damaged.*new state_dir"):
            ClientState(tmp_path, "f", "ada")


@pytest.mark.parametrize(
    "content", [*DAMAGE.values(), b'{"1/shared": "digest"}', b'{"1/shared": ["d", "x"]}']
)
def test_damaged_rows_are_named_and_can_be_deleted(content: bytes, tmp_path: Path) -> None:
    state = ClientState(tmp_path, "f", "ada")
    state.accept_row("shared", 1, ROW)
    (tmp_path / "rows.json").write_bytes(content)
    for ask in (state.smallest_row, lambda: state.accept_row("shared", 1, ROW)):
        with pytest.raises(StateError, match=r"rows\.json is damaged.*delete it"):
            ask()
    (tmp_path / "rows.json").unlink()
    state.accept_row("shared", 1, ROW)


@damaged
def test_small_records_are_named_and_can_be_deleted(content: bytes, tmp_path: Path) -> None:
    state = ClientState(tmp_path, "f", "ada")
    path = tmp_path / "given-up.json"
    opened: tuple[Callable[[], object], ...] = (
        lambda: ResultFile(path),
        lambda: Traffic(path),
        lambda: ClippingRecord(path).shares(),
        lambda: state.gave_up(1),
    )
    for opening in opened:
        path.write_bytes(content)
        with pytest.raises(StateError, match=r"given-up\.json is damaged.*delete it"):
            opening()
        path.unlink()
        opening()
    path.write_bytes(b'{"adapter": [1]}')
    with pytest.raises(StateError, match="delete it"):
        ClippingRecord(path).shares()
    for rows in (3, {"before": 3}, {"before": {"self": {"right": [True]}}}):
        path.write_text(json.dumps({"rows": rows}))
        with pytest.raises(StateError, match="delete it"):
            ResultFile(path)


def releases(place: Path) -> tuple[Releases, Ledger, ClientState]:
    def summed() -> ClippedSum:
        return ClippedSum(np.ones(MECHANISM.dimensions, dtype=np.int64), 0, 0, 60)

    plain = {"encryption": {"backend": "plain"}, "allow_plaintext": True}
    terms = Terms.model_validate({"profile": MECHANISM, "adapter": {"protection": "none"}} | plain)
    state = ClientState(place, "f", "ada")
    ledger = Ledger.open(state.ledger_path, "ada", 1e-3, None, accountant="rdp")
    ids = tuple(f"e{number}" for number in range(60))
    return Releases(ledger, terms, state, ids, summed, SecureNoise(), AdapterPlan(0.0, 1.0)), ledger, state


@damaged
def test_a_damaged_average_is_named_and_costs_nothing_to_delete(content: bytes, tmp_path: Path) -> None:
    made, ledger, state = releases(tmp_path)
    first = made.profile(1)
    spent = ledger.epsilon()
    average = tmp_path / "profile-average.npz"
    average.write_bytes(content)
    with pytest.raises(StateError, match=r"profile-average\.npz is damaged.*delete it"):
        made.profile(2)
    average.unlink()
    again = made.profile(2)
    assert first is not None
    assert again is not None
    assert np.array_equal(first.vector, again.vector)
    assert ledger.epsilon() == spent
    ledger.close()
    state.release()


@damaged
def test_a_damaged_note_of_what_was_sent_costs_no_privacy(content: bytes, tmp_path: Path) -> None:
    made, ledger, state = releases(tmp_path)
    made.profile(1)
    made.profile_acknowledged()
    assert made.profile(2) is None
    spent = ledger.epsilon()
    (tmp_path / "profile-sent").write_bytes(content)
    assert made.profile(2) is not None
    assert ledger.epsilon() == spent
    stored = next(tmp_path.glob("profile-*-*.npy"))
    stored.write_bytes(content)
    with pytest.raises(StateError, match="cannot be read"):
        made.profile(3)
    ledger.close()
    state.release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_not_another_process(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(StateError, match=r"has no locks .*a directory on a local disk"):
        ClientState(tmp_path, "f", "ada")


def test_a_directory_in_use_says_so(tmp_path: Path) -> None:
    first = ClientState(tmp_path, "f", "ada")
    with pytest.raises(StateError, match="in use by another process"):
        ClientState(tmp_path, "f", "ada")
    first.release()
    ClientState(tmp_path, "f", "ada").release()


def test_bytes_are_counted_over_restarts(tmp_path: Path) -> None:
    first = Traffic(tmp_path / "traffic.json")
    first.sent("adapter", 5)
    first.received("keys", 2)
    first.save()
    second = Traffic(tmp_path / "traffic.json")
    second.sent("adapter", 1)
    assert second.as_dict()["adapter"] == {"sent": 6, "received": 0}
    assert second.as_dict()["keys"] == {"sent": 0, "received": 2}


def test_a_deleted_adapter_is_a_fresh_one(tmp_path: Path) -> None:
    state = ClientState(tmp_path, "f", "ada")
    state.complete_round(1, lambda place: (place / "x").touch())
    newest = state.latest_adapter()
    assert newest is not None
    shutil.rmtree(newest[1])
    assert state.latest_adapter() is None
    assert json.loads((tmp_path / "session.json").read_text())["completed_round"] == 1
    state.release()


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


@pytest.mark.parametrize("change", [(b"(32,", b"(32["), (b"}", b"\x00"), (b"'shape'", b"B'shape'")])
def test_an_array_whose_header_numpy_cannot_read_is_damaged(
    change: tuple[bytes, bytes], tmp_path: Path
) -> None:
    """NumPy parses the header as Python, and lets errors of the tokenizer and of odd keys through."""
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(32, dtype=np.float32))
    path = tmp_path / "profile.npy"
    path.write_bytes(buffer.getvalue().replace(*change))
    with pytest.raises(StateError, match="cannot be read"):
        read_profile(path, 32)
    with pytest.raises(StateError, match="is damaged"):
        read_average(path, 32)
