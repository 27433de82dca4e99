"""The roster of a run: which may follow on which, and who still has an older one.

A roster may change while a run goes on: members leave or come, and get other keys. Terms may not, nor may a
serial go down. Whoever enrolled under the roster before is refused until it enrols again with the new one, so
that nobody agrees on a key with members that are not the same for all.
"""

import json
import logging

from fedmosaic.privacy.federation.roster import RosterMark
from fedmosaic.protos.errors import StateError
from fedmosaic.protos.refusal import Refusal, RefusalKind
from fedmosaic.server.settings import ServerSettings
from fedmosaic.server.storage.store import Store

log = logging.getLogger(__name__)


class Rosters:
    """What is stored of the rosters of a run. Not thread-safe: the coordinator holds its lock."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._outdated = set(store.get_json("outdated") or ())

    def take_up(self, settings: ServerSettings, *, fixed: bool) -> bool:
        """Note the roster of the settings, and that a group key is needed that only its members have.

        Tells whether it is another one than before. A run is `fixed` whose groups share sums over rounds: its
        roster stays.

        Raises:
            IdentityError: it cannot follow on the one before.
            StateError: the run's roster is fixed, the one before is damaged, or a member has another family.
        """
        before, new = self._store.get("roster"), settings.roster_hash.hex()
        if before == new:
            return False
        known, following = self._store.get_json("roster_mark"), RosterMark.of(settings.roster)
        if known is not None:
            try:
                mark = RosterMark.model_validate(known)
            except ValueError:
                raise StateError(
                    "the server's database is damaged: the roster before cannot be read; restore a backup of "
                    "state_dir and database together"
                ) from None
            mark.check_mark(following, settings.roster.federation)
        if before is not None and fixed:
            raise StateError(
                "the groups of this run are formed, and each sum is bound to its roster: a run of group sums "
                "goes on under the roster that it began with, or a new run begins under the new one"
            )
        self._check_families(settings)
        self._outdated = set(self._store.enrolled())
        changes = {"roster": new, "rosters": json.dumps(sorted({*self.known, new}))}
        changes["roster_mark"] = following.model_dump_json()
        if before is not None:
            log.warning("the roster has changed; a new group key is agreed on before anybody encrypts again")
            changes |= {"rotate": "1", "outdated": json.dumps(sorted(self._outdated))}
        self._store.put(changes)
        return True

    def _check_families(self, settings: ServerSettings) -> None:
        """Refuse another family of a member that would share other vectors, or receive from others."""
        apart = not settings.terms.relevance.across_families
        sharing = settings.terms.adapter.family_dimensions.keys()
        for client, before in sorted(self._store.families().items()):
            member = settings.members.get(client)
            after = member.family if member else before
            if before != after and (apart or {before, after} & sharing):
                raise StateError(
                    f"{client!r} is of family {after!r} on the new roster, and of {before!r} in this run; a "
                    "member's model stays for a run: have the consortium sign a roster that says so, or "
                    "begin a new run"
                )

    @property
    def known(self) -> frozenset[str]:
        """Hashes of all rosters that the run has had, hexadecimal."""
        return frozenset(self._store.get_json("rosters") or filter(None, [self._store.get("roster")]))

    def enrolled(self, client: str) -> None:
        """A member has enrolled with the present roster."""
        if client in self._outdated:
            self._outdated.remove(client)
            self._store.put({"outdated": json.dumps(sorted(self._outdated))})

    def check(self, client: str) -> None:
        """Refuse a member that enrolled under an older roster."""
        if client in self._outdated:
            raise Refusal(
                RefusalKind.PRECONDITION,
                "ROSTER_CHANGED",
                f"{client!r} enrolled under an older roster than the server has now",
                "install the newest (`fedmosaic keys install`); a running client takes it up and goes on",
            )
