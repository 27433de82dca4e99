"""A member's part in one round's secure sum, over the relay of messages."""

import time
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedmosaic.privacy.secureaggregation.member import SumMember
from fedmosaic.privacy.secureaggregation.messages import Opening
from fedmosaic.protos.errors import EncryptionError

_SECONDS_PER_CALL = 30.0


class Relay(Protocol):
    """What a sum asks of a transport."""

    def post(self, step: str, payload: bytes) -> None:
        """Send this member's message of a step; Refusal where the server does not take it."""

    def read(self, step: str, timeout_seconds: float) -> Mapping[str, bytes]:
        """What the step brought, once it is over; empty at the timeout. Refusal where there is no sum."""


def take_part(
    member: SumMember,
    relay: Relay,
    draw: Callable[[], npt.NDArray[np.int64] | None],
    *,
    patience_seconds: float,
) -> None:
    """Bring a vector into the group's sum; see `fedmosaic.privacy.secureaggregation.member`.

    Args:
        member: fresh, of this round's terms.
        relay: to the server.
        draw: gives (D,) this round's share, charged and booked, or None to leave the sum; called once, when
            enough others have proved to take part, so that a sum that never begins costs nothing.
        patience_seconds: longest wait for one step.

    Raises:
        EncryptionError: somebody else's message is not acceptable, or a step took too long.
        Refusal: the server forms no sum of this group, or goes on without this member.
    """

    def answered(step: str, payload: bytes) -> Mapping[str, bytes]:
        relay.post(step, payload)
        deadline = time.monotonic() + patience_seconds
        while time.monotonic() < deadline:
            found = relay.read(step, min(_SECONDS_PER_CALL, deadline - time.monotonic()))
            if found:
                return found
        raise EncryptionError(f"step {step!r} was not over within {patience_seconds:.0f} s")

    openings = answered("sum-open", member.open().encoded())
    sealed = member.share({name: Opening.decoded(data) for name, data in openings.items()})
    envelopes = answered("sum-share", b"".join(sealed[name] for name in sorted(sealed)))
    member.accept(envelopes)
    vector = draw()
    if vector is None:
        return
    survivors = answered("sum-vector", member.mask(vector))
    signatures = answered("sum-agree", member.agree(tuple(survivors)))
    answered("sum-unmask", member.unmask(signatures).encoded())
