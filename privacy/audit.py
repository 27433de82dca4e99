"""The audit log of a server, a client or a witness: hash-chained JSON lines of what matters to security.

A line of STATE/audit.jsonl holds what `FIELDS` has for its event, and nothing else: no loss, count, score or
value. A killed process loses none. Events of `DURABLE`, none of which comes with every round, are on the disk
before the program goes on, the others with the next of these; a power cut can take them, but ledger and
database have them too. Whoever writes holds the state directory's lock.
"""

import argparse
import datetime as dt
import errno
import logging
import math
import os
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Annotated, Any, Final, Literal

from pydantic import Field, ValidationError, create_model, model_validator

from fedmosaic.privacy.configuration import FIRST_PREVIOUS_HASH, Frozen, canonical_json, chained_hash, misfit
from fedmosaic.privacy.files import naming, private_opener, sync_directory
from fedmosaic.protos import bounds
from fedmosaic.protos.errors import StateError

log = logging.getLogger(__name__)
AUDIT: Final = "audit.jsonl"
_WORD: Final = re.compile(r"^[A-Za-z_ -]{1,64}$")
_UNPRINTABLE: Final = re.compile(r"[^ -~]")
_SECONDS_BETWEEN_REFUSALS: Final = 60.0
_REFUSALS_KEPT: Final = 1000
_Hex64 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Word = Annotated[str, Field(pattern=_WORD)]
_Number = Annotated[int, Field(strict=True, ge=0)]
_UNSEEN: Final = (
    "Not shown: whether lines at the end were cut off. For that, ask with --holds for a hash that somebody "
    "else has kept: of a server's log server_head in a member's session.json, of a client's the hash of a "
    "row of its ledger, of any log the hash that an earlier check has printed."
)
_ROW: Final = {
    "channel": Literal["profile", "adapter", "family"],
    "round": _Number,
    "row": _Number,
    "row_hash": _Hex64,
}
_PART: Final = {"round": _Number, "client": bounds.Identifier, "section": Literal["shared", "family"]}
_JUDGED: Final = {"run": bounds.RunId, **_PART}
FIELDS: Final[dict[str, dict[str, Any]]] = {
    # A process begins, under a roster; `roster` tells that it is another than at the last start.
    "started": {"role": _Word, "name": bounds.Identifier, "federation": bounds.Identifier, "roster": _Hex64},
    "roster": {"before": _Hex64, "after": _Hex64},
    "enrolled": {"client": bounds.Identifier, "run": bounds.RunId, "round": _Number},
    "refused": {"who": Annotated[bounds.Text, Field(max_length=200)], "call": _Word, "reason": _Word},
    # The members of a key epoch have agreed on its key.
    "key-epoch": {"epoch": _Number, "members": bounds.Identifiers},
    # Rows of the privacy ledger.
    "charged": _ROW,
    "released": _ROW,
    "resent": _ROW,
    "budget-refused": _ROW,
    # Policy or witness give a recipient no aggregate; and what a client made of one: the name of an error, or
    # "taken".
    "withheld": _PART,
    "received": {"round": _Number, "section": _PART["section"], "outcome": _Word},
    # Hash chain over all uploads and aggregates of the run so far.
    "closed": {"round": _Number, "head": _Hex64},
    "countersigned": {**_JUDGED, "aggregate": _Hex64, "uploads": _Hex64},
    "not-countersigned": {**_JUDGED, "wrong": Literal["upload", "row", "sum"]},
    # The end of the file was no whole line, as a kill in the middle of a write leaves it; it was cut off.
    "repaired": {"lost_bytes": _Number},
}
DURABLE: Final = frozenset({"started", "roster", "key-epoch", "not-countersigned", "repaired"})
_EVENTS: Final = {
    name: create_model(name, __base__=Frozen, **{key: (kind, ...) for key, kind in fields.items()})  # type: ignore[call-overload]  # its overloads know no such dictionary
    for name, fields in FIELDS.items()
}


class AuditLine(Frozen):
    """One line of the log, a row of a chain."""

    sequence: int = Field(ge=0)
    time: str = Field(min_length=20, max_length=40)
    event: str
    fields: dict[str, Any]
    previous_hash: _Hex64
    hash: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")

    @model_validator(mode="after")
    def _allowed(self) -> "AuditLine":
        if self.event not in _EVENTS:
            raise ValueError(f"there is no event {self.event!r}")
        try:
            _EVENTS[self.event].model_validate(self.fields)
        except ValidationError as error:
            raise ValueError(f"{self.event}.{_first(error)}") from None
        return self

    def computed_hash(self) -> str:
        """SHA-256 over the previous hash and the canonical JSON of everything but `hash`."""
        content = self.model_dump(mode="json", exclude={"hash"})
        return chained_hash(self.previous_hash, canonical_json(content))


