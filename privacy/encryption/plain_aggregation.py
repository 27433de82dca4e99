"""Back end `plain`, server side: weighted sums of float32 values."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmosaic.privacy.encryption.aggregator import Aggregator, Contribution
from fedmosaic.privacy.encryption.parameters import PlainParameters
from fedmosaic.privacy.encryption.records import RoundContext
from fedmosaic.privacy.policy import WeightRow
from fedmosaic.protos.errors import CiphertextError


class PlainAggregator(Aggregator[PlainParameters]):
    """Server side of the back end `plain`."""

    def _check_payload(self, contribution: Contribution, context: RoundContext) -> None:
        self._values(contribution)

    def _combine(
        self,
        contributions: Sequence[Contribution],
        weights: NDArray[np.int64],
        rows: Sequence[WeightRow],
        headers: Sequence[bytes],
        context: RoundContext,
    ) -> list[bytes]:
        values = np.stack([self._values(item) for item in contributions])
        # At most 20 bits: exact in float32.
        shares = np.ldexp(weights.astype(np.float32), -self.parameters.weight_bits)
        sums = (shares @ values).astype("<f4", copy=False)
        return [header + total.tobytes() for header, total in zip(headers, sums, strict=True)]

    def _values(self, contribution: Contribution) -> NDArray[np.float32]:
        values = np.frombuffer(contribution.payload, dtype="<f4").astype(np.float32, copy=False)
        unusable = int(np.count_nonzero(~np.isfinite(values)))
        if unusable:
            raise CiphertextError(
                f"upload of {contribution.client!r} holds {unusable} values that are NaN or infinite"
            )
        if not (np.abs(values) <= self.parameters.clip).all():
            raise CiphertextError(
                f"upload of {contribution.client!r} holds values outside ±{self.parameters.clip}"
            )
        return values
