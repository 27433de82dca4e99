"""Begin a run or go on with a stored one; and where an upload is sent to."""

import json
import logging
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

from fedmosaic.protos.errors import StateError
from fedmosaic.protos.messages import Phase
from fedmosaic.server import rounds
from fedmosaic.server.key_relay import KeyRelay
from fedmosaic.server.settings import ServerSettings
from fedmosaic.server.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ticket:
    """An upload that may be sent.

    Attributes:
        spool: file to append its sections to, laid end to end.
        received: bytes that are there already.
        size: bytes when complete.
        content_hash: digest of the upload.
    """

    spool: Path
    received: int
    size: int
    content_hash: bytes


def open_run(settings: ServerSettings, store: Store) -> str:
    """Id of the stored run, which must fit the settings, or of a new one.

    Raises:
        StateError: the stored run has other terms.
    """
    terms = {
        "federation": settings.federation,
        "adapter": sorted(h.hex() for h in settings.adapter_spec_hashes),
        "profile": settings.profile_dimensions,
        "encryption": settings.encryption.digest().hex(),
    }
    stored = store.get("run")
    if stored is None:
        run_id = uuid.uuid4().hex
        store.put(
            {
                "run": json.dumps({"id": run_id, "started_at": time.time(), "terms": terms}),
                "roster": settings.roster_hash.hex(),
                "round": "1",
                "absent": "[]",
            }
        )
        log.info("run %s of federation %s begins", run_id, settings.federation)
        return run_id
    run = json.loads(stored)
    changed = [name for name, value in terms.items() if run["terms"].get(name) != value]
    if changed:
        raise StateError(
            f"{settings.state_dir} holds run {run['id']}, whose {' and '.join(changed)} differ from the "
            "settings; give the new run its own state_dir (and database), or restore the old settings"
        )
    if store.get("roster") != settings.roster_hash.hex():
        log.warning("the roster has changed; a new group key is agreed on before anybody encrypts again")
        store.put({"roster": settings.roster_hash.hex(), "rotate": "1"})
    return str(run["id"])


def resume_round(settings: ServerSettings, store: Store, keys: KeyRelay | None, now: float) -> rounds.Round:
    """The round that the stored run is in, with a full deadline ahead.

    Args:
        settings: of the run.
        store: of the run.
        keys: the key agreement, if anything is encrypted.
        now: seconds, in the clock of the rounds.
    """
    first = rounds.first_round(
        settings.members, settings.quorum, settings.rounds, settings.round_deadline_seconds, now
    )
    number = min(int(store.get("round") or "1"), settings.rounds + 1)
    stored = {c: u for c, u in store.uploads(number).items() if c in settings.members}
    state = rounds.resume_round(
        first,
        number,
        {client: upload.content_hash for client, upload in stored.items()},
        (client for client, upload in stored.items() if upload.sections),
        json.loads(store.get("absent") or "[]"),
    )
    if keys is not None and store.get("rotate") == "1":
        state = _under_new_roster(state, store, keys, now)
    elif keys is not None and keys.ready:
        state = replace(state, able=state.members & keys.holders)
    log.info("%s", rounds.describe(state, now).message)
    return state


def _under_new_roster(state: rounds.Round, store: Store, keys: KeyRelay, now: float) -> rounds.Round:
    """Nobody encrypts under the old key any more: change it now, or close the round with what is there."""
    if state.phase is Phase.OPEN and not state.contributors:
        keys.next_epoch(now)
        store.put({"rotate": "0"})
        return state
    # The uploads are under the old key. A round has one key, so the others wait for the next round.
    return replace(state, able=frozenset(state.arrived))
