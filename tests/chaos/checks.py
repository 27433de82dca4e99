"""What must hold after a run in which processes were killed."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa

from fedmosaic.client.state import newest_adapter
from fedmosaic.privacy.audit import AUDIT, AuditLine, read_audit
from fedmosaic.privacy.federation.kits import open_kit
from fedmosaic.privacy.ledger.rows import LedgerRow, charges
from fedmosaic.privacy.ledger.rules import bound_of
from fedmosaic.privacy.ledger.store import read_ledger
from fedmosaic.protos.errors import FedMosaicError
from fedmosaic.server.settings import settings_from_kit
from fedmosaic.server.storage.store import default_url
from fedmosaic.server.summary import with_rounds

Notes = list[dict[str, Any]]
_LOST_TOLD = "the server has lost our upload"
_OPENED_AGAIN = ("sum-open", "sum-share")
"""Steps of a sum before any noise is charged, which a client that was killed begins anew, with other keys."""
CKKS_TOLERANCE = 1e-3
"""CKKS is approximate, with fresh encryption noise in every run; all else must be equal bit for bit."""


def notes_of(place: Path, name: str) -> Notes:
    """What a member's processes noted."""
    path = place / f"{name}.notes"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def last_words(place: Path, name: str) -> str:
    """The last whole line of a process's log."""
    path = place / f"{name}.log"
    lines = path.read_text(errors="replace").rpartition("\n")[0] if path.exists() else ""
    return lines.rpartition("\n")[2]


