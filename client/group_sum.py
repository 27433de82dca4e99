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
    vector: npt.NDArray[np.int64],
    *,
    patience_seconds: float,
    sent: Callable[[], None],
) -> None:
    """Bring a vector into the group's sum; see `fedmosaic.privacy.secureaggregation.member`.

    Args:
        member: fresh, of this round's terms.
        relay: to the server.
        vector: (D,) this round's share.
        patience_seconds: longest wait for one step.
        sent: called when the vector is about to leave, so that no other vector of this round ever does.

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
    masked = member.mask(envelopes, vector)
    sent()
    survivors = answered("sum-vector", masked)
    signatures = answered("sum-agree", member.agree(tuple(survivors)))
    answered("sum-unmask", member.unmask(signatures).encoded())
