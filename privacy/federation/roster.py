"""The roster: who is in a federation and on which terms, signed by the consortium.

Every member pins the consortium's Ed25519 key out of band and refuses any roster it did not sign. The hash of
the roster is exchanged on enrolment, signed into the group key and written into the privacy statement.
"""

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field, model_validator

from fedmosaic.privacy.configuration import Frozen, Hex32, canonical_json, parse_json, validate
from fedmosaic.privacy.federation.names import Family, MemberId
from fedmosaic.privacy.federation.terms import Seconds, Terms, check_witnessed
from fedmosaic.protos import bounds
from fedmosaic.protos.errors import ConfigurationError, IdentityError


class Member(Frozen):
    """One client of the federation, as the consortium vouches for it."""

    id: MemberId
    identity_key: Hex32
    """Ed25519 public key that signs uploads and key-agreement messages."""
    tls_key_sha256: Hex32
    """SHA-256 of the DER SubjectPublicKeyInfo of its TLS certificate's key."""
    family: Family = ""
    """Architecture name; members of one family may share the LoRA of the other layers."""


class Witness(Member):
    """Who countersigns every aggregate. It holds no group key and is not of the members."""

    seconds: Seconds = 600
    """How long a round waits for it; whoever then has no countersignature trains the round alone."""


def check_distinct(what: str, values: Sequence[str]) -> None:
    """ValueError that names a value that is there twice."""
    twice = sorted(value for value, times in Counter(values).items() if times > 1)
    if twice:
        raise ValueError(f"{what} {twice[0]} appears more than once")


class Roster(Frozen):
    """Members and terms, with the consortium's signature over all of it.

    Where a witness is named, a recipient accepts no aggregate that it has not countersigned. A roster that
    says nothing of `relevance.across_families` is from before that term: its members share across families.
    """

    version: Literal[1] = 1
    federation: MemberId
    serial: int = Field(ge=1)
    issued: str
    members: tuple[Member, ...] = Field(min_length=1, max_length=bounds.MAX_MEMBERS)
    terms: Terms
    witness: Witness | None = None
    signature: str = ""

    @model_validator(mode="before")
    @classmethod
    def _shared_across(cls, content: Any) -> Any:
        terms = content.get("terms") if isinstance(content, dict) else None
        if not isinstance(terms, dict) or not isinstance(relevance := terms.get("relevance", {}), dict):
            return content
        return content | {"terms": terms | {"relevance": {"across_families": True} | relevance}}

    @model_validator(mode="after")
    def _distinct(self) -> "Roster":
        if self.witness is not None:
            check_witnessed(self.terms)
        check_distinct("member id", [m.id for m in self.parties])
        check_distinct("identity key", [m.identity_key for m in self.parties])
        check_distinct("TLS key", [m.tls_key_sha256 for m in self.parties])
        return self

    @property
    def parties(self) -> tuple[Member, ...]:
        """The members, and the witness if there is one."""
        return (*self.members, *((self.witness,) if self.witness else ()))

    @property
    def hash(self) -> bytes:
        """SHA-256 (32 bytes) over the canonical JSON of everything but the signature."""
        return hashlib.sha256(self._canonical()).digest()

    def _canonical(self) -> bytes:
        # What rosters from before these terms existed do not say is left out, so that they keep their hash.
        unused: dict[str, bool | set[str]] = {}
        if not self.terms.adapter.in_group_sums:
            unused["group_sums"] = True
        elif self.terms.group_sums.unit == "example":
            unused["group_sums"] = {"unit"}
        if self.terms.adapter_privacy.largest_delta is None:
            unused["adapter_privacy"] = {"largest_delta"}
        if self.terms.schedule.sampled_clients is None:
            unused["schedule"] = {"sampled_clients"}
        if self.terms.relevance.across_families:
            unused["relevance"] = {"across_families"}
        exclude: dict[str, Any] = {"signature": True, "terms": unused}
        exclude |= {} if self.witness else {"witness": True}
        return canonical_json(self.model_dump(mode="json", exclude=exclude)).encode()

    def signed(self, consortium: Ed25519PrivateKey) -> "Roster":
        """This roster with the consortium's Ed25519 signature over its canonical JSON."""
        signature = base64.b64encode(consortium.sign(self._canonical())).decode()
        return self.model_copy(update={"signature": signature})

    def verify(self, consortium: Ed25519PublicKey) -> None:
        """Check the consortium's signature; IdentityError if it is missing or not by this key."""
        try:
            consortium.verify(base64.b64decode(self.signature, validate=True), self._canonical())
        except (InvalidSignature, ValueError):
            raise IdentityError(
                f"the roster of federation {self.federation!r} (serial {self.serial}) is not signed by the "
                "consortium key that is pinned here; get the current roster from the consortium, over a "
                "channel you trust"
            ) from None

    def member(self, member_id: str) -> Member:
        """The member with this id; IdentityError if there is none."""
        for member in self.members:
            if member.id == member_id:
                return member
        raise IdentityError(f"{member_id!r} is not on the roster of federation {self.federation!r}")

    def party(self, party_id: str) -> Member:
        """The same, or the witness."""
        return next((p for p in self.parties if p.id == party_id), None) or self.member(party_id)

    def sharing_families(self, section: str = "shared") -> dict[str, str]:
        """Family within which alone a member shares a section, by member; one for all where they may mix."""
        mixed = section != "family" and self.terms.relevance.across_families
        return {member.id: "" if mixed else member.family for member in self.members}

    @property
    def private_steps(self) -> int:
        """See `CommonTerms.private_steps`."""
        return self.terms.private_steps(len(self.members))

    def taking_part(self, run_id: str, number: int) -> frozenset[str]:
        """Ids of the members that take part in a round; see `taking_part`."""
        members = tuple(member.id for member in self.members)
        return taking_part(members, self.terms.schedule.sampled_clients, run_id, number)

    def identity_keys(self) -> dict[str, bytes]:
        """Raw Ed25519 public keys (32 bytes) by member id."""
        return {member.id: bytes.fromhex(member.identity_key) for member in self.members}

    def write(self, path: Path) -> None:
        """Replace the file by this roster as indented JSON, in one step."""
        fresh = path.with_name(f"{path.name}.new")
        fresh.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        fresh.replace(path)

    @classmethod
    def read(cls, path: Path, consortium: Ed25519PublicKey) -> "Roster":
        """Read a `roster.json` and verify it by the pinned key; ConfigurationError if it is none."""
        try:
            data = parse_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"{path}: no roster ({error}); take it from the consortium again"
            ) from None
        roster = validate(data, cls, str(path))
        roster.verify(consortium)
        return roster


