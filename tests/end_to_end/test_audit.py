"""What a whole run leaves in the audit logs of its server and of its clients."""

import json
from pathlib import Path

import pytest

from end_to_end import federation_of_vectors as fv
from fedmosaic.privacy.audit import (
    AUDIT,
    Charged,
    Joined,
    KeyEpoch,
    Received,
    RoundClosed,
    Withheld,
    read_audit,
)
from fedmosaic.privacy.audit import main as command
from fedmosaic.privacy.ledger.ledger import LEDGER, read_ledger
from fedmosaic.protos.errors import StateError
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.settings import settings_from_kit


def events(state: Path) -> list[object]:
    lines, torn = read_audit(state / AUDIT)
    assert torn == 0
    return [line.event for line in lines]


def test_a_run_is_on_record_at_server_and_client(tmp_path: Path) -> None:
    directory = fv.make_federation(tmp_path / "f", fv.terms("mask", 3))
    server, client = directory / "server" / "state", directory / "clients" / "ada" / "state"
    fv.finish(directory)
    said = events(server)
    assert {e.client for e in said if isinstance(e, Joined)} == set(fv.MEMBERS)
    assert [e.round for e in said if isinstance(e, RoundClosed)] == [1, 2, 3]
    assert [e.members for e in said if isinstance(e, KeyEpoch)] == [fv.MEMBERS]
    assert not [e for e in said if isinstance(e, Withheld)]
    said = events(client)
    assert [e.members for e in said if isinstance(e, KeyEpoch)] == [fv.MEMBERS]
    assert [(e.round, e.outcome) for e in said if isinstance(e, Received)] == [(2, "taken"), (3, "taken")]
    # One line for every row of the ledger that charges or releases, with that row's own hash.
    rows = read_ledger(client / LEDGER)
    noted = {e.row: e.row_hash for e in said if isinstance(e, Charged)}
    assert noted == {row.sequence: row.hash for row in rows if row.channel}
    for state in (server, client):
        assert command(["verify", str(state)]) == 0
        text = (state / AUDIT).read_text()
        assert not any(word in text for word in ("loss", "epsilon", "examples", "score"))


def test_a_server_that_cannot_trust_its_log_does_not_start(tmp_path: Path) -> None:
    directory = fv.make_federation(tmp_path / "f", fv.terms("mask", 3))
    fv.coordinator_of(directory).close()
    path = directory / "server" / "state" / AUDIT
    line = json.loads(path.read_text())
    path.write_text(json.dumps(line | {"time": "2020-01-01T00:00:00.000+00:00"}) + "\n")
    with pytest.raises(StateError, match="line 1 is broken"):
        Coordinator(settings_from_kit(directory / "server"))
