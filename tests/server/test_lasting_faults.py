"""A kill, a damaged file, an older copy: what the server does so that no harm lasts."""

import hashlib
import json
import logging
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmosaic.protos.errors import StateError
from fedmosaic.protos.messages import Phase, ReceiptStatus
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.round.aggregates import Place, stored_aggregate
from fedmosaic.server.storage.store import StoreTakenError


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = pytest.mark.parametrize("damage", [flip, cut, empty, Path.unlink])
Damage = Callable[[Path], None]


@DAMAGES
def test_a_damaged_upload_is_left_out_named_and_asked_for_again(
    federation: Any, coordinator: Any, tmp_path: Path, damage: Damage, caplog: pytest.LogCaptureFixture
) -> None:
    federation.push(coordinator, 1)
    damage(tmp_path / "state" / "uploads" / "000001" / "clinic-b.bin")
    coordinator.advance()
    assert "stored upload of clinic-b is damaged" in caplog.text
    status = coordinator.status("clinic-b")
    assert (status.round, status.phase, status.waiting_for) == (1, Phase.OPEN, ("clinic-b",))
    receipt = coordinator.push("clinic-b", federation.upload(coordinator.run_id, "clinic-b", 1))
    assert receipt.status is ReceiptStatus.ACCEPTED
    coordinator.advance()
    (section,) = coordinator.pull("clinic-a", 2).sections
    shares = dict(zip(section.row.contributors, section.row.weights, strict=True))
    assert "clinic-b" in shares
    expected = sum(w / 2**section.row.bits * federation.vector(c, 1) for c, w in shares.items())
    np.testing.assert_allclose(federation.values(section.payload), expected, atol=1e-6)


@pytest.mark.parametrize("quorum", [4, 5])
def test_a_damaged_upload_that_does_not_come_again_stops_nobody(
    federation: Any, begin: Any, tmp_path: Path, clock: Any, quorum: int
) -> None:
    coordinator = begin(schedule={"quorum": quorum})
    federation.push(coordinator, 1)
    cut(tmp_path / "state" / "uploads" / "000001" / "clinic-b.bin")
    coordinator.advance()
    assert not coordinator.advance()
    clock.now += 61.0
    coordinator.advance()
    (result,) = coordinator.summary()["results"]
    assert result["uploaded"] == ["clinic-a", "clinic-c", "clinic-d", "clinic-e"]
    assert coordinator.status("clinic-a").waiting_for == federation.clients[:1] + federation.clients[2:]


@DAMAGES
def test_a_damaged_aggregate_is_made_anew(
    federation: Any, begin: Any, coordinator: Any, tmp_path: Path, damage: Damage
) -> None:
    federation.play(coordinator, 1)
    right = federation.values(coordinator.pull("clinic-e", 2).sections[0].payload)
    folder = tmp_path / "state" / "aggregates" / "000002"
    damage(folder / "all.bin")
    (section,) = coordinator.pull("clinic-e", 2).sections
    np.testing.assert_allclose(federation.values(section.payload), right, atol=1e-6)
    assert (folder / "clinic-e.shared.bin").read_bytes() == section.payload
    federation.crash(coordinator)
    after = begin()
    assert after.pull("clinic-e", 2).sections == (section,)


def test_aggregates_of_an_older_program_are_handed_out(federation: Any, begin: Any, tmp_path: Path) -> None:
    before = begin()
    federation.play(before, 1)
    pulled = {client: before.pull(client, 2).sections for client in federation.clients}
    for client, (section,) in pulled.items():
        place, digest = Place(f"{client}.shared", 0, len(section.payload)), hashlib.sha256(section.payload)
        made = stored_aggregate(0, [(section, place)], digest.digest())
        before._run.store.replace_aggregate(2, client, made)
        before._run.blobs.write("aggregates", 2, f"{client}.shared", section.payload)
    (tmp_path / "state" / "aggregates" / "000002" / "all.bin").unlink()
    shutil.rmtree(tmp_path / "state" / "relations")
    federation.crash(before)
    after = begin()
    assert {client: after.pull(client, 2).sections for client in federation.clients} == pulled


