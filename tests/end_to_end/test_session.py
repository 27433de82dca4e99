"""A client's session against the real coordinator: aggregates, refusals, restarts, key epochs."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from end_to_end import federation_of_vectors as fv
from fedmosaic.client.progress import Progress
from fedmosaic.client.round.records import read_upload
from fedmosaic.privacy.ledger.move import back_up, move
from fedmosaic.protos.errors import LedgerError, StateError
from fedmosaic.protos.messages import Upload
from fedmosaic.server.storage import tables


def _run(tmp_path: Path, backend: str, rounds: int = 3) -> dict[str, Any]:
    directory = fv.make_federation(tmp_path / backend, fv.terms(backend, rounds))
    clients, summary = fv.finish(directory)
    return {"clients": clients, "summary": summary, "directory": directory}


@pytest.mark.parametrize("backend", ["plain", "mask", "ckks"])
def test_every_recipient_gets_the_weighted_sum_of_the_others(
    tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(Progress, "stage", lambda _, number, name, total=0: told.append(name))
    run = _run(tmp_path, backend, rounds=2)
    assert ("agreeing on the group key" in told) == (backend != "plain")
    first = {
        name: np.random.default_rng([seed, 1]).normal(0, 0.5, c.learner.local.size).astype(np.float32)
        for seed, (name, c) in enumerate(run["clients"].items())
    }
    weights = run["summary"]["results"][0]["weights"]["shared"]
    for name, client in run["clients"].items():
        row = weights[name]
        assert name not in row
        assert len(row) >= 3
        expected = sum(share * first[contributor].astype(np.float64) for contributor, share in row.items())
        (received,) = client.learner.received
        tolerance = {"plain": 1e-6, "mask": 2e-5, "ckks": 1e-5}[backend]
        np.testing.assert_allclose(received, expected, rtol=0, atol=tolerance)


def test_a_client_killed_before_its_push_resumes_and_sends_the_same_bytes(
    founded: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    directory, coordinator = founded("ckks", 3)
    path, push = directory / "clients/cid/state/upload-0002.bin", coordinator.push
    kept: list[Upload | None] = []

    def noting(client: str, upload: Upload) -> Any:
        if (client, upload.round) == ("cid", 2):
            kept.append(upload)
        return push(client, upload)

    coordinator.push = noting
    clients = fv.played(
        directory,
        coordinator,
        ("cid",),
        lambda line: fv.Dying(line, push=2),
        pause=lambda: kept.append(read_upload(path)),
    )
    assert kept[0] == kept[1]
    trained = clients["cid"].learner.trained
    assert trained == [3], "round 2 was trained before the kill and must not be trained again"
    assert "re-sending the stored upload" in caplog.text
    uploaded = [result["uploaded"] for result in coordinator.summary()["results"]]
    assert uploaded == [sorted(fv.MEMBERS)] * 3


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    run = _run(tmp_path, "plain", rounds=1)
    shutil.rmtree(run["directory"] / "server" / "state")
    coordinator = fv.coordinator_of(run["directory"])
    client = fv.Client(run["directory"], "ada", 0)
    with pytest.raises(StateError, match=r"but the server is on run .* ledger beside the data goes on"):
        client.session(fv.in_process(coordinator, "ada")).run()
    coordinator.close()


def test_a_client_whose_ledger_was_put_back_from_an_older_copy_is_refused_by_name(
    tmp_path: Path, founded: Any
) -> None:
    directory, coordinator = founded("plain", 2)
    state = directory / "clients" / "cid" / "state"

    def put_back() -> None:
        shutil.copytree(state, tmp_path / "newest")
        for file in state.glob("ledger.sqlite*"):
            file.unlink()
        move(tmp_path / "older", tmp_path / "put-back")
        for file in (tmp_path / "put-back").glob("ledger.sqlite*"):
            shutil.copy(file, state)
        again = fv.Client(directory, "cid", 2)
        with pytest.raises(LedgerError, match="LEDGER_BEHIND"):
            again.session(fv.in_process(coordinator, "cid")).run()
        again.close()
        for file in (tmp_path / "newest").glob("ledger.sqlite*"):
            shutil.copy(file, state)

    fv.played(
        directory,
        coordinator,
        ("cid",),
        lambda line: fv.Dying(line, push=2),
        prepare=lambda _: back_up(state, tmp_path / "older"),
        pause=put_back,
    )


def test_two_copies_of_a_ledger_in_one_run_are_found_at_the_push(founded: Any) -> None:
    directory, coordinator = founded("plain", 2)
    client = fv.Client(directory, "ada", 0)
    session = client.session(fv.in_process(coordinator, "ada"))
    original = coordinator.push

    def push(name: str, upload: Upload) -> Any:
        # Another process of this member, on a copy of its ledger, was faster.
        with coordinator._run.store._transaction() as connection:
            connection.execute(tables.ledger_heads.update().values(head=bytes(32)))
        return original(name, upload)

    coordinator.push = push  # in between enrolment and push
    with pytest.raises(LedgerError, match=r"LEDGER_BEHIND.*older copy"):
        session.run()
    assert not coordinator.summary()["results"], "nothing of it was used"
    client.close()
