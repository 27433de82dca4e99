"""The server's account of a run: `run.json` in its state folder, and a file per closed round in `rounds`.

`status.json` is what the dashboard shows of the moment: whom the server waits for, and until when.

`rounds/000003.json` is written once; similarity and weights stand in the file of `relations` that it names.
There is no key and no payload in it. Nothing here stops a round or an answer: what cannot be written now is
written later.
"""

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from fedmosaic import __version__
from fedmosaic.privacy.federation.identity import read_certificate
from fedmosaic.privacy.files import private_directory, write_atomically
from fedmosaic.protos.bounds import MAX_ROUNDS
from fedmosaic.protos.errors import IdentityError, StateError
from fedmosaic.protos.messages import PROTOCOL_VERSION, RoundStatus
from fedmosaic.server.round.relations import matrix, shares, unpack
from fedmosaic.server.round.state import Round
from fedmosaic.server.settings import ServerSettings
from fedmosaic.server.storage.blobs import WHOLE, blob_path
from fedmosaic.server.storage.store import Store

log = logging.getLogger(__name__)
FILE = "run.json"
ROUNDS = "rounds"
STATUS = "status.json"
STATUS_SECONDS = 10.0
"""`status.json` of a server that lives is hardly older; of what is new it tells within a second or two."""
_SECONDS_COUNTED = 5.0
"""How long bytes are counted in memory; a killed server forgets so much of the statistics."""


class Account:
    """Bytes that are not in the database yet, and whether the account is older than the store."""

    def __init__(self, settings: ServerSettings, store: Store) -> None:
        self.settings = settings
        self._store = store
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._flushing = threading.Lock()
        self._stored = time.monotonic()
        self._counted: dict[str, tuple[int, int]] = {}
        self.failure: OSError | StateError | None = None  # why it could not be written when it last was due
        self._recorded = 0
        self._received: Counter[str] = Counter()
        self._told: tuple[object, ...] = ()
        self._told_at = -STATUS_SECONDS
        self.due = True  # a killed server may have owed one

    def count(self, client: str, received: int, sent: int) -> None:
        """Add to the bytes that were received from and sent to a client; stored with the next summary."""
        with self._lock:
            before = self._counted.get(client, (0, 0))
            self._counted[client] = (before[0] + received, before[1] + sent)

    def flush(self) -> None:
        """Store what was counted; StateError if the database cannot take it now, and it is kept."""
        with self._flushing:
            with self._lock:
                counted, self._counted = self._counted, {}
            try:
                if counted:
                    self._store.add_traffic(counted)
            except StateError:
                for client, (received, sent) in counted.items():
                    self.count(client, received, sent)
                raise
            self._stored = time.monotonic()

    def keep_up(self, state: Round) -> None:
        """Write the account if it is due, and now and then what was counted; say once if that fails."""
        try:
            if self.due:
                self.due = False  # before it is made: what comes meanwhile is due again
                with self._writing:
                    self._record_rounds()
                    self.flush()
                    content = summarise(self.settings, self._store, state, self._received)
                    write_summary(self.settings.state_dir, content)
            elif time.monotonic() - self._stored > _SECONDS_COUNTED:
                self.flush()
        except (OSError, StateError) as error:
            self.due = True
            if self.failure is None:
                log.error("%s cannot be written, trying again: %s", FILE, error)
            self.failure = error
        else:
            self.failure = None

    def show(self, describe: Callable[[], RoundStatus]) -> None:
        """Write `status.json` if something in it is new, or it is old; no fault of it stops anything."""
        now = time.monotonic()
        if now - self._told_at < 1.0:
            return
        try:
            status = describe()
            told = (status.round, status.phase, status.arrived, status.waiting_for)
            if told == self._told and now - self._told_at < STATUS_SECONDS:
                return
            self._told, self._told_at = told, now
            content = {
                "at": time.time(),
                "round": status.round,
                "phase": status.phase.value,
                "arrived": status.arrived,
                "waiting_for": status.waiting_for,
                "until": time.time() + status.seconds_left if status.seconds_left else None,
                "message": status.message,
            }
            write_summary(self.settings.state_dir, content, STATUS)
        except Exception:  # what is told to the dashboard may fail; the round must not
            self._told_at = now
            log.exception("%s cannot be written, trying again", STATUS)

    def _record_rounds(self) -> None:
        """Write the file of every closed round that has none yet, and count who received."""
        folder = self.settings.state_dir / ROUNDS
        private_directory(folder)
        for result in self._store.results(after=self._recorded):
            path = folder / f"{result['round']:06d}.json"
            if not path.exists():
                write_atomically(path, json.dumps(result).encode() + b"\n", durable=False)
            self._received.update(receivers(self.settings, result))
            self._recorded = result["round"]

    def whole(self, state: Round) -> dict[str, object]:
        """`run.json` with all that is kept of the rounds in it, as `with_rounds` gives it."""
        self.flush()
        results = self._store.results()
        received = Counter(name for result in results for name in receivers(self.settings, result))
        flat = summarise(self.settings, self._store, state, received)
        return {**flat, "results": _with_relations(results, self.settings.state_dir)}


