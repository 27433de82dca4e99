"""What there is to see of a server: its database, its state folder and its audit log, as they are now."""

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from os import SEEK_END
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError
from pydantic_core import from_json

from fedmosaic.privacy.audit import AUDIT, AuditLine
from fedmosaic.privacy.configuration import Frozen, read_own
from fedmosaic.privacy.federation.identity import read_certificate
from fedmosaic.privacy.statement import plain
from fedmosaic.privacy.statement.check import check_received
from fedmosaic.privacy.statement.models import Adversary, Guarantee
from fedmosaic.protos.bounds import MAX_MEMBERS
from fedmosaic.protos.errors import PrivacyError, StateError
from fedmosaic.protos.messages import Phase
from fedmosaic.server.round.relations import matrix, unpack
from fedmosaic.server.settings import ServerSettings
from fedmosaic.server.storage.blobs import WHOLE, blob_path
from fedmosaic.server.storage.store import Store, default_url
from fedmosaic.server.summary import STATUS, STATUS_SECONDS

_ROUNDS_SHOWN: Final = 20
_EVENTS_SHOWN: Final = 50
_MEMBERS_COMPARED: Final = 40


class Status(Frozen):
    """`status.json`: what the server waits for; times in seconds since 1970."""

    at: float
    round: int
    phase: Phase
    arrived: tuple[str, ...]
    waiting_for: tuple[str, ...]
    until: float | None
    message: str


@dataclass(frozen=True)
class Snapshot:
    """A server at one moment.

    Attributes:
        now: seconds since 1970.
        settings: of the run.
        run: id of the run, and when it began.
        status: what the server said last; None before its first word.
        enrolled: members that have ever enrolled.
        rounds: what was recorded of the last rounds, the newest first.
        compared: names, their similarity (None where nothing is known), and the round that brought it.
        traffic: bytes received from and sent to every member.
        reported: what the statement of a member says of everything that it sent, by adversary; None where it
            cannot be shown.
        events: of the audit log, the newest first; a line that cannot be read is None.
        refused: how often every reason is in the audit log.
        expires: when the server's certificate does, in seconds since 1970; None without one.
    """

    now: float
    settings: ServerSettings
    run: Mapping[str, Any]
    status: Status | None
    enrolled: frozenset[str]
    rounds: list[dict[str, Any]]
    compared: tuple[list[str], list[list[float | None]], int] | None
    traffic: Mapping[str, Mapping[str, int]]
    reported: Mapping[str, Mapping[Adversary, Guarantee] | None]
    events: list[AuditLine | None]
    refused: Mapping[str, int]
    expires: float | None

    @property
    def silent_seconds(self) -> float | None:
        """Since when the server has said nothing, if that is longer than one that lives does."""
        age = None if self.status is None else self.now - self.status.at
        return age if age is not None and age > 3 * STATUS_SECONDS else None

    @property
    def withheld(self) -> list[tuple[str, str]]:
        """Who got no aggregate in these rounds, and why, the newest first."""
        told = (each for found in self.rounds for each in found["refusals"].values())
        return list(islice(chain.from_iterable(each.items() for each in told), _EVENTS_SHOWN))


class Records:
    """Reads the state of a server; not safe for threads."""

    def __init__(self, settings: Callable[[], ServerSettings]) -> None:
        """Prepare; `settings` is asked again at every look, since a new roster may be installed.

        Raises:
            StateError: the server has not begun a run there.
        """
        self._settings = settings
        found = settings()
        self._events = Events(found.state_dir / AUDIT)
        try:
            self._store = Store(found.store_url or default_url(found.state_dir), durable=True, reading=True)
            if self._store.get("run") is None:
                raise StateError(f"there is no run in {found.state_dir} yet")
        except StateError as error:
            raise StateError(f"{error}; start the server first") from None

    def look(self) -> Snapshot:
        """The server as it is now; StateError if its state is damaged."""
        settings, store = self._settings(), self._store
        run, tls = store.get_json("run"), settings.tls
        certificate = None if tls is None else read_certificate(tls.certificate)
        reports = sorted(store.reports().items())
        reported = {client: _joint(content, client, str(run["id"])) for client, content in reports}
        here = int(store.get_json("round") or 1)
        results = store.results(after=here - 1 - _ROUNDS_SHOWN)[::-1]
        self._events.read()
        return Snapshot(
            now=time.time(),
            settings=settings,
            run=run,
            status=read_own(settings.state_dir / STATUS, Status.model_validate, "the server writes it anew"),
            enrolled=store.enrolled() & settings.members.keys(),
            rounds=results,
            compared=_compared(settings.state_dir, results),
            traffic=store.traffic(settings.members),
            reported=reported,
            events=list(self._events.latest),
            refused=self._events.refused,
            expires=None if certificate is None else certificate.not_valid_after_utc.timestamp(),
        )


class Events:
    """Follows an audit log; whether its chain is whole is for `fedmosaic audit verify` to say."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start()

    def _start(self) -> None:
        self._read = 0
        self.latest: deque[AuditLine | None] = deque(maxlen=_EVENTS_SHOWN)
        self.refused: Counter[str] = Counter()

    def read(self) -> None:
        """Take what is new; from the beginning where another file stands there now."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            if file.seek(0, SEEK_END) < self._read:
                self._start()
            file.seek(self._read)
            for content in file:
                if not content.endswith(b"\n"):
                    break
                self._read += len(content)
                self._take(content)

    def _take(self, content: bytes) -> None:
        try:
            line = AuditLine.model_validate_json(content)
        except ValidationError:
            self.latest.appendleft(None)
            return
        self.latest.appendleft(line)
        if line.event == "refused":
            self.refused[line.fields["reason"]] += 1


@lru_cache(maxsize=MAX_MEMBERS)
def _joint(content: bytes, client: str, run_id: str) -> Mapping[Adversary, Guarantee] | None:
    """What a statement says of everything that its client sent; None if it cannot be shown."""
    try:
        statement = check_received(from_json(content, allow_inf_nan=False), client, run_id)
    except (ValueError, PrivacyError):  # an older server took any
        return None
    return plain.joint(statement.clients[0])


def _compared(
    state_dir: Path, results: list[dict[str, Any]]
) -> tuple[list[str], list[list[float | None]], int] | None:
    number = results[0].get("relations", 0) if results else 0
    path = blob_path(state_dir, "relations", number, WHOLE)
    if not path.exists():
        return None
    names, similarity, _ = unpack(path.read_bytes(), path)
    most = _MEMBERS_COMPARED
    return names[:most], matrix(similarity[:most, :most]), number
