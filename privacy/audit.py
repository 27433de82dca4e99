"""The audit log of a server, a client or a witness: hash-chained JSON lines of what matters to security.

    STATE/audit.jsonl     one line an event; each has the hash of the line before

A line holds what its event below has, and nothing else: never a loss, a count of examples, a score, a value.
A line is handed to the operating system before the program goes on, so a killed process loses none; those of
`DURABLE` are on the disk by then. The others get there with the next of these, or at the end: a power cut can
take them, and what they tell is on record elsewhere (privacy ledger, database).

Whoever writes holds the state directory's lock, so there is one writer.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Annotated, Final, Literal

from pydantic import Field, ValidationError

from fedmosaic import __version__
from fedmosaic.privacy.chain import FIRST_PREVIOUS_HASH, chained_hash, misfit
from fedmosaic.privacy.configuration import Frozen, canonical_json
from fedmosaic.privacy.files import naming, private_opener, sync_directory
from fedmosaic.protos import bounds
from fedmosaic.protos.errors import StateError

log = logging.getLogger(__name__)
AUDIT: Final = "audit.jsonl"
_Hex64 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Round = Annotated[int, Field(ge=0, le=bounds.MAX_ROUNDS + 1)]
_Section = Literal["shared", "family"]
_Channel = Literal["profile", "adapter", "family"]
_WORD: Final = re.compile(r"^[A-Za-z_ -]{1,64}$")
_UNPRINTABLE: Final = re.compile(r"[^ -~]")
_Word = Annotated[str, Field(pattern=_WORD)]
_SECONDS_BETWEEN_REFUSALS: Final = 60.0
_REFUSALS_KEPT: Final = 1000


class Started(Frozen):
    """A process begins, under a roster."""

    kind: Literal["started"] = "started"
    role: Literal["server", "client", "witness"]
    name: bounds.Identifier
    federation: bounds.Identifier
    roster: _Hex64
    software: Annotated[str, Field(max_length=32)] = __version__


class RosterChanged(Frozen):
    """The roster is another one than at the last line that named one."""

    kind: Literal["roster-changed"] = "roster-changed"
    before: _Hex64
    after: _Hex64


class Joined(Frozen):
    """A client enrolled in a run: at the server, or this one."""

    kind: Literal["enrolled"] = "enrolled"
    client: bounds.Identifier
    run: bounds.RunId
    round: _Round


class Refused(Frozen):
    """The server refused a call: of `who` at the server, of this client at a client."""

    kind: Literal["refused"] = "refused"
    who: Annotated[bounds.Text, Field(max_length=200)]
    call: _Word
    reason: _Word


class KeyEpoch(Frozen):
    """The members of a key epoch agreed on its key; at a client, the epoch that it seals under."""

    kind: Literal["key-epoch"] = "key-epoch"
    epoch: bounds.KeyEpoch
    members: bounds.Identifiers


class Charged(Frozen):
    """The privacy ledger holds a charge, a release, a repetition or a refusal by the budget: its row."""

    kind: Literal["charged", "released", "resent", "budget-refused"]
    channel: _Channel
    round: _Round
    row: Annotated[int, Field(ge=0)]
    row_hash: _Hex64


class Withheld(Frozen):
    """The policy, or the witness, gives a recipient no aggregate."""

    kind: Literal["withheld"] = "withheld"
    client: bounds.Identifier
    round: _Round
    section: _Section


class RoundClosed(Frozen):
    """The server closed a round; `head` is its hash chain over all uploads and aggregates so far."""

    kind: Literal["round-closed"] = "round-closed"
    round: _Round
    head: _Hex64


class Received(Frozen):
    """What a client made of an aggregate: it was taken, or it was refused, by the name of an error."""

    kind: Literal["received"] = "received"
    round: _Round
    section: _Section
    outcome: _Word


class Countersigned(Frozen):
    """The witness countersigned an aggregate."""

    kind: Literal["countersigned"] = "countersigned"
    run: bounds.RunId
    round: _Round
    client: bounds.Identifier
    section: _Section
    aggregate: _Hex64
    uploads: _Hex64


class NotCountersigned(Frozen):
    """The witness did not, for what it found wrong."""

    kind: Literal["not-countersigned"] = "not-countersigned"
    run: bounds.RunId
    round: _Round
    client: bounds.Identifier
    section: _Section
    wrong: Literal["upload", "row", "sum"]


class Repaired(Frozen):
    """The end of the file was no whole line, as a kill in the middle of a write leaves it; it was cut off."""

    kind: Literal["repaired"] = "repaired"
    lost_bytes: Annotated[int, Field(ge=1)]


Event = (
    Started | RosterChanged | Joined | Refused | KeyEpoch | Charged | Withheld | RoundClosed | Received
    | Countersigned | NotCountersigned | Repaired
)  # fmt: skip
DURABLE: Final = (Started, RosterChanged, KeyEpoch, NotCountersigned, Repaired)
"""Events whose line is on the disk before the program goes on: none of them comes with every round."""


class AuditLine(Frozen):
    """One line of the log; see `fedmosaic.privacy.chain.ChainedRow`."""

    sequence: int = Field(ge=0)
    time: str = Field(min_length=20, max_length=40)
    event: Annotated[Event, Field(discriminator="kind")]
    previous_hash: _Hex64
    hash: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")

    def computed_hash(self) -> str:
        """SHA-256 over the previous hash and the canonical JSON of everything but `hash`."""
        content = self.model_dump(mode="json", exclude={"hash"})
        return chained_hash(self.previous_hash, canonical_json(content))


class AuditLog:
    """The log in a state directory whose lock the caller holds; the file is touched by the first event."""

    def __init__(
        self, directory: Path, clock: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC)
    ) -> None:
        self._path = directory / AUDIT
        self._clock = clock
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._next = 0
        self._head = FIRST_PREVIOUS_HASH
        self._roster = ""
        self._refusals: dict[tuple[str, str, str], float] = {}

    def add(self, event: Event) -> None:
        """Write an event; see the module for when it is durable.

        Raises:
            StateError: the log is damaged.
        """
        with self._lock, naming(self._path):
            file = self._file or self._open()
            if isinstance(event, Started) and self._roster not in ("", event.roster):
                self._write(file, RosterChanged(before=self._roster, after=event.roster))
            self._write(file, event)
            if isinstance(event, DURABLE):
                os.fsync(file.fileno())

    def refused(self, who: str, call: str, reason: str) -> None:
        """Note a refusal; the same one once a minute at most, so that nobody fills the disk."""
        key, now = (who, call, reason), time.monotonic()
        if now - self._refusals.get(key, -math.inf) < _SECONDS_BETWEEN_REFUSALS:
            return
        if len(self._refusals) >= _REFUSALS_KEPT:
            self._refusals.clear()
        self._refusals[key] = now
        word = reason if _WORD.fullmatch(reason) else "OTHER"
        self.add(Refused(who=_UNPRINTABLE.sub("?", who)[:200], call=call, reason=word))

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
            self._write(file, Repaired(lost_bytes=torn))
            log.warning("%s: the last line was torn; it was cut off, and the log says so", self._path)
        self._file = file
        return file

    def _write(self, file: IO[bytes], event: Event) -> None:
        now = self._clock().astimezone(dt.UTC).isoformat(timespec="milliseconds")
        line = AuditLine(sequence=self._next, time=now, event=event, previous_hash=self._head)
        line = line.model_copy(update={"hash": line.computed_hash()})
        content = canonical_json(line.model_dump(mode="json")).encode() + b"\n"
        before = os.fstat(file.fileno()).st_size
        try:
            written = file.write(content)
        except OSError:
            file.truncate(before)
            raise
        if written != len(content):  # a disk that is nearly full takes a part
            file.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        self._follow(line)

    def _follow(self, line: AuditLine) -> None:
        self._next, self._head = line.sequence + 1, line.hash
        if isinstance(line.event, Started):
            self._roster = line.event.roster
        elif isinstance(line.event, RosterChanged):
            self._roster = line.event.after


def read_audit(path: Path) -> tuple[list[AuditLine], int]:
    """All whole lines of an audit log, verified, and the bytes of a torn one after them.

    Raises:
        StateError: names the first line that is broken, and why.
    """
    *whole, torn = path.read_bytes().split(b"\n")
    lines: list[AuditLine] = []
    for index, content in enumerate(whole):
        try:
            line = AuditLine.model_validate_json(content)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, problem["loc"]))
            raise _broken(path, index, f"{where or 'it'}: {problem['msg']}") from None
        if reason := misfit(line, index, lines[-1].hash if lines else FIRST_PREVIOUS_HASH):
            raise _broken(path, index, reason)
        lines.append(line)
    return lines, len(torn)


def _broken(path: Path, index: int, reason: str) -> StateError:
    return StateError(
        f"{path}: line {index + 1} is broken: {reason}. What follows cannot be trusted: keep the file as it "
        "is, move it away, and a new one begins"
    )


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic audit` with its arguments."""
    parser = argparse.ArgumentParser(prog="fedmosaic audit", description="Check an audit log.")
    verify = parser.add_subparsers(required=True).add_parser(
        "verify",
        help="check every line, and that each follows the one before",
        epilog="A chain does not show that its end was cut off: note the hash that is printed.",
    )
    verify.add_argument("state", type=Path, help="state directory of a server, a client or a witness")
    path = parser.parse_args(arguments).state / AUDIT
    if not path.is_file():
        raise StateError(f"{path}: there is no audit log; give the state directory of a server or client")
    lines, torn = read_audit(path)
    if lines:
        print(f"{path}: {len(lines)} lines from {lines[0].time} to {lines[-1].time}, unbroken")
        print(f"hash of line {len(lines)}: {lines[-1].hash}")
    if torn:
        raise StateError(
            f"{path}: line {len(lines) + 1} is torn after {torn} bytes: it is being written, or a process "
            "was killed while it was; the next start cuts it off and notes that"
        )
    return 0
