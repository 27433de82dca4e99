"""What a round costs a server: who waits for what, what is kept, how often the disk is waited for."""

import json
import os
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmosaic.privacy.encryption.aggregators import create_aggregator
from fedmosaic.privacy.encryption.parameters import PlainParameters
from fedmosaic.privacy.encryption.records import RoundContext, upload_header
from fedmosaic.privacy.policy import AggregationPolicy
from fedmosaic.protos.messages import ReceiptStatus, WeightRow
from fedmosaic.server import summary as summary_module
from fedmosaic.server.storage.blobs import map_file


def play_without_profile(federation: Any, coordinator: Any, round_number: int) -> None:
    federation.push(coordinator, round_number, profile=None)
    coordinator.advance()


def test_the_account_does_not_grow_with_the_rounds_and_matrices_are_kept_once(
    federation: Any, begin: Any, tmp_path: Path
) -> None:
    coordinator = begin(schedule={"rounds": 8})
    state = tmp_path / "state"
    federation.play(coordinator, 1)
    sizes = []
    for number in range(2, 8):
        play_without_profile(federation, coordinator, number)
        sizes.append((state / "run.json").stat().st_size)
    assert max(sizes) - min(sizes) < 50  # numbers of bytes and rounds have more digits
    assert [path.parent.name for path in (state / "relations").rglob("*.bin")] == ["000001"]
    written = {path.name: json.loads(path.read_text()) for path in (state / "rounds").iterdir()}
    assert sorted(written) == [f"{number:06d}.json" for number in range(1, 8)]
    assert not any("similarity" in result or "weights" in result for result in written.values())
    told = summary_module.with_rounds(json.loads((state / "run.json").read_text()), state)
    assert told == json.loads(json.dumps(coordinator.summary()))
    assert told["results"][6]["weights"] == told["results"][0]["weights"]
    # A new profile brings new rows, and is noticed.
    federation.push(coordinator, 8, federation.clients[:1])
    federation.push(coordinator, 8, federation.clients[1:], profile=None)
    coordinator.advance()
    assert coordinator.summary()["results"][7]["relations"] == 8


def test_whoever_waits_is_woken_before_the_account_is_written(
    federation: Any, coordinator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    coordinator.advance()
    coordinator.subscribe(order.append)
    monkeypatch.setattr(summary_module, "write_summary", lambda _, told, file="run.json": order.append(file))
    federation.push(coordinator, 1)
    order.clear()
    coordinator.advance()
    assert [what for what in order if what != "status.json"] == ["round", "run.json"]


def test_whoever_looks_waits_for_no_disk(federation: Any, coordinator: Any) -> None:
    federation.play(coordinator, 1)
    seen: list[Any] = []

    def look() -> None:
        coordinator.arrive("clinic-a", 2)
        seen.append(coordinator.open_download("clinic-a", 2).whole)
        seen.append(coordinator.status("clinic-a").round)

    with coordinator._run.lock:  # as while an upload or the end of a round is written
        looking = threading.Thread(target=look)
        looking.start()
        looking.join(20.0)
        assert seen == [True, 2]


def test_uploads_that_come_together_share_their_waits_for_the_disk(
    federation: Any, begin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = begin(durable=True)
    calls: list[str] = []
    for owner, name in ((coordinator._run.store, "add_uploads"), (coordinator._run.blobs, "settle_uploads")):
        real = getattr(owner, name)

        def counted(what: object, name: str = name, real: Callable[[object], object] = real) -> object:
            calls.append(name)
            return real(what)

        monkeypatch.setattr(owner, name, counted)
    pushes = []
    for client in federation.clients:
        header = federation.upload(coordinator.run_id, client, 1).header()
        ticket = coordinator.announce(client, header)
        (section,) = federation.upload(coordinator.run_id, client, 1).sections
        ticket.spool.write_bytes(section.payload)
        pushes.append((client, header, ticket))
    answers: list[ReceiptStatus] = []

    def commit(*parts: Any) -> None:
        answers.append(coordinator.commit(*parts).status)

    threads = [threading.Thread(target=commit, args=parts) for parts in pushes]
    with coordinator._run.lock:  # until all of them wait
        for thread in threads:
            thread.start()
        while len(coordinator._uploads._waiting) < len(threads):
            threading.Event().wait(0.01)
    for thread in threads:
        thread.join()
    assert answers == [ReceiptStatus.ACCEPTED] * 5
    assert calls == ["settle_uploads", "add_uploads"]
    assert set(coordinator._run.store.uploads(1)) == set(federation.clients)


def test_an_upload_that_cannot_be_stored_fails_alone(
    federation: Any, coordinator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adopt = coordinator._run.blobs.adopt

    def full(spool: Path, number: int, client: str) -> None:
        if client == "clinic-b":
            raise OSError(28, "No space left on device")
        adopt(spool, number, client)

    with monkeypatch.context() as patch:
        patch.setattr(coordinator._run.blobs, "adopt", full)
        federation.push(coordinator, 1, ("clinic-a",))
        with pytest.raises(OSError, match="No space left"):
            federation.push(coordinator, 1, ("clinic-b",))
    assert coordinator.status("clinic-a").arrived == ("clinic-a",)
    federation.push(coordinator, 1, ("clinic-b",))
    assert coordinator.status("clinic-a").arrived == ("clinic-a", "clinic-b")


def test_how_often_a_round_waits_for_the_disk(
    federation: Any, begin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/operation.md has these numbers; the database's own wait, one per transaction, is not in them."""
    coordinator = begin(durable=True)
    federation.play(coordinator, 1)
    waits: list[int] = []
    real = os.fsync

    def waiting(file: int) -> None:
        waits.append(file)
        real(file)

    monkeypatch.setattr(os, "fsync", waiting)
    federation.push(coordinator, 2, profile=None)
    assert len(waits) == 1 + 2 * 5  # the folder of the round; payload and name of every upload
    waits.clear()
    coordinator.advance()
    assert not waits
    federation.push(coordinator, 3)
    waits.clear()
    coordinator.advance()
    assert len(waits) == 3  # new weight rows: folder, content, name


def test_large_uploads_are_neither_read_whole_nor_all_in_memory_to_be_summed(tmp_path: Path) -> None:
    size, count = 1 << 19, 24
    names = [f"m{index:02d}" for index in range(count)]
    parameters = PlainParameters()
    aggregator = create_aggregator(parameters, AggregationPolicy(), allow_plaintext=True)
    context = RoundContext("fed", 0, 1, "shared", size)
    uploads = {}
    for name in names:
        head = upload_header(parameters, context, name).encode(bytes(16))
        (tmp_path / name).write_bytes(head + np.full(size, 0.5, dtype="<f4").tobytes())
    share = 2**parameters.weight_bits // 23
    weights = (*(share,) * 22, 2**parameters.weight_bits - 22 * share)
    row = WeightRow(tuple(names[1:]), weights, parameters.weight_bits)
    tracemalloc.start()
    try:
        for name in names:
            uploads[name] = map_file(tmp_path / name)
        made = aggregator.aggregate(uploads, {names[0]: row}, context)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * size * 20  # twice 24 of them would be in memory, and were
    np.testing.assert_allclose(np.frombuffer(made[0], dtype="<f4")[-3:], 0.5, atol=1e-6)