def test_a_restarted_server_without_its_weight_rows_stops_nobody(
    federation: Any, begin: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = begin()
    federation.play(before, 1)
    federation.crash(before)
    cut(tmp_path / "state" / "relations" / "000001" / "all.bin")
    after = begin()
    assert "trains round 2 alone" in caplog.text
    assert "could not be made anew" in after.pull("clinic-a", 2).sections[0].refusal
    federation.play(after, 2)
    assert after.pull("clinic-a", 3).sections[0].row is not None


def test_an_aggregate_that_cannot_be_made_anew_is_refused_and_stops_nobody(
    federation: Any, coordinator: Any, tmp_path: Path
) -> None:
    federation.play(coordinator, 1)
    flip(tmp_path / "state" / "aggregates" / "000002" / "all.bin")
    for client in federation.clients:
        flip(tmp_path / "state" / "uploads" / "000001" / f"{client}.bin")
    (section,) = coordinator.pull("clinic-e", 2).sections
    assert section.row is None
    assert "could not be made anew" in section.refusal
    assert coordinator.pull("clinic-b", 2).sections[0].row is not None


def test_every_answer_carries_the_head_of_the_run(federation: Any, coordinator: Any, clock: Any) -> None:
    heads = []
    for number in (1, 2):
        enrolled = coordinator.enrol("clinic-a", federation.enrolment())
        receipt = coordinator.push("clinic-a", federation.upload(coordinator.run_id, "clinic-a", number))
        status = coordinator.status("clinic-a")
        pulled = coordinator.pull("clinic-a", number)
        assert enrolled.head == receipt.head == status.head == pulled.head
        heads.append(enrolled.head)
        federation.play(coordinator, number)
    federation.crash(coordinator)
    again = Coordinator(coordinator.settings, clock)
    heads.append(again.enrol("clinic-a", federation.enrolment()).head)
    assert len(set(heads)) == 3, "each round changes it"
    again.close()


def test_statistics_that_cannot_be_stored_break_no_call(
    federation: Any, coordinator: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    federation.play(coordinator, 1)
    coordinator.advance()

    def full(*_: object) -> None:
        raise StateError("the server's database failed: database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(coordinator._run.store, "add_traffic", full)
        monkeypatch.setattr("fedmosaic.server.summary._SECONDS_COUNTED", -1.0)
        for _ in range(50):
            coordinator.count_traffic("clinic-a", 7, 0)
            coordinator.advance()
    assert caplog.text.count("cannot be written, trying again") == 1
    received = coordinator.summary()["traffic"]["clinic-a"]["received"]
    assert received == 350 + federation.upload(coordinator.run_id, "clinic-a", 1).header().size


def test_who_gives_something_receives_though_its_enrolment_was_lost(
    federation: Any, coordinator: Any, tmp_path: Path
) -> None:
    """Its database was put back to before the enrolment, which a client that goes on never repeats."""
    federation.push(coordinator, 1, federation.clients[:4])
    coordinator.push("clinic-e", federation.upload(coordinator.run_id, "clinic-e", 1))
    coordinator.advance()
    assert coordinator.pull("clinic-e", 2).sections[0].row is not None


def test_a_database_that_is_ended_in_mid_round_has_what_was_acknowledged(
    federation: Any, begin: Any, own_postgresql: Any
) -> None:
    coordinator = begin(store_url=own_postgresql.url)
    federation.push(coordinator, 1, federation.clients[:4])
    own_postgresql.kill()
    upload = federation.upload(coordinator.run_id, "clinic-e", 1)
    with pytest.raises(StateError, match="database"):
        coordinator.push("clinic-e", upload)
    own_postgresql.start()
    assert coordinator.push("clinic-e", upload).status is ReceiptStatus.ACCEPTED
    coordinator.advance()
    (result,) = coordinator.summary()["results"]
    assert tuple(result["uploaded"]) == federation.clients
    coordinator.close()


def test_a_database_that_goes_with_another_folder_is_refused(
    federation: Any, tmp_path: Path, clock: Any
) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    first = Coordinator(federation.settings(tmp_path / "one", store_url=url), clock)
    with pytest.raises(StateError, match="goes with another state_dir"):
        Coordinator(federation.settings(tmp_path / "two", store_url=url), clock)
    federation.play(first, 1)
    assert first.status("clinic-a").round == 2
    first.close()


def test_of_two_servers_on_copies_of_one_folder_the_older_stops(
    federation: Any, tmp_path: Path, clock: Any
) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    older = Coordinator(federation.settings(tmp_path / "one", store_url=url), clock)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    newer = Coordinator(federation.settings(tmp_path / "two", store_url=url), clock)
    federation.play(newer, 1)
    with pytest.raises(StoreTakenError, match="one server at a time"):
        older.enrol("clinic-a", federation.enrolment())
    with pytest.raises(StoreTakenError):
        older.advance()
    assert newer.status("clinic-a").round == 2
    older.close()
    newer.close()


def scramble(database: Path) -> None:
    content = bytearray(database.read_bytes())
    content[4096 : 3 * 4096] = b"\xa5" * 2 * 4096
    database.write_bytes(content)


def spoil(key: str, value: str) -> Damage:
    def change(database: Path) -> None:
        connection = sqlite3.connect(database)
        connection.execute("update meta set value = ? where key = ?", (value, key))
        connection.commit()
        connection.close()

    change.__name__ = f"{key} {value}"
    return change


@pytest.mark.parametrize(
    "damage",
    [
        scramble,
        empty,
        Path.unlink,
        spoil("run", "{"),
        spoil("run", "[]"),
        spoil("round", "x"),
        spoil("absent", "{"),
    ],
)
def test_a_damaged_database_is_one_clear_error(
    federation: Any, begin: Any, tmp_path: Path, damage: Damage
) -> None:
    coordinator = begin()
    federation.play(coordinator, 1)
    coordinator.close()
    damage(tmp_path / "state" / "server.db")
    with pytest.raises(StateError, match=r"damaged|cannot be opened|does not know|database failed"):
        begin()


def test_a_server_that_cannot_write_its_account_at_its_end_says_so_and_the_next_start_writes_it(
    federation: Any, begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    coordinator = begin()
    coordinator.advance()
    federation.play(coordinator, 1)

    def away(*_: object, **__: object) -> None:
        raise StateError("the server's database failed: connection refused")

    monkeypatch.setattr(coordinator._run.store, "results", away)
    with pytest.raises(StateError, match=r"run\.json is older than the run"):
        coordinator.close()
    assert "run.json cannot be written" in caplog.text
    assert not [record for record in caplog.records if record.exc_info]
    again = begin()
    again.advance()
    assert json.loads((tmp_path / "state" / "run.json").read_text())["open_round"] == 2
    again.close()


def test_an_account_that_cannot_be_written_hides_no_other_error(
    federation: Any, begin: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def away(*_: object, **__: object) -> None:
        raise StateError("the server's database failed: connection refused")

    def ended(*, early: bool) -> None:
        with begin() as coordinator:
            monkeypatch.setattr(coordinator._run.store, "results", away)
            if early:
                raise RuntimeError("client north: its texts are too long")

    with pytest.raises(RuntimeError, match="too long"):
        ended(early=True)
    assert "run.json is older than the run" in caplog.text
    with pytest.raises(StateError, match=r"run\.json is older than the run"):
        ended(early=False)
    begin().close()  # whatever failed, the state was let go of


def test_the_last_words_tell_who_received_and_who_is_silent(
    federation: Any, coordinator: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    federation.play(coordinator, 1)
    assert coordinator.silent_members() is None
    federation.play(coordinator, 2)
    federation.play(coordinator, 3)
    coordinator.report("clinic-a", federation.statement(coordinator.run_id, "clinic-a"))
    assert coordinator.silent_members() == federation.clients[1:]
    (line,), exchanged = coordinator.last_words()
    assert exchanged
    assert "3 rounds with 15 uploads" in line
    assert "clinic-a 2, clinic-b 2" in line
    assert "none of clinic-b" in line