class AuditLog:
    """The log in a state directory whose lock the caller holds; the first event opens the file."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / AUDIT
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._next = 0
        self._head = FIRST_PREVIOUS_HASH
        self._roster = ""
        self._refusals: dict[tuple[str, str, str], float] = {}

    def add(self, event: str, **fields: Any) -> None:
        """Write an event with its fields, as `FIELDS` has them; StateError if the log is damaged."""
        with self._lock, naming(self._path):
            file = self._file or self._open()
            if event == "started" and self._roster not in ("", fields["roster"]):
                self._write(file, "roster", {"before": self._roster, "after": fields["roster"]})
            self._write(file, event, fields)
            if event in DURABLE:
                os.fsync(file.fileno())

    def refused(self, who: str, call: str, reason: str) -> bool:
        """Note a refusal; the same one once a minute at most, so that nobody fills the disk.

        Returns whether it was the first within its minute.
        """
        key, now = (who, call, reason), time.monotonic()
        if now - self._refusals.get(key, -math.inf) < _SECONDS_BETWEEN_REFUSALS:
            return False
        if len(self._refusals) >= _REFUSALS_KEPT:
            self._refusals.clear()
        self._refusals[key] = now
        word = reason if _WORD.fullmatch(reason) else "OTHER"
        try:
            self.add("refused", who=_UNPRINTABLE.sub("?", who)[:200], call=call, reason=word)
        except OSError as error:  # a disk that is full is no reason not to refuse
            log.error("the audit log takes nothing: %s", error)
        return True

    def close(self) -> None:
        """Have every line on the disk, and let go of the file."""
        with self._lock:
            if self._file is not None:
                os.fsync(self._file.fileno())
                self._file.close()
            self._file = None

    def _open(self) -> IO[bytes]:
        lines, torn = read_audit(self._path) if self._path.exists() else ([], 0)
        for line in lines:
            self._follow(line)
        file = open(self._path, "ab", buffering=0, opener=private_opener)
        if not lines:
            sync_directory(self._path.parent)
        if torn:
            file.truncate(os.fstat(file.fileno()).st_size - torn)
            self._write(file, "repaired", {"lost_bytes": torn})
            log.warning("%s: the last line was torn; it was cut off, and the log says so", self._path)
        self._file = file
        return file

    def _write(self, file: IO[bytes], event: str, fields: dict[str, Any]) -> None:
        now = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
        line = AuditLine(sequence=self._next, time=now, event=event, fields=fields, previous_hash=self._head)
        line = line.model_copy(update={"hash": line.computed_hash()})
        content = canonical_json(line.model_dump(mode="json")).encode() + b"\n"
        before = os.fstat(file.fileno()).st_size
        try:
            if file.write(content) != len(content):  # a disk that is nearly full takes a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        except OSError:
            file.truncate(before)
            raise
        self._follow(line)

    def _follow(self, line: AuditLine) -> None:
        self._next, self._head = line.sequence + 1, line.hash
        self._roster = line.fields.get("roster", self._roster)


def read_audit(path: Path) -> tuple[list[AuditLine], int]:
    """All whole lines of an audit log and the bytes of a torn one; StateError names the first broken line."""
    *whole, torn = path.read_bytes().split(b"\n")
    lines: list[AuditLine] = []
    for index, content in enumerate(whole):
        try:
            line = AuditLine.model_validate_json(content)
            reason = misfit(line, index, lines[-1].hash if lines else FIRST_PREVIOUS_HASH)
        except ValidationError as error:
            reason = _first(error)
        if reason:
            raise StateError(
                f"{path}: line {index + 1} is broken: {reason}. What follows cannot be trusted: keep the "
                "file as it is, move it away, and a new one begins"
            )
        lines.append(line)
    return lines, len(torn)


def _first(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, problem['loc'])) or 'it'}: {problem['msg']}"


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic audit` with its arguments."""
    parser = argparse.ArgumentParser(prog="fedmosaic audit", description="Check an audit log.")
    verify = parser.add_subparsers(required=True).add_parser(
        "verify",
        help="check every line, and that each follows the one before",
        epilog=_UNSEEN,
    )
    verify.add_argument("state", type=Path, help="state directory of a server, a client or a witness")
    verify.add_argument(
        "--holds", metavar="HASH", help="a hash that somebody else has kept; fails without it"
    )
    parsed = parser.parse_args(arguments)
    path = parsed.state / AUDIT
    if not path.is_file():
        raise StateError(f"{path}: there is no audit log; give the state directory of a server or client")
    lines, torn = read_audit(path)
    if lines:
        print(f"{path}: {len(lines)} lines from {lines[0].time} to {lines[-1].time}, unbroken")
        print(f"hash of line {len(lines)}: {lines[-1].hash}")
    if parsed.holds:
        kept = next((line for line in lines if parsed.holds in (line.hash, *line.fields.values())), None)
        if kept is None:
            raise StateError(
                f"{path}: no line has {parsed.holds}: the end was cut off, a crash came before the line was "
                "written, or it is of another log"
            )
        print(f"line {kept.sequence + 1} ({kept.event}) has {parsed.holds}: nothing before it was cut off")
    print(_UNSEEN)
    if torn:
        raise StateError(
            f"{path}: line {len(lines) + 1} is torn after {torn} bytes: it is being written, or a process "
            "was killed while it was; the next start cuts it off and notes that"
        )
    return 0
