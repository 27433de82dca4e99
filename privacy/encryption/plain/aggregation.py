"""Back end `plain`, server side: weighted sums of float32 values."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmosaic.privacy.encryption.aggregator import Aggregator, Contribution
from fedmosaic.privacy.encryption.parameters import PlainParameters
from fedmosaic.privacy.encryption.records import HEADER_BYTES, RoundContext
from fedmosaic.protos.errors import CiphertextError
from fedmosaic.protos.messages import WeightRow


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
    ) -> list[memoryview]:
        values = np.stack([self._values(item) for item in contributions])
        # At most 20 bits: exact in float32.
        shares = np.ldexp(weights.astype(np.float32), -self.parameters.weight_bits)
        start = HEADER_BYTES // 4
        records = np.empty((len(rows), start + context.dimensions), dtype="<f4")
        records[:, :start] = np.frombuffer(b"".join(headers), dtype="<f4").reshape(len(rows), -1)
        records[:, start:] = shares @ values
        return [record.data.cast("B").toreadonly() for record in records]

    def _values(self, contribution: Contribution) -> NDArray[np.float32]:
        values = np.frombuffer(contribution.payload, dtype="<f4").astype(np.float32, copy=False)
        # Written so that NaN fails too.
        if not (values.min() >= -self.parameters.clip and values.max() <= self.parameters.clip):
            unusable = int(np.count_nonzero(~np.isfinite(values)))
            if unusable:
                raise CiphertextError(
                    f"upload of {contribution.client!r} holds {unusable} values that are NaN or infinite"
                )
            raise CiphertextError(
                f"upload of {contribution.client!r} holds values outside ±{self.parameters.clip}"
            )
        return values