def receivers(settings: ServerSettings, result: Mapping[str, Any]) -> set[str]:
    """Who could go on with what this round made; but for a sum, what the last one made is for nobody."""
    last = settings.terms.schedule.rounds
    if result["round"] >= last and not settings.terms.adapter.in_group_sums:
        return set()
    by_label = result.get("weights", {})  # of an older program
    return set(result.get("received", [name for rows in by_label.values() for name in rows]))


def with_rounds(run: Mapping[str, Any], state_dir: Path) -> dict[str, Any]:
    """All that is kept of a run's rounds under `results`; StateError if a file is missing or damaged."""
    if "results" in run:  # an older program had all in one file
        return dict(run)
    results = []
    for path in sorted((state_dir / ROUNDS).glob("*.json")):
        try:
            result = dict(json.loads(path.read_bytes()))
            number = result.get("relations", 0)
            if not isinstance(number, int) or not 0 <= number <= MAX_ROUNDS:
                raise ValueError("relations is no number of a round")
            results.append(result)
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise StateError(
                f"{path} cannot be read ({error}); delete it and start the server again, which writes it anew"
            ) from None
    return {**run, "results": _with_relations(results, state_dir)}


def _with_relations(results: Sequence[dict[str, Any]], state_dir: Path) -> list[dict[str, Any]]:
    """Results with similarity and weights, which rounds share where nothing was new."""
    found: dict[int, dict[str, object]] = {}
    for number in {result["relations"] for result in results if "relations" in result}:
        path = blob_path(state_dir, "relations", number, WHOLE)
        _, similarity, rows = unpack(path.read_bytes() if path.exists() else b"", path)
        found[number] = {"similarity": matrix(similarity), "weights": shares(rows)}
    return [{**result, **found.get(result.get("relations", 0), {})} for result in results]


def last_words(settings: ServerSettings, store: Store) -> tuple[list[str], bool]:
    """What to say when a run is over, and whether anybody received anything."""
    results, reports = store.results(), store.reports().keys()
    counted = Counter(name for result in results for name in receivers(settings, result))
    received = {name: counted[name] for name in sorted(settings.members)}
    uploads = sum(len(result["uploaded"]) for result in results)
    silent = ", ".join(sorted(store.enrolled() - reports))
    lines = [
        f"the run is over: {len(results)} rounds with {uploads} uploads; aggregates offered: "
        f"{', '.join(f'{name} {count}' for name, count in received.items())}; statements of "
        f"{len(reports)} members{f', none of {silent}' if silent else ''}; all of it is in "
        f"{settings.state_dir / FILE}"
    ]
    exchanged = any(received.values())
    if not exchanged:
        refusals = [
            why for result in results for told in result["refusals"].values() for why in told.values()
        ]
        alone = settings.terms.schedule.rounds == 1
        why = "One round is too few." if alone else "The log of every round says why."
        lines.append(
            "NOTHING WAS EXCHANGED: no member received anything from the others in any round, so all trained "
            f"alone. {f'The last reason: {refusals[-1]}' if refusals else why}"
        )
    return lines, exchanged


def summarise(
    settings: ServerSettings, store: Store, state: Round, received: Mapping[str, int]
) -> dict[str, object]:
    """What the server may tell of a run beside its rounds, of which the size does not depend; for JSON."""
    run = store.get_json("run") or {}
    statements, unreadable = _statements(store)
    return {
        "format": "fedmosaic/server-run/2",
        "software": f"fedmosaic {__version__}",
        "protocol_version": PROTOCOL_VERSION,
        "run_id": run.get("id", ""),
        "started_at": run.get("started_at"),
        "federation": settings.roster.federation,
        "roster_hash": settings.roster_hash.hex(),
        "certificate_expires": _expiry(settings),
        "members": sorted(settings.members),
        "backend": settings.terms.encryption.backend,
        "rounds": settings.terms.schedule.rounds,
        "phase": state.phase.value,
        "open_round": state.number,
        "relevance": settings.terms.relevance.model_dump(include={"similarity", "temperature"}),
        "policy": settings.terms.policy.model_dump(),
        "received_rounds": {name: received.get(name, 0) for name in sorted(settings.members)},
        "traffic": store.traffic(settings.members),
        "statements": statements,
        "unreadable_statements": unreadable,
    }


def _expiry(settings: ServerSettings) -> str | None:
    """When the server's certificate expires; None without one, or while it cannot be read."""
    with suppress(IdentityError):
        if settings.tls is not None:
            return read_certificate(settings.tls.certificate).not_valid_after_utc.isoformat()
    return None


def _statements(store: Store) -> tuple[dict[str, object], list[str]]:
    """Stored statements by client, and whose cannot be read: an older server took any JSON of any depth."""
    statements: dict[str, object] = {}
    unreadable = []
    for client, text in sorted(store.reports().items()):
        try:
            statements[client] = from_json(text, allow_inf_nan=False)
        except ValueError:
            unreadable.append(client)
    return statements, unreadable


def write_summary(state_dir: Path, summary: Mapping[str, object], file: str = FILE) -> None:
    """Replace `run.json`, or another file, so that a reader sees the old or the new one."""
    write_atomically(state_dir / file, json.dumps(summary, indent=1).encode() + b"\n", durable=False)
