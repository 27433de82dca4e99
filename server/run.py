"""A run: begun, or gone on with from what is stored; where it is, and what holds it."""

import hashlib
import json
import logging
import struct
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from fedmosaic.privacy.audit import AuditLog
from fedmosaic.privacy.encryption.aggregators import create_aggregator
from fedmosaic.protos import bounds
from fedmosaic.protos.errors import StateError
from fedmosaic.protos.messages import Phase
from fedmosaic.server.keys.epoch import KeyEpoch
from fedmosaic.server.keys.relay import KeyRelay
from fedmosaic.server.rosters import Rosters
from fedmosaic.server.round import state as rounds
from fedmosaic.server.round.aggregates import Offer, stored_offer
from fedmosaic.server.round.witness import Witnessing
from fedmosaic.server.settings import ServerSettings
from fedmosaic.server.storage.blobs import Blobs
from fedmosaic.server.storage.store import MARK, Store, StoredAggregate, default_url
from fedmosaic.server.summary import Account
from fedmosaic.server.sums import PARTITION_FORMED, RunSums
from fedmosaic.server.tracing import Traces, exporter_to

log = logging.getLogger(__name__)
UNDER_REVIEW = "under_review"
"""Entry of the database: the round that the witness was shown last. It takes no other upload."""
Topic = Literal["upload", "round", "keys"]
"""What a listener is told: an upload is stored, a round has opened, the key epoch has changed."""


@dataclass(frozen=True)
class Position:
    """The open round or the one that is being aggregated, the head of those before, what clients may load.

    Replaced whole, so that whoever looks needs no lock.
    """

    round: rounds.Round
    head: bytes
    offer: Offer


class Run:
    """One run of one federation, while this process serves it.

    Deadlines are counted in `clock`, seconds, monotonic. `lock` is held by whoever changes position, keys or
    sums, also while that is written to the disk. `keys` is None where nothing is encrypted, `sums` where
    members share adapters.
    """

    def __init__(self, settings: ServerSettings, clock: Callable[[], float]) -> None:
        """Begin a run, or go on with the one in `settings.state_dir`.

        Raises:
            StateError: the state is in use, damaged, or of a run with other terms.
        """
        self.settings = settings
        self.clock = clock
        self.lock = threading.RLock()
        self.listeners: list[Callable[[Topic], None]] = []
        self.blobs = Blobs(settings.state_dir, durable=settings.durable)
        try:
            self._open()
        except BaseException:
            self.blobs.close()
            raise

    def _open(self) -> None:
        settings = self.settings
        self.traces = Traces(settings.federation, exporter_to(settings.traces_url))
        self.store = Store(settings.store_url or default_url(settings.state_dir), durable=settings.durable)
        self.store.hold(self.blobs.mark(MARK) if settings.store_url else None)
        self.account = Account(settings, self.store)
        plaintext = not settings.encrypted  # whoever built the settings has asked for it by name
        self.aggregator = create_aggregator(settings.encryption, settings.policy, allow_plaintext=plaintext)
        self.run_id = open_run(settings, self.store, new=self.blobs.empty)
        self.audit = AuditLog(settings.state_dir)
        about = {"federation": settings.federation, "roster": settings.roster_hash.hex()}
        self.audit.add("started", role="server", name="server", **about)
        self.witnessing = Witnessing(settings, self.run_id, self.blobs, lambda: self.changed("upload"))
        self.rosters = Rosters(self.store)
        self.rosters.take_up(settings, fixed=self._fixed)
        self.keys = KeyRelay(settings, self.store, self.clock()) if settings.encrypted else None
        state = resume_round(settings, self.store, self.keys, self.run_id, self.clock())
        offer = stored_offer(self.store, self.blobs, state.number)
        self.position = Position(state, stored_head(self.store, self.run_id), offer)
        self.sums: RunSums | None = None
        if settings.group_sums is not None:
            self.sums = RunSums(settings, self.store, self.blobs, self.run_id, state.number)

    @property
    def _fixed(self) -> bool:
        return self.store.get(PARTITION_FORMED) is not None

    def renew(self, settings: ServerSettings) -> bool:
        """Go on under the roster of these settings, with the lock held; whether it is another than before."""
        if not self.rosters.take_up(settings, fixed=self._fixed):
            return False
        self.settings = self.account.settings = settings
        self.round = resume_round(settings, self.store, self.keys, self.run_id, self.clock())
        if self.sums is not None:
            self.sums = RunSums(settings, self.store, self.blobs, self.run_id, self.round.number)
        return True

    @property
    def round(self) -> rounds.Round:
        """The open round, or the one that is being aggregated; set with the lock held."""
        return self.position.round

    @round.setter
    def round(self, state: rounds.Round) -> None:
        self.position = replace(self.position, round=state)

    def changed(self, topic: Topic) -> None:
        """Tell everybody who waits to look again."""
        for listener in tuple(self.listeners):
            listener(topic)

    def seen(self, client: str) -> None:
        """A member showed that it is alive."""
        if client in self.round.absent:
            with self.lock:
                self.round = self.round.seen(client)

    def close(self) -> None:
        """Let go of the state."""
        self.traces.close()
        self.store.close()
        self.audit.close()
        self.blobs.close()


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
    run_id = settings.run_id or uuid.uuid4().hex
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


