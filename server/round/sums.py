"""The secure sums of one round, one per group, moved on by what members send and by the clock.

    open → share → vector → agree → unmask → over

A step is over when everybody it waits for has answered, or at its deadline if enough have; with too few the
group forms no sum in this round. Pure but for the arithmetic: time is passed in.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

from fedmosaic.privacy.secureaggregation.collector import SumCollector
from fedmosaic.privacy.secureaggregation.masks import pack, to_words
from fedmosaic.privacy.secureaggregation.messages import ENVELOPE_BYTES, Opening, Unmasking, split
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
    """The sums of one round's groups.

    Args:
        round_number: its number.
        terms: of every group's sum.
        seconds: how long each step waits for a member.
        now: in the caller's clock.
    """

    def __init__(
        self, round_number: int, terms: Sequence[SumTerms], seconds: Mapping[str, float], now: float
    ) -> None:
        self.round = round_number
        self._groups = [_GroupSum(group, seconds, now) for group in terms]

    @property
    def over(self) -> bool:
        """Whether every group has its sum, or will have none."""
        return all(group.step == _OVER for group in self._groups)

    def post(self, member: str, step: str, payload: bytes) -> None:
        """Take a member's message of a step.

        Raises:
            Refusal: it is not of any group, the step is over, or the message is not acceptable.
        """
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
        """What a member is to be told when a step is over; empty before.

        Raises:
            Refusal: it is not of any group, or its group forms no sum.
        """
        group = self._group_of(member)
        if group.failure:
            raise Refusal(RefusalKind.PRECONDITION, "NO_SUM", group.failure, "go on with the next round")
        return group.read(member, step)

    def advance(self, expected: Collection[str], now: float) -> bool:
        """Close the steps that are due. Returns whether one was.

        Args:
            expected: members that are known to be there.
            now: current time.
        """
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
    def __init__(self, terms: SumTerms, seconds: Mapping[str, float], now: float) -> None:
        self.terms = terms
        self.step = OPEN
        self.failure = ""
        self.total = b""
        self.contributors: tuple[str, ...] = ()
        self.refused: set[str] = set()
        self.due = self._complete = False
        self._collector = SumCollector(terms)
        self._seconds = seconds
        self._deadline = now + seconds[OPEN]
        self._answered: dict[str, set[str]] = {step: set() for step in STEPS}
        self._openings: Mapping[str, Opening] = {}

    def post(self, member: str, step: str, payload: bytes) -> None:
        if member in self._answered.get(step, ()) or (
            step == UNMASK and (self.step == _OVER or self._complete)
        ):
            # A retry, or a share more than was needed. Another vector than the first is not looked at.
            return
        if step != self.step:
            raise EncryptionError(f"step {step!r} of {member!r} came while {self.step!r} is open")
        if step == OPEN:
            self._collector.add_opening(member, Opening.decoded(payload))
        elif step == SHARE:
            others = sorted(set(self._openings) - {member})
            pieces = split(payload, ENVELOPE_BYTES, len(others))
            self._collector.add_envelopes(member, dict(zip(others, pieces, strict=True)))
        elif step == VECTOR:
            self._collector.add_vector(member, payload)
        elif step == AGREE:
            self._collector.add_signature(member, payload)
        else:
            shared = self._answered[SHARE]
            self._collector.add_unmasking(member, Unmasking.decoded(payload, shared, self.contributors))
        self._answered[step].add(member)

    def read(self, member: str, step: str) -> dict[str, bytes]:
        if step not in STEPS or (self.step != _OVER and STEPS.index(step) >= STEPS.index(self.step)):
            return {}
        if step == OPEN:
            return {name: opening.encoded() for name, opening in self._openings.items()}
        if step == SHARE:
            return self._collector.envelopes_for(member)
        if step == VECTOR:
            return dict.fromkeys(self.contributors, b"")
        if step == AGREE:
            return self._collector.signatures()
        return {"server": b""}

    def advance(self, expected: Collection[str], now: float) -> bool:
        if self.step == _OVER or self._complete:
            return False
        if self.step == UNMASK:
            complete = self._collector.can_finish
        else:
            complete = self._awaited(expected) <= self._answered[self.step]
        if not complete and now < self._deadline:
            return False
        if self.step == UNMASK:
            self.due = self._complete = True
            return True
        try:
            self._close()
        except EncryptionError as error:
            self._fail(error)
        self._deadline = now + self._seconds.get(self.step, 0.0)
        return True

    def finish(self) -> None:
        """Take the masks off."""
        bits = self.terms.bits
        try:
            self.total = pack(to_words(self._collector.finish(), bits), bits)
            self.step = _OVER
        except EncryptionError as error:
            self._fail(error)

    def _fail(self, error: EncryptionError) -> None:
        self.failure = f"the sum of {len(self.terms.members)} members was not formed: {error}"
        log.warning("%s", self.failure)
        self.step = _OVER

    def _awaited(self, expected: Collection[str]) -> set[str]:
        if self.step == OPEN:
            # Nobody expected is no reason to close at once: members may still be on their way.
            awaited = (set(self.terms.members) & set(expected)) or set(self.terms.members)
        else:
            awaited = self._answered[STEPS[STEPS.index(self.step) - 1]]
        return awaited - self.refused

    def _close(self) -> None:
        if self.step == OPEN:
            self._openings = self._collector.close_openings()
        elif self.step == SHARE:
            self._collector.close_envelopes()
        elif self.step == VECTOR:
            self.contributors = self._collector.close_vectors()
        self.step = STEPS[STEPS.index(self.step) + 1]
