"""Begin a run or go on with a stored one; and where an upload is sent to."""

import hashlib
import json
import logging
import struct
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fedmosaic.protos import bounds
from fedmosaic.protos.errors import StateError
from fedmosaic.protos.messages import Phase
from fedmosaic.server.keys.epoch import KeyEpoch
from fedmosaic.server.keys.relay import KeyRelay
from fedmosaic.server.round import state as rounds
from fedmosaic.server.settings import ServerSettings
from fedmosaic.server.storage.store import Store, StoredAggregate

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


def open_run(settings: ServerSettings, store: Store, *, new: bool) -> str:
    """Id of the stored run, which must fit the settings, or of a new one where one may begin (`new`).

    Raises:
        StateError: the stored run has other terms, or is missing.
    """
    terms = {
        "federation": settings.federation,
        "adapter": sorted(h.hex() for h in settings.adapter_spec_hashes),
        "profile": settings.profile_dimensions,
        "encryption": settings.encryption.digest().hex(),
    }
    run = store.get_json("run")
    if run is None and not new:
        raise StateError(
            f"{settings.state_dir} holds payloads of a run that its database does not know; restore a backup "
            "of both together, or give a new run its own state_dir (and database)"
        )
    if run is None:
        return _begin_run(settings, store, terms)
    try:
        run_id, agreed = str(run["id"]), dict(run["terms"])
    except (KeyError, TypeError, ValueError):
        raise StateError(
            f"the database of {settings.state_dir} is damaged: it does not say which run it holds; restore a "
            "backup of both together"
        ) from None
    changed = [name for name, value in terms.items() if agreed.get(name) != value]
    if changed:
        raise StateError(
            f"{settings.state_dir} holds run {run_id}, whose {' and '.join(changed)} differ from the "
            "settings; give the new run its own state_dir (and database), or restore the old settings"
        )
    return run_id


def _begin_run(settings: ServerSettings, store: Store, terms: Mapping[str, object]) -> str:
    run_id = uuid.uuid4().hex
    store.put(
        {
            "run": json.dumps({"id": run_id, "started_at": time.time(), "terms": terms}),
            "round": "1",
            "absent": "[]",
            "head": first_head(run_id).hex(),
        }
    )
    log.info("run %s of federation %s begins", run_id, settings.federation)
    return run_id


def first_head(run_id: str) -> bytes:
    """Head of a run before any round is closed, 32 bytes."""
    return hashlib.sha256(b"fedmosaic/run/v1\x00" + run_id.encode()).digest()


def next_head(head: bytes, round_number: int, digests: Iterable[bytes]) -> bytes:
    """Head of a run after one more round: of the head before, and the digests of what it took and made."""
    return hashlib.sha256(b"".join([head, struct.pack("<Q", round_number), *digests])).digest()


def stored_head(store: Store, run_id: str) -> bytes:
    """Head of the stored run; a run that an older program began has none yet."""
    try:
        head = bytes.fromhex(store.get("head") or "")
    except ValueError:
        head = b""
    return head if len(head) == bounds.HASH_BYTES else first_head(run_id)


@dataclass(frozen=True)
class Opening:
    """What is stored together when a round closes and the next one opens.

    Attributes:
        head: of the run.
        keys: key epoch for the round; None where nothing is encrypted, or no round follows.
        metadata: all of it, and where the run is, for the store.
    """

    head: bytes
    keys: KeyEpoch | None
    metadata: Mapping[str, str]


def next_round(
    store: Store,
    keys: KeyRelay | None,
    closed: rounds.Round,
    opened: rounds.Round,
    aggregates: Mapping[str, StoredAggregate],
    head: bytes,
    now: float,
) -> Opening:
    """Everything that changes with the round: a server killed at any time has all of it, or nothing.

    Args:
        store: of the run.
        keys: the key agreement, if anything is encrypted.
        closed: the round that was aggregated.
        opened: the one after it.
        aggregates: what was made, by recipient.
        head: of the run, before the round was closed.
        now: in the clock of the rounds.
    """
    digests = [digest for _, digest in sorted(closed.arrived.items())]
    digests += [aggregate.sha256 for _, aggregate in sorted(aggregates.items())]
    head = next_head(head, closed.number, digests)
    absent = json.dumps(sorted(opened.absent))
    metadata = {"round": str(opened.number), "absent": absent, "head": head.hex()}
    if keys is None or opened.phase is Phase.FINISHED:
        return Opening(head, None, metadata)
    without_key = (store.enrolled() & opened.members) - opened.absent - keys.holders
    renew = bool(without_key) or store.get("rotate") == "1"
    epoch = keys.for_round(opened.number, renew=renew, now=now)
    return Opening(head, epoch, {**metadata, **KeyRelay.record(epoch), "rotate": "0"})


def resume_round(settings: ServerSettings, store: Store, keys: KeyRelay | None, now: float) -> rounds.Round:
    """The round that the stored run is in, with a full deadline ahead of `now`."""
    first = rounds.first_round(
        settings.members, settings.quorum, settings.rounds, settings.round_deadline_seconds, now
    )
    number = min(int(store.get_json("round") or 1), settings.rounds + 1)
    stored = {c: u for c, u in store.uploads(number).items() if c in settings.members}
    state = first.resumed(
        number,
        {client: upload.content_hash for client, upload in stored.items()},
        (client for client, upload in stored.items() if upload.sections),
        store.get_json("absent") or [],
    )
    if state.phase is Phase.OPEN and keys is not None and (store.get("rotate") == "1" or keys.due(number)):
        state = _under_new_key(state, keys, now)
    elif keys is not None and keys.ready:
        state = replace(state, able=state.members & keys.holders)
    log.info("%s", state.status(now).message)
    return state


def _under_new_key(state: rounds.Round, keys: KeyRelay, now: float) -> rounds.Round:
    """Nobody encrypts under the old key any more: change it now, or close the round with what is there."""
    if not state.arrived:
        keys.begin(keys.for_round(state.number, renew=True, now=now), {"rotate": "0"})
        return state
    # The uploads are under the old key. A round has one key, so the others wait for the next round.
    return replace(state, able=frozenset(state.arrived))