def stored_head(store: Store, run_id: str) -> bytes:
    """Head of the stored run; a run that an older program began has none yet."""
    try:
        head = bytes.fromhex(store.get("head") or "")
    except ValueError:
        head = b""
    return head if len(head) == bounds.HASH_BYTES else first_head(run_id)


def next_round(
    store: Store,
    keys: KeyRelay | None,
    closed: rounds.Round,
    opened: rounds.Round,
    aggregates: Mapping[str, StoredAggregate],
    head: bytes,
    now: float,
) -> tuple[bytes, KeyEpoch | None, Mapping[str, str]]:
    """Everything that changes with a round: a server killed at any time has all of it, or nothing.

    The `aggregates` were made of the `closed` round; `head` is of the run before that.

    Returns:
        The head of the run after it; the key epoch for the `opened` round, None where nothing is encrypted or
        no round follows; and metadata for the store, with both and where the run is.
    """
    digests = [digest for _, digest in sorted(closed.arrived.items())]
    digests += [aggregate.sha256 for _, aggregate in sorted(aggregates.items())]
    head = hashlib.sha256(b"".join([head, struct.pack("<Q", closed.number), *digests])).digest()
    absent = json.dumps(sorted(opened.absent))
    metadata = {"round": str(opened.number), "absent": absent, "head": head.hex()}
    if keys is None or opened.phase is Phase.FINISHED:
        return head, None, metadata
    without_key = (store.enrolled() & opened.members) - opened.absent - keys.holders
    renew = bool(without_key) or store.get("rotate") == "1"
    epoch = keys.for_round(opened.number, renew=renew, now=now)
    return head, epoch, {**metadata, **KeyRelay.record(epoch), "rotate": "0"}


def resume_round(
    settings: ServerSettings, store: Store, keys: KeyRelay | None, run_id: str, now: float
) -> rounds.Round:
    """The round that the stored run is in, with a full deadline ahead of `now`."""
    draw = None if settings.sampled_clients is None else partial(settings.taking_part, run_id)
    terms = settings.members, settings.quorum, settings.rounds, settings.round_deadline_seconds
    first = rounds.first_round(*terms, now, draw)
    number = min(int(store.get_json("round") or 1), settings.rounds + 1)
    stored = {c: u for c, u in store.uploads(number).items() if c in settings.members}
    state = first.resumed(
        number,
        {client: upload.content_hash for client, upload in stored.items()},
        (client for client, upload in stored.items() if upload.sections),
        store.get_json("absent") or [],
    )
    if state.phase is Phase.OPEN and store.get(UNDER_REVIEW) == str(number):
        state = replace(state, phase=Phase.CLOSED)
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
