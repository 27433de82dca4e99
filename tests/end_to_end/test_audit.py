"""What a whole run leaves in the audit logs of its server and of its clients."""

import json
from pathlib import Path
from typing import Any

import pytest

from end_to_end import federation_of_vectors as fv
from fedmosaic.client.state import read_record
from fedmosaic.privacy.audit import AUDIT, read_audit
from fedmosaic.privacy.audit import main as command
from fedmosaic.privacy.ledger.ledger import LEDGER, read_ledger
from fedmosaic.protos.errors import StateError
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.settings import settings_from_kit


def events(state: Path) -> dict[str, list[dict[str, Any]]]:
    """Fields of the lines of a log by event."""
    lines, torn = read_audit(state / AUDIT)
    assert torn == 0
    found: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        found.setdefault(line.event, []).append(line.fields)
    return found


def test_a_run_is_on_record_at_server_and_client(tmp_path: Path) -> None:
    directory = fv.make_federation(tmp_path / "f", fv.terms("mask", 3))
    server, client = directory / "server" / "state", directory / "clients" / "ada" / "state"
    fv.finish(directory)
    said = events(server)
    assert set(said) == {"started", "enrolled", "key-epoch", "closed"}
    assert {line["client"] for line in said["enrolled"]} == set(fv.MEMBERS)
    assert [line["round"] for line in said["closed"]] == [1, 2, 3]
    assert [line["members"] for line in said["key-epoch"]] == [list(fv.MEMBERS)]
    said = events(client)
    assert set(said) == {"started", "enrolled", "key-epoch", "charged", "released", "received"}
    assert [line["members"] for line in said["key-epoch"]] == [list(fv.MEMBERS)]
    assert [(line["round"], line["outcome"]) for line in said["received"]] == [(2, "taken"), (3, "taken")]
    # One line for every row of the ledger that charges or releases, with that row's own hash.
    rows = read_ledger(client / LEDGER)
    noted = {line["row"]: line["row_hash"] for line in said["charged"] + said["released"]}
    assert noted == {row.sequence: row.hash for row in rows if row.channel}
    for state in (server, client):
        assert command(["verify", str(state)]) == 0
        text = (state / AUDIT).read_text()
        assert not any(word in text for word in ("loss", "epsilon", "examples", "score"))


def test_an_end_that_was_cut_off_is_missed_by_what_another_party_has_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = fv.make_federation(tmp_path / "f", fv.terms("mask", 3))
    server, client = directory / "server" / "state", directory / "clients" / "ada" / "state"
    fv.finish(directory)
    record, row = read_record(client), read_ledger(client / LEDGER)[-1]
    assert record is not None
    for state, kept, event in ((server, record.server_head, "closed"), (client, row.hash, "released")):
        assert command(["verify", str(state), "--holds", kept]) == 0
        said = capsys.readouterr().out
        assert f"({event}) has {kept}" in said
        assert "Not shown: whether lines at the end were cut off" in said
        lines = (state / AUDIT).read_bytes().splitlines(keepends=True)
        held = next(number for number, line in enumerate(lines) if kept.encode() in line)
        (state / AUDIT).write_bytes(b"".join(lines[:held]))
        assert command(["verify", str(state)]) == 0, "a chain alone does not tell"
        with pytest.raises(StateError, match=f"no line has {kept}: the end was cut off"):
            command(["verify", str(state), "--holds", kept])


def test_a_server_that_cannot_trust_its_log_does_not_start(tmp_path: Path) -> None:
    directory = fv.make_federation(tmp_path / "f", fv.terms("mask", 3))
    fv.coordinator_of(directory).close()
    path = directory / "server" / "state" / AUDIT
    line = json.loads(path.read_text())
    path.write_text(json.dumps(line | {"time": "2020-01-01T00:00:00.000+00:00"}) + "\n")
    with pytest.raises(StateError, match="line 1 is broken"):
        Coordinator(settings_from_kit(directory / "server"))
