"""The audit log: whatever is done to it shows, and no line holds anything but what its event may."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedmosaic.privacy import audit
from fedmosaic.privacy.audit import AUDIT, AuditLog
from fedmosaic.privacy.audit import main as command
from fedmosaic.protos.errors import StateError

RUN = "0" * 32


def start(log: AuditLog, roster: str = "a") -> None:
    log.add("started", role="server", name="server", federation="fed", roster=roster * 64)


def filled(directory: Path, joined: int = 4) -> Path:
    log = AuditLog(directory)
    start(log)
    for number in range(joined):
        log.add("enrolled", client=f"clinic-{number}", run=RUN, round=1)
    log.close()
    return directory / AUDIT


def other_value(lines: list[bytes]) -> None:
    lines[2] = lines[2].replace(b"clinic-1", b"clinic-9")


def other_hash(lines: list[bytes]) -> None:
    line = json.loads(lines[2])
    lines[2] = json.dumps(line | {"hash": "f" * 64}).encode()


def with_a_loss(lines: list[bytes]) -> None:
    line = json.loads(lines[2])
    line["fields"]["loss"] = 0.25
    lines[2] = json.dumps(line).encode()


def swapped(lines: list[bytes]) -> None:
    lines[2], lines[3] = lines[3], lines[2]


CHANGES: dict[str, tuple[Callable[[list[bytes]], object], str]] = {
    "a value": (other_value, "its content does not match its hash"),
    "a hash": (other_hash, "its content does not match its hash"),
    "a field that no event has": (with_a_loss, "enrolled.loss: Extra inputs are not permitted"),
    "two lines swapped": (swapped, "row 3 stands in its place"),
    "a line removed": (lambda lines: lines.pop(2), "row 3 stands in its place"),
    "a line twice": (lambda lines: lines.insert(2, lines[1]), "row 1 stands in its place"),
    "no JSON": (lambda lines: lines.__setitem__(2, b"{"), "Invalid JSON"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_first_broken_line_is_named_and_nothing_is_written_after_it(tmp_path: Path, change: str) -> None:
    path = filled(tmp_path)
    assert command(["verify", str(tmp_path)]) == 0
    lines = path.read_bytes().splitlines()
    alter, reason = CHANGES[change]
    alter(lines)
    path.write_bytes(b"\n".join(lines) + b"\n")
    for attempt in (lambda: command(["verify", str(tmp_path)]), lambda: start(AuditLog(tmp_path))):
        with pytest.raises(StateError, match="line 3 is broken: ") as broken:
            attempt()
        assert reason in str(broken.value)


def test_a_torn_last_line_is_named_then_cut_off_and_noted(tmp_path: Path) -> None:
    path = filled(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[-1][:40])
    with pytest.raises(StateError, match="line 6 is torn after 40 bytes"):
        command(["verify", str(tmp_path)])
    start(AuditLog(tmp_path))
    lines, torn = audit.read_audit(path)
    assert (torn, path.read_bytes()[: len(whole)]) == (0, whole)
    assert (lines[5].event, lines[5].fields) == ("repaired", {"lost_bytes": 40})
    assert command(["verify", str(tmp_path)]) == 0


def test_a_killed_writer_leaves_whole_lines(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from fedmosaic.privacy.audit import AuditLog\n"
        "log = AuditLog(Path(sys.argv[1]))\n"
        "for number in range(10**6):\n"
        "    log.add('enrolled', client='ada', run='0' * 32, round=1); print(number, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        said = [int(process.stdout.readline()) for _ in range(20)]
        process.send_signal(signal.SIGKILL)
    start(AuditLog(tmp_path))
    lines, torn = audit.read_audit(tmp_path / AUDIT)
    assert torn == 0
    assert len(lines) > said[-1] + 1


def test_another_roster_is_noted_at_the_next_start(tmp_path: Path) -> None:
    for roster in "aab":
        log = AuditLog(tmp_path)
        start(log, roster)
        log.close()
    changes = [line.fields for line in audit.read_audit(tmp_path / AUDIT)[0] if line.event == "roster"]
    assert changes == [{"before": "a" * 64, "after": "b" * 64}]


def test_the_same_refusal_fills_no_disk_and_no_line_of_its_own(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    for _ in range(100):
        log.refused("clinic-a", "push", "SIGNATURE_INVALID")
    log.refused('ipv4:1.2.3.4\n{"event"', "push", "loss 0.25")
    lines = audit.read_audit(tmp_path / AUDIT)[0]
    assert [line.fields for line in lines] == [
        {"who": "clinic-a", "call": "push", "reason": "SIGNATURE_INVALID"},
        {"who": 'ipv4:1.2.3.4?{"event"', "call": "push", "reason": "OTHER"},
    ]


def test_what_no_event_has_is_refused_before_it_is_written(tmp_path: Path) -> None:
    path = filled(tmp_path)
    before, log = path.read_bytes(), AuditLog(tmp_path)
    wrong: tuple[dict[str, object], ...] = (
        {"round": 1, "section": "shared", "outcome": "taken", "loss": 0.25},
        {"round": 1, "section": "shared", "outcome": "loss 0.25"},
        {"round": 0.25, "section": "shared", "outcome": "taken"},
        {"round": 1, "section": "shared"},
    )
    for fields in wrong:
        with pytest.raises(ValueError, match=r"received\."):
            log.add("received", **fields)
    with pytest.raises(ValueError, match="there is no event 'score'"):
        log.add("score", value=1)
    assert path.read_bytes() == before


def test_a_disk_that_takes_half_a_line_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp_path)
    log = AuditLog(tmp_path)
    start(log)
    before = path.read_bytes()

    class Full:
        def __init__(self, file: object) -> None:
            self._file = file

        def __getattr__(self, name: str) -> object:
            return getattr(self._file, name)

        def write(self, content: bytes) -> int:
            return int(self._file.write(content[:30]))  # type: ignore[attr-defined]  # a file

    whole = log._file
    monkeypatch.setattr(log, "_file", Full(whole))
    with pytest.raises(OSError, match="No space left on device"):
        start(log)
    assert path.read_bytes() == before
    monkeypatch.setattr(log, "_file", whole)
    start(log)
    assert len(audit.read_audit(path)[0]) == 7