def final_vectors(place: Path, members: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The adapter that each member is left with."""
    found = {}
    for name in members:
        if newest := newest_adapter(place / "f" / "clients" / name / "state"):
            with np.load(newest[1] / "vector.npz") as stored:
                found[name] = stored["local"]
    return found


def faults_of(
    place: Path, members: tuple[str, ...], undisturbed: Mapping[str, np.ndarray] | None, fault: str = "kill"
) -> Iterator[str]:
    """Everything that is wrong with a finished run; nothing if it is as it should be.

    Args:
        place: directory of the run.
        members: of the federation.
        undisturbed: what the same run left without a kill; None for that run itself.
        fault: what befell its processes. Where bits were flipped, a key may be damaged, and an upload.
    """
    roster = open_kit(place / "f" / "server").roster
    terms = roster.terms
    grouped = terms.adapter.in_group_sums
    rounds = terms.schedule.rounds
    state = place / "f" / "server" / "state"
    summary = with_rounds(json.loads((state / "run.json").read_text()), state)
    uploaded = {result["round"]: set(result["uploaded"]) for result in summary["results"]}
    if summary["phase"] != "finished" or len(uploaded) != rounds:
        yield f"the run is {summary['phase']} after {len(uploaded)} of {rounds} rounds"
    log = (place / "server.log").read_text(errors="replace")
    away = {name for name in members if log.count(f"{name} has lost key epoch") > 1}
    # A flipped bit in a group key: its member says so and trains a round alone, and all later rounds differ.
    told = {name: (place / f"{name}.log").read_text(errors="replace") for name in members}
    keyless = {name for name in members if fault == "bit-flip" and "its key is lost" in told[name]}
    drawn = {n: set() if grouped else roster.taking_part(summary["run_id"], n) for n in uploaded}
    absent = {n: missing for n, names in uploaded.items() if (missing := drawn[n] - names)}
    for number, names in absent.items():
        # A member that is killed twice in one agreement is left out of the epoch, as it should be.
        if (alone := sorted(names - away - keyless)) and fault != "rollback":
            yield f"round {number} closed without {', '.join(alone)}"
    if fault not in ("bit-flip", "rollback"):
        # Sent again, it heals; but it was lost.
        yield from (f"{n}: an acknowledged upload was lost" for n in members if _LOST_TOLD in told[n])
    yield from _server_audit_differs(state, rounds, cut=fault == "power-cut")
    nonces: dict[str, str] = {}
    for name in members:
        notes = notes_of(place, name)
        ledger = _ledger(place / "f" / "clients" / name / "state")
        if isinstance(ledger, str):
            yield f"{name}: {ledger}"
            continue
        faults = [
            *_lost(place, name, notes, uploaded, fault),
            *_sealed_twice(notes, nonces, fault),
            *_under_charged(notes, ledger, terms.adapter.private),
            *_not_what_was_booked(notes, ledger),
            *_forgot(notes),
            *_audit_differs(place / "f" / "clients" / name / "state", ledger, cut=fault == "power-cut"),
        ]
        yield from (f"{name}: {found}" for found in faults)
    final = final_vectors(place, members)
    alike = not absent and not keyless
    last = dict.fromkeys(members, rounds) if grouped else {n: r for r in sorted(drawn) for n in drawn[r]}
    adapters = {n: place / "f" / "clients" / n / f"state/adapter/round-{last[n]:04d}" for n in last}
    if lost := sorted(n for n in last if not adapters[n].exists() and n not in absent.get(last[n], ())):
        yield f"no adapter of the last round at {', '.join(lost)}"
    elif grouped or (undisturbed is not None and alike):
        # Which members a noisy sum is of depends on who is alive; that all hold the same one does not.
        expected = dict.fromkeys(members, final[members[0]]) if grouped else undisturbed or {}
        tolerance = CKKS_TOLERANCE if terms.encryption.backend == "ckks" else 0.0
        for name in last:
            if (off := float(np.abs(final[name] - expected[name]).max())) > tolerance:
                yield f"{name}: the adapter differs by {off:g}"


def _ledger(state: Path) -> list[LedgerRow] | str:
    try:
        return read_ledger(state / "ledger.sqlite")
    except FedMosaicError as error:
        return str(error)


def _lost(place: Path, name: str, notes: Notes, uploaded: dict[int, set[str]], fault: str) -> Iterator[str]:
    settings = settings_from_kit(place / "f" / "server")
    engine = sa.create_engine(settings.store_url or default_url(settings.state_dir))
    with engine.connect() as database:
        query = sa.text("select round, content_hash from uploads where client = :name")
        stored = {number: bytes(digest).hex() for number, digest in database.execute(query, {"name": name})}
    engine.dispose()
    receipts = [note for note in notes if note["what"] == "receipt" and note["status"] != "late"]
    if fault == "rollback":  # whatever the server forgot came again, sealed anew where its key was gone too
        receipts = list({note["round"]: note for note in receipts}.values())
    for note in receipts:
        number = note["round"]
        if name not in uploaded.get(number, ()):
            yield f"the acknowledged upload of round {number} is not in the round"
        if stored.get(number) != note["hash"]:
            yield f"the acknowledged upload of round {number} is not the one that is stored"


def _sealed_twice(notes: Notes, nonces: dict[str, str], fault: str) -> Iterator[str]:
    """One adapter is sealed for a round, one record leaves under a key epoch, and one message of a step."""
    plain, sent = defaultdict(set), defaultdict(set)
    for note in notes:
        if note["what"] == "encrypt":
            plain[f"{note['section']} section of round {note['round']}"].add(note["plain"])
            if note["under"] and nonces.setdefault(note["under"], note["record"]) != note["record"]:
                yield f"key and nonce of round {note['round']} were used for other bytes before"
        elif note["what"] == "push" and note["sent"]:
            sent[f"upload of round {note['round']} in key epoch {note['epoch']}"].add(str(note["sent"]))
        elif note["what"] == "post" and note["stage"] not in _OPENED_AGAIN and fault != "rollback":
            sent[f"message {note['place']!r}"].add(note["sent"])
    for place, contents in plain.items():
        if len(contents) > 1:
            yield f"{len(contents)} different adapters were sealed for the {place}"
    for place, contents in sent.items():
        if len(contents) > 1:
            yield f"{len(contents)} different records left as the {place}"


def _under_charged(notes: Notes, rows: list[LedgerRow], private: bool) -> Iterator[str]:
    """No noise is drawn without a charge of its own, which is in the ledger before."""
    charged: dict[str, int] = {}
    for note in notes:
        if note["what"] in ("older", "newest"):
            charged = {}
        if note["what"] == "draw":
            if note["charged"] <= charged.get(note["channel"], 0):
                yield f"noise of the {note['channel']} was drawn with no charge of its own"
            charged[note["channel"]] = note["charged"]
    counted = ("profile", "adapter") if private else ("profile",)
    epsilon = bound_of(charges(rows, counted), 1e-5, "rdp").epsilon
    if abs(rows[-1].epsilon - epsilon) > 1e-9:
        yield f"the ledger says ε = {rows[-1].epsilon}, its charges make {epsilon}"


def _not_what_was_booked(notes: Notes, rows: list[LedgerRow]) -> Iterator[str]:
    """What left is what the ledger has a row of, by its digest."""
    booked = {(row.channel, row.round, row.payload_digest) for row in rows if row.kind == "RELEASED"}
    sealed = {note["record"]: note for note in notes if note["what"] == "encrypt"}
    profiles = {note["profile"] for note in notes if note["what"] == "push"} - {""}
    if len(profiles) > sum(channel == "profile" for channel, *_ in booked):
        yield f"{len(profiles)} task profiles left, which the ledger has no row of"
    for note in notes:
        for name, record in note["sent"].items() if note["what"] == "push" else ():
            plain = sealed[record]["plain"] if record in sealed else ""
            if ("family" if name == "family" else "adapter", note["round"], plain) not in booked:
                yield f"the {name} section of round {note['round']} left without a row in the ledger"
        if note["what"] == "post" and note["stage"] == "sum-vector":
            if not any(where[:2] == ("adapter", note["number"]) for where in booked):
                yield f"the share of round {note['number']} left without a row in the ledger"


def _forgot(notes: Notes) -> Iterator[str]:
    """A state that has forgotten an acknowledged upload releases nothing."""
    forgot = 0
    for note in notes:
        forgot = {"older": note.get("forgot", 0), "newest": 0}.get(note["what"], forgot)
        if forgot and note["what"] in ("draw", "push"):
            yield f"an older copy of the state, which had forgotten {forgot} uploads, did a {note['what']}"


def _audit(state: Path) -> Iterator[AuditLine | str]:
    try:
        lines, torn = read_audit(state / AUDIT)
    except FedMosaicError as error:
        yield str(error)
        return
    yield from lines
    if torn:
        yield "the audit log of a process that came to its end has a torn line"


def _audit_differs(state: Path, rows: list[LedgerRow], *, cut: bool) -> Iterator[str]:
    """Every row of the ledger has its line, in order, but for the last one of a process that was killed.

    Where the power was cut, lines that were not waited for are gone, and never the row of a line.
    """
    due = [row for row in rows if row.channel is not None]
    starts = 0
    for line in _audit(state):
        if isinstance(line, str):
            yield line
        elif line.event == "started":
            starts += 1
        elif "row" in line.fields:
            number, digest = line.fields["row"], line.fields["row_hash"]
            missing = 0
            while due and due[0].sequence < number:
                missing += 1
                due.pop(0)
            if not due or due[0].hash != digest or due.pop(0).channel != line.fields["channel"]:
                yield f"row {number} of the audit log is not in the ledger, or twice in the log"
            if missing > starts and not cut:
                yield f"{missing} rows before row {number} of the ledger are not in the audit log"
            starts = 0
    if due and not cut:
        yield f"the last {len(due)} rows of the ledger are not in the audit log"


def _server_audit_differs(state: Path, rounds: int, *, cut: bool) -> Iterator[str]:
    closed = []
    for line in _audit(state):
        if isinstance(line, str):
            yield f"server: {line}"
        elif line.event == "closed":
            closed.append(line.fields["round"])
    if closed != sorted(set(closed)) or (not cut and closed[-1:] not in ([rounds], [rounds - 1])):
        yield f"server: the audit log says that rounds {closed} of {rounds} were closed"
