"""The secure sums of one round, one per group, moved on by what members send and by the clock.

    open → share → vector → agree → unmask → over

A step is over when everybody it waits for has answered, or at its deadline if enough have; with too few the
group forms no sum in this round. Pure but for the arithmetic: time is passed in.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

from fedmosaic.privacy.secureaggregation.collector import SumCollector
from fedmosaic.privacy.secureaggregation.masks import pack, to_words
from fedmosaic.privacy.secureaggregation.messages import Opening, Unmasking
from fedmosaic.privacy.secureaggregation.partition import RoundTotals
from fedmosaic.privacy.secureaggregation.terms import SumTerms
from fedmosaic.protos.errors import EncryptionError
from fedmosaic.protos.refusal import Refusal, RefusalKind

log = logging.getLogger(__name__)

OPEN: Final = "sum-open"
SHARE: Final = "sum-share"
VECTOR: Final = "sum-vector"
AGREE: Final = "sum-agree"
UNMASK: Final = "sum-unmask"
STEPS: Final = (OPEN, SHARE, VECTOR, AGREE, UNMASK)
_OVER: Final = "over"


class RoundSums:
    """The sums of one round's groups, one for each of `terms`.

    `seconds` says how long each step waits for a member, `left_out` which members may not take part, and why.
    """

    def __init__(
        self,
        round_number: int,
        terms: Sequence[SumTerms],
        seconds: Mapping[str, float],
        now: float,
        left_out: Mapping[str, str] | None = None,
    ) -> None:
        self.round = round_number
        self._groups = [_GroupSum(group, seconds, now, left_out or {}) for group in terms]

    @property
    def faults(self) -> dict[str, str]:
        """Member → what it has provably done to its group's sum."""
        return {name: fault for group in self._groups for name, fault in group.collector.faults.items()}

    @property
    def disputes(self) -> set[tuple[str, str]]:
        """See `SumCollector.disputes`."""
        return {pair for group in self._groups for pair in group.disputes}

    def post(self, member: str, step: str, payload: bytes) -> None:
        """Take a member's message; Refusal if it is of no group, the step is over, or it is not usable."""
        try:
            self._group_of(member).post(member, step, payload)
        except EncryptionError as error:
            self._group_of(member).refused.add(member)
            raise Refusal(
                RefusalKind.PRECONDITION,
                "SUM_REFUSED",
                str(error),
                "go on with the next round; this one's sum is formed without you",
            ) from None

    def read(self, member: str, step: str) -> dict[str, bytes]:
        """What a member is told when a step is over, empty before; Refusal if its group forms no sum."""
        group = self._group_of(member)
        if group.failure:
            raise Refusal(RefusalKind.PRECONDITION, "NO_SUM", group.failure, "go on with the next round")
        return group.read(member, step)

    def advance(self, expected: Collection[str], now: float) -> bool:
        """Close the steps that are due; whether one was. Members of `expected` are known to be there."""
        return any([group.advance(expected, now) for group in self._groups])

    def due(self) -> list[Callable[[], None]]:
        """What takes the masks off the sums that have all their shares, each given out once.

        It takes long and needs no lock: of such a sum nothing else changes any more.
        """
        due = [group.finish for group in self._groups if group.due]
        for group in self._groups:
            group.due = False
        return due

    def totals(self) -> RoundTotals:
        """What came of it."""
        totals = [
            (group.contributors, total) if (total := group.total) else ((), b"") for group in self._groups
        ]
        return RoundTotals(self.round, tuple(c for c, _ in totals), tuple(total for _, total in totals))

    def _group_of(self, member: str) -> "_GroupSum":
        for group in self._groups:
            if member in group.terms.members:
                return group
        raise Refusal(
            RefusalKind.PRECONDITION, "NO_GROUP", f"{member!r} is in no group", "go on with the next round"
        )


