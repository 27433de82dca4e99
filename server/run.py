"""A run: begun, or gone on with from what is stored; where it is, and what holds it."""

import hashlib
import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

from fedmosaic.privacy.audit import AuditLog
from fedmosaic.privacy.encryption.aggregators import create_aggregator
from fedmosaic.protos import bounds
from fedmosaic.protos.errors import StateError
from fedmosaic.protos.messages import Phase, RoundStatus
from fedmosaic.server.keys.relay import KeyRelay
from fedmosaic.server.rosters import Rosters
from fedmosaic.server.round import state as rounds
from fedmosaic.server.round.aggregates import Offer, stored_offer
from fedmosaic.server.round.witness import Witnessing
from fedmosaic.server.settings import ServerSettings
from fedmosaic.server.storage.blobs import Blobs
from fedmosaic.server.storage.store import MARK, Store, default_url
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
        """Begin or go on; StateError if the state is in use, damaged, or of a run with other terms."""
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
        self.traces = Traces(settings.roster.federation, exporter_to(settings.traces_url))
        self.store = Store(settings.store_url or default_url(settings.state_dir), durable=settings.durable)
        self.store.hold(self.blobs.mark(MARK) if settings.store_url else None)
        self.account = Account(settings, self.store)
        plaintext = not settings.encrypted  # whoever built the settings has asked for it by name
        terms = settings.terms
        self.aggregator = create_aggregator(terms.encryption, terms.policy, allow_plaintext=plaintext)
        self.run_id = self._stored_id()
        self.audit = AuditLog(settings.state_dir)
        about = {"federation": settings.roster.federation, "roster": settings.roster_hash.hex()}
        self.audit.add("started", role="server", name="server", **about)
        self.witnessing = Witnessing(settings, self.run_id, self.blobs, lambda: self.changed("upload"))
        self.rosters = Rosters(self.store)
        self.rosters.take_up(settings, fixed=self._fixed)
        self.keys = KeyRelay(settings, self.store, self.clock()) if settings.encrypted else None
        state = self._resumed()
        self.position = Position(
            state, self._stored_head(), stored_offer(self.store, self.blobs, state.number)
        )

    @property
    def _fixed(self) -> bool:
        return self.store.get(PARTITION_FORMED) is not None

    def renew(self, settings: ServerSettings) -> bool:
        """Go on under the roster of these settings, with the lock held; whether it is another than before."""
        if not self.rosters.take_up(settings, fixed=self._fixed):
            return False
        self.settings = self.account.settings = settings
        self.round = self._resumed()
        return True

    def taking_part(self, number: int) -> frozenset[str]:
        """Members that take part in a round; of one whose groups are not formed yet, all."""
        if self.sums is not None:
            return self.sums.taking_part(number)
        return self.settings.roster.taking_part(self.run_id, number)

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
        with ExitStack() as ending:  # from the last line to the first, whatever one of them raises
            ending.callback(self.blobs.close)
            ending.callback(self.audit.close)
            ending.callback(self.store.close)
            ending.callback(self.traces.close)

    def describe(self) -> RoundStatus:
        """What the server is waiting for, for whoever may know it; takes no lock."""
        now, here = self.clock(), self.position
        state = here.round
        status = self.witnessing.describe(replace(state.status(now), head=here.head), now)
        if self.keys is None or self.keys.ready or state.phase is not Phase.OPEN:
            return status
        waiting, left, text = self.keys.describe(state.sharing_key, now)
        message = rounds.one_line(f"round {state.number}: {text}")
        return replace(status, waiting_for=waiting, seconds_left=left, message=message)

    def state_line(self) -> str:
        """`describe` for the log; whatever is wrong with the line, it stops no round and no answer."""
        try:
            plain = (self.keys is None or self.keys.ready) and not self.witnessing.waiting
            return self.round.message(self.clock()) if plain else self.describe().message
        except Exception:  # see above
            log.exception("round %d cannot be described", self.round.number)
            return f"round {self.round.number}"

    def _stored_id(self) -> str:
        """Id of the stored run, or of a new one; StateError if it has other terms, or is missing."""
        settings = self.settings
        terms = {
            "federation": settings.roster.federation,
            "adapter": [settings.terms.adapter.spec_hash.hex()],
            "profile": settings.terms.profile.dimensions,
            "encryption": settings.terms.encryption.digest().hex(),
        }
        run = self.store.get_json("run")
        if run is None and not self.blobs.empty:
            raise StateError(
                f"{settings.state_dir} holds payloads of a run that its database does not know; restore a "
                "backup of both together, or give a new run its own state_dir (and database)"
            )
        if run is None:
            run_id = settings.run_id or uuid.uuid4().hex
            begun = json.dumps({"id": run_id, "started_at": time.time(), "terms": terms})
            head = _first_head(run_id).hex()
            self.store.put({"run": begun, "round": "1", "absent": "[]", "head": head})
            log.info("run %s of federation %s begins", run_id, settings.roster.federation)
            return run_id
        try:
            run_id, agreed = str(run["id"]), dict(run["terms"])
        except (KeyError, TypeError, ValueError):
            raise StateError(
                f"the database of {settings.state_dir} is damaged: it does not say which run it holds; "
                "restore a backup of both together"
            ) from None
        changed = [name for name, value in terms.items() if agreed.get(name) != value]
        if changed:
            raise StateError(
                f"{settings.state_dir} holds run {run_id}, whose {' and '.join(changed)} differ from the "
                "settings; give the new run its own state_dir (and database), or restore the old settings"
            )
        return run_id

    def _stored_head(self) -> bytes:
        """Head of the stored run, the first where an older program began it; StateError if it is damaged."""
        stored = self.store.get("head")
        if stored is None:
            return _first_head(self.run_id)
        if not re.fullmatch(f"[0-9a-f]{{{2 * bounds.HASH_BYTES}}}", stored):
            raise StateError(
                "the server's database is damaged: the entry 'head' is no hash; restore a backup of state_dir"
            )
        return bytes.fromhex(stored)

    def _resumed(self) -> rounds.Round:
        """The round that the stored run is in, with a full deadline ahead, and its sums."""
        settings, keys, now = self.settings, self.keys, self.clock()
        agreed = settings.terms.schedule
        number = min(int(self.store.get_json("round") or 1), agreed.rounds + 1)
        self.sums: RunSums | None = None
        if settings.terms.adapter.in_group_sums:
            self.sums = RunSums(settings, self.store, self.blobs, self.run_id, number)
        draw = self.taking_part if agreed.sampled_clients else None
        terms = settings.members, agreed.quorum, agreed.rounds, agreed.round_deadline_seconds
        stored = {c: u for c, u in self.store.uploads(number).items() if c in settings.members}
        state = rounds.first_round(*terms, now, draw).resumed(
            number,
            {client: upload.content_hash for client, upload in stored.items()},
            (client for client, upload in stored.items() if upload.sections),
            self.store.get_json("absent") or [],
        )
        if state.phase is Phase.OPEN and self.store.get(UNDER_REVIEW) == str(number):
            state = replace(state, phase=Phase.CLOSED)
        rotating = keys is not None and (self.store.get("rotate") == "1" or keys.due(number))
        if keys is not None and state.phase is Phase.OPEN and rotating:
            # Nobody encrypts under the old key any more. A round has one key: with uploads under the old one
            # here, it closes with these, and the others wait for the next round.
            if state.arrived:
                state = replace(state, holders=frozenset(state.arrived))
            else:
                keys.begin(keys.for_round(number, renew=True, now=now), {"rotate": "0"})
        elif keys is not None and keys.ready:
            state = replace(state, holders=state.members & keys.holders)
        log.info("%s", state.status(now).message)
        return state


def _first_head(run_id: str) -> bytes:
    """Head of a run before any round is closed, 32 bytes."""
    return hashlib.sha256(b"fedmosaic/run/v1\x00" + run_id.encode()).digest()