class RosterMark(Frozen):
    """What is remembered of a roster, to judge those that come after it; of the terms a hash per table."""

    serial: int = Field(ge=1)
    sha256: Hex32
    terms: dict[str, Hex32]

    @classmethod
    def of(cls, roster: Roster) -> "RosterMark":
        """The mark of a roster."""
        terms = roster.terms.model_dump(mode="json")
        if not roster.terms.adapter.in_group_sums:
            del terms["group_sums"]  # as in the roster's own hash
        if roster.terms.relevance.across_families:
            del terms["relevance"]["across_families"]
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


def taking_part(members: tuple[str, ...], sampled: int | None, run_id: str, number: int) -> frozenset[str]:
    """The members that take part in a round; `sampled` is K of the terms, None for everybody.

    They take turns. A cycle is ⌊n/K⌋ rounds long; in each cycle the n members stand in another order, by a
    hash of the run, the cycle and the name, and every round takes the next K. So nobody takes part more than
    once in a cycle, which bounds what its noise is planned for (`ScheduleTerms.turns`), and of a single round
    every K are as likely as any others over the runs' random ids. Every member can tell who takes part, so it
    refuses a weight row that names anybody else. The draw is no secret, and whoever draws many ids of a run
    can choose among draws: no amplification by subsampling is claimed for it.
    """
    if sampled is None or sampled >= len(members):
        return frozenset(members)
    if sampled < 1:  # the share of a group that is too small: whoever sums refuses it
        return frozenset()
    cycle, turn = divmod(number - 1, len(members) // sampled)
    return frozenset(_order(members, run_id, cycle)[turn * sampled : (turn + 1) * sampled])


@lru_cache(maxsize=64)
def _order(members: tuple[str, ...], run_id: str, cycle: int) -> list[str]:
    prefix = f"fedmosaic/sample/v2\x00{run_id}/{cycle}/"
    return sorted(members, key=lambda name: hashlib.sha256((prefix + name).encode()).digest())
