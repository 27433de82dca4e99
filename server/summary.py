"""The server's account of a run, `run.json` in its state folder. It holds no key and no payload."""

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic_core import from_json

from fedmosaic import __version__
from fedmosaic.privacy.files import write_atomically
from fedmosaic.protos.messages import PROTOCOL_VERSION
from fedmosaic.server.rounds import Round
from fedmosaic.server.settings import ServerSettings
from fedmosaic.server.store import Store

FILE = "run.json"


def summarise(settings: ServerSettings, store: Store, state: Round) -> dict[str, object]:
    """Everything that the server knows of a run and may tell.

    Args:
        settings: of the run.
        store: of the run.
        state: where the run is.

    Returns:
        JSON-compatible data.
    """
    run = json.loads(store.get("run") or "{}")
    statements, unreadable = _statements(store)
    return {
        "format": "fedmosaic/server-run/1",
        "software": f"fedmosaic {__version__}",
        "protocol_version": PROTOCOL_VERSION,
        "run_id": run.get("id", ""),
        "started_at": run.get("started_at"),
        "federation": settings.federation,
        "roster_hash": settings.roster_hash.hex(),
        "members": sorted(settings.members),
        "backend": settings.encryption.backend,
        "rounds": settings.rounds,
        "phase": state.phase.value,
        "open_round": state.number,
        "relevance": {"similarity": settings.similarity, "temperature": settings.temperature},
        "policy": settings.policy.model_dump(),
        "results": store.results(),
        "traffic": store.traffic(settings.members),
        "statements": statements,
        "unreadable_statements": unreadable,
    }


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
