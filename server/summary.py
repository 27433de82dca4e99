"""The server's account of a run, `run.json` in its state folder. It holds no key and no payload.

Nothing here stops a round or an answer: what cannot be written now is written later.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from fedmosaic import __version__
from fedmosaic.privacy.federation.identity import read_certificate
from fedmosaic.privacy.files import write_atomically
from fedmosaic.protos.errors import IdentityError, StateError
from fedmosaic.protos.messages import PROTOCOL_VERSION
from fedmosaic.server.round.state import Round
from fedmosaic.server.settings import ServerSettings
from fedmosaic.server.storage.store import Store

log = logging.getLogger(__name__)
FILE = "run.json"
_SECONDS_COUNTED = 5.0
"""How long bytes are counted in memory; a killed server forgets so much of the statistics."""


class Account:
    """Bytes that are not in the database yet, and whether `run.json` is older than the store."""

    def __init__(self, state_dir: Path, store: Store) -> None:
        self._state_dir = state_dir
        self._store = store
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._flushing = threading.Lock()
        self._stored = time.monotonic()
        self._counted: dict[str, tuple[int, int]] = {}
        self._failing = False
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

    def keep_up(self, summarise: Callable[[], Mapping[str, object]]) -> None:
        """Write `run.json` if it is due, and now and then what was counted; say once if that fails."""
        try:
            if self.due:
                self.due = False  # before it is made: what comes meanwhile is due again
                with self._writing:
                    write_summary(self._state_dir, summarise())
            elif time.monotonic() - self._stored > _SECONDS_COUNTED:
                self.flush()
        except (OSError, StateError) as error:
            self.due = True
            if not self._failing:
                log.error("%s cannot be written, trying again: %s", FILE, error)
            self._failing = True
        else:
            self._failing = False


def received_rounds(settings: ServerSettings, results: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """In how many rounds each member could begin with an aggregate; what the last one made is for nobody."""
    counts = dict.fromkeys(sorted(settings.members), 0)
    for result in results:
        handed = {name for rows in result["weights"].values() for name in rows}
        if result["round"] < settings.rounds:
            for name in handed & counts.keys():
                counts[name] += 1
    return counts


def last_words(settings: ServerSettings, store: Store) -> tuple[list[str], bool]:
    """What to say when a run is over, and whether anybody received anything."""
    results, reports = store.results(), store.reports().keys()
    received = received_rounds(settings, results)
    uploads = sum(len(result["uploaded"]) for result in results)
    silent = ", ".join(sorted(store.enrolled() - reports))
    lines = [
        f"the run is over: {len(results)} rounds with {uploads} uploads; rounds begun with an aggregate: "
        f"{', '.join(f'{name} {count}' for name, count in received.items())}; statements of "
        f"{len(reports)} members{f', none of {silent}' if silent else ''}; all of it is in "
        f"{settings.state_dir / FILE}"
    ]
    exchanged = any(received.values())
    if not exchanged:
        refusals = [
            why for result in results for told in result["refusals"].values() for why in told.values()
        ]
        lines.append(
            "NOTHING WAS EXCHANGED: no member received anything from the others in any round, so all trained "
            f"alone. {f'The last reason: {refusals[-1]}' if refusals else 'One round is too few.'}"
        )
    return lines, exchanged


def summarise(settings: ServerSettings, store: Store, state: Round) -> dict[str, object]:
    """Everything that the server knows of a run and may tell; JSON-compatible."""
    run, results = store.get_json("run") or {}, store.results()
    statements, unreadable = _statements(store)
    return {
        "format": "fedmosaic/server-run/1",
        "software": f"fedmosaic {__version__}",
        "protocol_version": PROTOCOL_VERSION,
        "run_id": run.get("id", ""),
        "started_at": run.get("started_at"),
        "federation": settings.federation,
        "roster_hash": settings.roster_hash.hex(),
        "certificate_expires": _expiry(settings),
        "members": sorted(settings.members),
        "backend": settings.encryption.backend,
        "rounds": settings.rounds,
        "phase": state.phase.value,
        "open_round": state.number,
        "relevance": {"similarity": settings.similarity, "temperature": settings.temperature},
        "policy": settings.policy.model_dump(),
        "results": results,
        "received_rounds": received_rounds(settings, results),
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


def write_summary(state_dir: Path, summary: Mapping[str, object]) -> None:
    """Replace `run.json`, so that a reader sees the old or the new one."""
    content = json.dumps(summary, indent=1).encode() + b"\n"
    write_atomically(state_dir / FILE, content, durable=False)
