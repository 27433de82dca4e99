"""What must hold after a run in which processes were killed."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa

from fedmosaic.client.state import newest_adapter
from fedmosaic.privacy.audit import AUDIT, read_audit
from fedmosaic.privacy.federation.kits import open_kit
from fedmosaic.privacy.ledger.rows import LedgerRow, charges
from fedmosaic.privacy.ledger.rules import bound_of
from fedmosaic.privacy.ledger.store import read_ledger
from fedmosaic.protos.errors import FedMosaicError
from fedmosaic.server.settings import settings_from_kit
from fedmosaic.server.storage.store import default_url
from fedmosaic.server.summary import with_rounds

Notes = list[dict[str, Any]]
CKKS_TOLERANCE = 1e-3
"""CKKS is approximate, with fresh encryption noise in every run; all else must be equal bit for bit."""


def notes_of(place: Path, name: str) -> Notes:
    """What a member's processes noted."""
    path = place / f"{name}.notes"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def final_vectors(place: Path, members: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The adapter that each member is left with."""
    found = {}
    for name in members:
        if newest := newest_adapter(place / "f" / "clients" / name / "state"):
            with np.load(newest[1] / "vector.npz") as stored:
                found[name] = stored["local"]
    return found


def faults_of(
    place: Path,
    members: tuple[str, ...],
    undisturbed: Mapping[str, np.ndarray] | None,
    *,
    flipped: bool = False,
) -> Iterator[str]:
    """Everything that is wrong with a finished run; nothing if it is as it should be.

    Args:
        place: directory of the run.
        members: of the federation.
        undisturbed: what the same run left without a kill; None for that run itself.
        flipped: whether bits of files were flipped. Without that, no file of a key may be damaged.
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
    keyless = {name for name in members if flipped and "its key is lost" in told[name]}
    drawn = {n: set() if grouped else roster.taking_part(summary["run_id"], n) for n in uploaded}
    absent = {n: missing for n, names in uploaded.items() if (missing := drawn[n] - names)}
    for number, names in absent.items():
        # A member that is killed twice in one agreement is left out of the epoch, as it should be.
        if alone := sorted(names - away - keyless):
            yield f"round {number} closed without {', '.join(alone)}"
    nonces: dict[str, str] = {}
    for name in members:
        notes = notes_of(place, name)
        yield from (f"{name}: {fault}" for fault in _lost(place, name, notes, uploaded))
        yield from (f"{name}: {fault}" for fault in _sealed_twice(notes, nonces))
        yield from (f"{name}: {fault}" for fault in _under_charged(place, name, notes, terms.adapter.private))
    final = final_vectors(place, members)
    alike = not absent and not keyless
    last = dict.fromkeys(members, rounds) if grouped else {n: r for r in sorted(drawn) for n in drawn[r]}
    adapters = {n: place / "f" / "clients" / n / f"state/adapter/round-{last[n]:04d}" for n in last}
    if missing := sorted(n for n in last if not adapters[n].exists() and n not in absent.get(last[n], ())):
        yield f"no adapter of the last round at {', '.join(missing)}"
    elif grouped or (undisturbed is not None and alike):
        # Which members a noisy sum is of depends on who is alive; that all hold the same one does not.
        expected = dict.fromkeys(members, final[members[0]]) if grouped else undisturbed or {}
        tolerance = CKKS_TOLERANCE if terms.encryption.backend == "ckks" else 0.0
        for name in last:
            if (off := float(np.abs(final[name] - expected[name]).max())) > tolerance:
                yield f"{name}: the adapter differs by {off:g}"


def _lost(place: Path, name: str, notes: Notes, uploaded: dict[int, set[str]]) -> Iterator[str]:
    settings = settings_from_kit(place / "f" / "server")
    engine = sa.create_engine(settings.store_url or default_url(settings.state_dir))
    with engine.connect() as database:
        query = sa.text("select round, content_hash from uploads where client = :name")
        stored = {number: bytes(digest).hex() for number, digest in database.execute(query, {"name": name})}
    engine.dispose()
    for note in notes:
        number = note.get("round", 0)
        if note["what"] == "receipt" and note["status"] != "late":
            if name not in uploaded.get(number, ()):
                yield f"the acknowledged upload of round {number} is not in the round"
            if stored.get(number) != note["hash"]:
                yield f"the acknowledged upload of round {number} is not the one that is stored"


def _sealed_twice(notes: Notes, nonces: dict[str, str]) -> Iterator[str]:
    plain = defaultdict(set)
    for note in notes:
        if note["what"] == "encrypt":
            plain[note["round"]].add(note["plain"])
            if note["under"] and nonces.setdefault(note["under"], note["record"]) != note["record"]:
                yield f"key and nonce of round {note['round']} were used for other bytes before"
    for number, contents in plain.items():
        if len(contents) > 1:
            yield f"{len(contents)} different adapters were sealed for round {number}"


def _under_charged(place: Path, name: str, notes: Notes, private: bool) -> Iterator[str]:
    try:
        rows = read_ledger(place / "f" / "clients" / name / "state" / "ledger.sqlite")
    except FedMosaicError as error:
        yield str(error)
        return
    yield from _audit_differs(place / "f" / "clients" / name / "state", rows)
    reserved = Counter((row.channel, row.round) for row in rows if row.kind == "RESERVED")
    released = {(row.channel, row.round) for row in rows if row.kind in ("RELEASED", "RESENT")}
    drawn = Counter(note["round"] for note in notes if note["what"] == "draw")
    for number, count in drawn.items():
        if count > reserved["adapter", number]:
            yield f"round {number}: noise drawn {count} times, charged {reserved['adapter', number]} times"
    for note in notes:
        if note["what"] == "push" and note["adapter"] and ("adapter", note["round"]) not in released:
            yield f"the adapter of round {note['round']} left without a row in the ledger"
    profiles = any(channel == "profile" for channel, _ in released)
    if any(note["what"] == "push" and note["profile"] for note in notes) and not profiles:
        yield "a task profile left without a charge"
    counted = ("profile", "adapter") if private else ("profile",)
    epsilon = bound_of(charges(rows, counted), 1e-5, "rdp").epsilon
    if abs(rows[-1].epsilon - epsilon) > 1e-9:
        yield f"the ledger says ε = {rows[-1].epsilon}, its charges make {epsilon}"


def _audit_differs(state: Path, rows: list[LedgerRow]) -> Iterator[str]:
    """A kill may take the line of a row that is in the ledger, and never the row of a line."""
    try:
        lines, torn = read_audit(state / AUDIT)
    except FedMosaicError as error:
        yield str(error)
        return
    if torn:
        yield "the audit log of a process that came to its end has a torn line"
    for line in lines:
        row = line.fields.get("row")
        if row is not None and (row >= len(rows) or rows[row].hash != line.fields["row_hash"]):
            yield f"row {row} of the audit log is not in the ledger"
    events = Counter(line.event for line in lines)
    told = sum("row" in line.fields for line in lines)
    if told < sum(row.channel is not None for row in rows) - events["started"]:
        yield f"the audit log has {told} rows of the ledger's {len(rows)}, more are lost than processes died"
