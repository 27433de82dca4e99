"""A member's part in one round's secure sum."""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from fedmosaic.privacy.secureaggregation.member import SumMember
from fedmosaic.privacy.secureaggregation.messages import Opening


def take_part(
    member: SumMember,
    answered: Callable[[str, bytes], Mapping[str, bytes]],
    draw: Callable[[], npt.NDArray[np.int64] | None],
) -> None:
    """Bring a vector into the group's sum; see `fedmosaic.privacy.secureaggregation.member`.

    Args:
        member: fresh, of this round's terms.
        answered: sends this member's message of a step and gives what the step brought, once it is over.
        draw: gives (D,) this round's share, charged and booked, or None to leave the sum; called once, when
            enough others have proved to take part, so that a sum that never begins costs nothing.

    Raises:
        EncryptionError: somebody else's message is not acceptable, or a step took too long.
        Refusal: the server forms no sum of this group, or goes on without this member.
    """
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
