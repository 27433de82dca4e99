"""Choose a back end, at the server; and `plain`, whose aggregates are weighted sums of float32 values."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmosaic.privacy.encryption import parameters as back_ends
from fedmosaic.privacy.encryption.aggregator import Aggregator, Combination, Contribution
from fedmosaic.privacy.encryption.ckks.aggregation import CkksAggregator
from fedmosaic.privacy.encryption.mask.aggregation import MaskAggregator
from fedmosaic.privacy.encryption.records import HEADER_BYTES, RoundContext
from fedmosaic.privacy.policy import AggregationPolicy
from fedmosaic.protos.errors import CiphertextError

_BLOCK = 1 << 22
"""Numbers of all uploads that are summed at once, 16 MiB; large uploads are never all in memory."""


def create_aggregator(
    parameters: back_ends.Parameters, policy: AggregationPolicy, *, allow_plaintext: bool = False
) -> Aggregator[Any]:
    """The server's side of a back end; ConfigurationError if it protects nothing and that was not allowed."""
    back_ends.check_plaintext_allowed(parameters, allow_plaintext=allow_plaintext)
    if isinstance(parameters, back_ends.CkksParameters):
        return CkksAggregator(parameters, policy)
    if isinstance(parameters, back_ends.MaskParameters):
        return MaskAggregator(parameters, policy)
    return PlainAggregator(parameters, policy)


class PlainAggregator(Aggregator[back_ends.PlainParameters]):
    """Server side of the back end `plain`."""

    def _check_payload(self, contribution: Contribution, context: RoundContext) -> None:
        self._values(contribution)

    def _combine(self, work: Combination) -> list[memoryview]:
        values = [self._values(item) for item in work.contributions]
        # At most 20 bits: exact in float32.
        shares = np.ldexp(work.weights.astype(np.float32), -self.parameters.weight_bits)
        start = HEADER_BYTES // 4
        records = np.empty((len(work.rows), start + work.context.dimensions), dtype="<f4")
        records[:, :start] = np.frombuffer(b"".join(work.headers), dtype="<f4").reshape(len(work.rows), -1)
        width = max(1, _BLOCK // len(values))
        for column in range(0, work.context.dimensions, width):
            block = np.stack([vector[column : column + width] for vector in values])
            records[:, start + column : start + column + width] = shares @ block
        return [record.data.cast("B").toreadonly() for record in records]

    def _values(self, contribution: Contribution) -> NDArray[np.float32]:
        values = np.frombuffer(contribution.payload, dtype="<f4").astype(np.float32, copy=False)
        # Written so that NaN fails too.
        if not (values.min() >= -self.parameters.clip and values.max() <= self.parameters.clip):
            unusable = int(np.count_nonzero(~np.isfinite(values)))
            bare = f"values outside ±{self.parameters.clip}"
            what = f"{unusable} values that are NaN or infinite" if unusable else bare
            raise CiphertextError(f"upload of {contribution.client!r} holds {what}")
        return values
