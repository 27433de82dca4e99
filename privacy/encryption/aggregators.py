"""Choose a back end, at the server."""

from typing import Any

from fedmosaic.privacy.encryption.aggregator import Aggregator
from fedmosaic.privacy.encryption.ckks.aggregation import CkksAggregator
from fedmosaic.privacy.encryption.mask.aggregation import MaskAggregator
from fedmosaic.privacy.encryption.parameters import (
    CkksParameters,
    MaskParameters,
    Parameters,
    check_plaintext_allowed,
)
from fedmosaic.privacy.encryption.plain.aggregation import PlainAggregator
from fedmosaic.privacy.policy import AggregationPolicy


def create_aggregator(
    parameters: Parameters, policy: AggregationPolicy, *, allow_plaintext: bool = False
) -> Aggregator[Any]:
    """Return the server's side of a back end.

    Args:
        parameters: Agreed parameters; their type names the back end.
        policy: Limits for weight rows, checked as a courtesy.
        allow_plaintext: Must be true for `plain`.

    Raises:
        ConfigurationError: If the parameters protect nothing and that was not allowed.
    """
    check_plaintext_allowed(parameters, allow_plaintext=allow_plaintext)
    if isinstance(parameters, CkksParameters):
        return CkksAggregator(parameters, policy)
    if isinstance(parameters, MaskParameters):
        return MaskAggregator(parameters, policy)
    return PlainAggregator(parameters, policy)