class _GroupSum:
    def __init__(
        self, terms: SumTerms, seconds: Mapping[str, float], now: float, left_out: Mapping[str, str]
    ) -> None:
        self.terms = terms
        self.step = OPEN
        self.failure = ""
        self.total = b""
        self.contributors: tuple[str, ...] = ()
        self.refused = set(left_out)
        self.due = self._complete = self._final = False
        self.collector = SumCollector(terms)
        self.late: dict[str, Unmasking] = {}
        self._left_out = left_out
        self._seconds = seconds
        self._deadline = now + seconds[OPEN]
        self._answered: dict[str, set[str]] = {step: set() for step in STEPS}
        self._openings: dict[str, bytes] = {}
        self._shared: list[str] = []

    def post(self, member: str, step: str, payload: bytes) -> None:
        if member in self._answered.get(step, ()):
            # A retry. Another vector than the first is not looked at.
            return
        if member in self._left_out:
            raise EncryptionError(f"{member!r} is left out of this run's sums: {self._left_out[member]}")
        if step != self.step and (step, self.step) != (UNMASK, _OVER):
            raise EncryptionError(f"step {step!r} of {member!r} came while {self.step!r} is open")
        if step == OPEN:
            self.collector.add_opening(member, Opening.decoded(payload))
        elif step == SHARE:
            self.collector.add_envelopes(member, payload)
        elif step == VECTOR:
            self.collector.add_vector(member, payload)
        elif step == AGREE:
            self.collector.add_signature(member, payload)
        else:
            self._add_unmasking(member, Unmasking.decoded(payload, self._shared))
        self._answered[step].add(member)

    @property
    def disputes(self) -> set[tuple[str, str]]:
        told = {
            (m, s)
            for m, unmasking in self.late.items()
            for s, share in unmasking.shares.items()
            if share is None
        }
        return self.collector.disputes | told

    def _add_unmasking(self, member: str, unmasking: Unmasking) -> None:
        if member not in self.contributors:
            raise EncryptionError(f"shares of {member!r}, who sent no vector")
        if self._complete or self.step == _OVER:
            # The masks are being taken off. It tells whose envelopes did not open, and may be needed yet.
            self.late[member] = unmasking
        else:
            self.collector.add_unmasking(member, unmasking)

    def read(self, member: str, step: str) -> dict[str, bytes]:
        if step not in STEPS or (self.step != _OVER and STEPS.index(step) >= STEPS.index(self.step)):
            return {}
        if step == OPEN:
            return self._openings
        if step == SHARE:
            return self.collector.envelopes_for(member)
        if step == VECTOR:
            return dict.fromkeys(self.contributors, b"")
        if step == AGREE:
            return self.collector.signatures()
        return {"server": b""}

    def advance(self, expected: Collection[str], now: float) -> bool:
        if self.step == _OVER or self._complete:
            return False
        if self.step == UNMASK:
            complete = self.collector.can_finish
        else:
            complete = self._all_answered(expected)
        if not complete and now < self._deadline:
            return False
        if self.step == UNMASK:
            self.due = self._complete = True
            self._final = now >= self._deadline
            return True
        try:
            self._close()
        except EncryptionError as error:
            self._fail(error)
        self._deadline = now + self._seconds.get(self.step, 0.0)
        return True

    def finish(self) -> None:
        """Take the masks off; where false shares were among those that came, wait for others'."""
        bits = self.terms.bits
        for member in list(self.late):
            self.collector.add_unmasking(member, self.late.pop(member))
        try:
            self.total = pack(to_words(self.collector.finish(), bits), bits)
            self.step = _OVER
        except EncryptionError as error:
            if self._final:
                self._fail(error)
            self._complete = False

    def _fail(self, error: EncryptionError) -> None:
        self.failure = f"the sum of {len(self.terms.members)} members was not formed: {error}"
        log.warning("%s", self.failure)
        self.step = _OVER

    def _all_answered(self, expected: Collection[str]) -> bool:
        if self.step == OPEN:
            # Nobody expected is no reason to close at once: members may still be on their way.
            awaited = (set(self.terms.members) & set(expected)) or set(self.terms.members)
        else:
            awaited = self._answered[STEPS[STEPS.index(self.step) - 1]]
        answered = self._answered[self.step]
        # Asked after every message: numbers first, sets of many names only where it may be true.
        return len(awaited) <= len(answered) + len(self.refused) and awaited <= answered | self.refused

    def _close(self) -> None:
        if self.step == OPEN:
            opened = self.collector.close_openings()
            self._openings = {name: opening.encoded() for name, opening in opened.items()}
        elif self.step == SHARE:
            self.collector.close_envelopes()
            self._shared = sorted(self._answered[SHARE])
        elif self.step == VECTOR:
            self.contributors = self.collector.close_vectors()
        self.step = STEPS[STEPS.index(self.step) + 1]


def liars(disputes: Collection[tuple[str, str]], colluders: int) -> dict[str, str]:
    """Members, and why, that must have lied about envelopes: `disputes` are (recipient, sender).

    Of every dispute one has lied, and no more than t `colluders` do: an honest member never disputes with
    more than t others.
    """
    opposed: defaultdict[str, set[str]] = defaultdict(set)
    for recipient, sender in disputes:
        if recipient != sender:
            opposed[recipient].add(sender)
            opposed[sender].add(recipient)
    return {
        name: f"{len(others)} members disagree with it about envelopes, of whom at most {colluders} lie"
        for name, others in sorted(opposed.items())
        if len(others) > colluders
    }
