"""Which roster may follow on which: serials go up only, and terms stay as they were agreed."""

import hashlib

from pydantic import Field

from fedmosaic.privacy.configuration import Frozen, canonical_json
from fedmosaic.privacy.federation.roster import Roster
from fedmosaic.privacy.federation.terms import Hex32
from fedmosaic.protos.errors import IdentityError


class RosterMark(Frozen):
    """What is remembered of a roster, to judge those that come after it.

    `terms` has the SHA-256 of every table of the terms that is in use, by name.
    """

    serial: int = Field(ge=1)
    sha256: Hex32
    terms: dict[str, Hex32]

    @classmethod
    def of(cls, roster: Roster) -> "RosterMark":
        """The mark of a roster."""
        terms = roster.terms.model_dump(mode="json")
        if not roster.terms.adapter.in_group_sums:
            del terms["group_sums"]  # as in the roster's own hash
        if roster.witness is not None:  # its keys may change, like a member's
            terms["witness"] = [roster.witness.id, roster.witness.seconds]
        for name, part in terms.items():
            terms[name] = hashlib.sha256(canonical_json(part).encode()).hexdigest()
        return cls(serial=roster.serial, sha256=roster.hash.hex(), terms=terms)

    def check(self, roster: Roster) -> None:
        """Refuse, with an IdentityError, a roster that may not follow on this one."""
        self.check_mark(RosterMark.of(roster), roster.federation)

    def check_mark(self, later: "RosterMark", federation: str) -> None:
        """The same, by the mark of the later roster."""
        what = f"roster {later.serial} of federation {federation!r}"
        if later.serial < self.serial:
            raise IdentityError(
                f"{what} is older than roster {self.serial}, which is known here: serials go up only, so "
                "that nobody brings back a member that has left; take the newest from the consortium"
            )
        if later.serial == self.serial and later.sha256 != self.sha256:
            raise IdentityError(
                f"{what} is not the one of this serial that is known here ({later.sha256[:16]}…, known "
                f"{self.sha256[:16]}…): the consortium has signed two; compare the fingerprints of rosters "
                "with other members before you go on"
            )
        names = {**self.terms, **later.terms}
        changed = [name for name in names if self.terms.get(name) != later.terms.get(name)]
        if changed:
            raise IdentityError(
                f"{what} has other terms than roster {self.serial} ({', '.join(changed)}): only members and "
                "their keys may change; other terms are another federation, with kits of its own"
            )
