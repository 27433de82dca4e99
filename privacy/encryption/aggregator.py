"""The server's side of every back end: one interface, and all checks around the payload. No keys here."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedmosaic.privacy.encryption.parameters import CkksParameters, MaskParameters, PlainParameters
from fedmosaic.privacy.encryption.records import RoundContext, aggregate_header, read_upload, row_digest
from fedmosaic.privacy.policy import AggregationPolicy, check_row
from fedmosaic.protos.messages import WeightRow

P = TypeVar("P", CkksParameters, MaskParameters, PlainParameters)


class Contribution(NamedTuple):
    """A checked upload, taken apart: its nonce of 16 bytes, and a view of the bytes after the header."""

    client: str
    nonce: bytes
    payload: memoryview


class Combination(NamedTuple):
    """What is summed, and for whom: M contributions, the columns of (R, M) weights; R rows and headers."""

    contributions: Sequence[Contribution]
    weights: NDArray[np.int64]
    rows: Sequence[WeightRow]
    headers: Sequence[bytes]
    context: RoundContext


class Aggregator(ABC, Generic[P]):
    """Forms the weighted sum of every recipient; the policy is checked as a courtesy, clients check again."""

    def __init__(self, parameters: P, policy: AggregationPolicy) -> None:
        self.parameters: P = parameters
        self.policy = policy
        self._last: tuple[object, Sequence[str], NDArray[np.int64]] = (None, (), np.zeros((0, 0), np.int64))

    def check_upload(self, upload: bytes | memoryview, context: RoundContext, client: str) -> None:
        """Refuse a signed upload that is not what this client must send in this round."""
        nonce, payload = read_upload(self.parameters, context, client, upload)
        self._check_payload(Contribution(client, nonce, payload), context)

    def aggregate(
        self, uploads: Mapping[str, bytes | memoryview], rows: Mapping[str, WeightRow], context: RoundContext
    ) -> list[memoryview]:
        """Form the weighted sum of every row; one aggregate per row, in the order of the rows.

        There may be more uploads, by contributor, than the rows use. PolicyError if a row breaks the policy,
        CiphertextError if an upload in use is malformed.
        """
        if not rows:
            return []
        names, weights = self._checked(rows, frozenset(uploads))
        headers = []
        for recipient, row in rows.items():
            header = aggregate_header(self.parameters, context, row, recipient)
            headers.append(header.encode(row_digest(row, recipient, context.round)))
        contributions = [
            Contribution(name, *read_upload(self.parameters, context, name, uploads[name])) for name in names
        ]
        return self._combine(Combination(contributions, weights, tuple(rows.values()), headers, context))

    def _checked(
        self, rows: Mapping[str, WeightRow], contributors: frozenset[str]
    ) -> tuple[Sequence[str], NDArray[np.int64]]:
        """Who is in rows that keep the policy, and their (R, M) weights; those of the last call are kept."""
        asked = tuple(rows.items()), contributors
        known, names, weights = self._last
        if known != asked:
            for recipient, row in rows.items():
                check_row(recipient, row, self.policy, members=contributors, bits=self.parameters.weight_bits)
            names = sorted(frozenset().union(*(row.contributors for row in rows.values())))
            weights = _weight_matrix(tuple(rows.values()), names)
            weights.flags.writeable = False
            self._last = asked, names, weights
        return names, weights

    @abstractmethod
    def _check_payload(self, contribution: Contribution, context: RoundContext) -> None:
        """Refuse a payload of the right length whose content is out of range."""

    @abstractmethod
    def _combine(self, work: Combination) -> list[memoryview]:
        """Return one record per row; the content of the contributions is not yet checked."""


def _weight_matrix(rows: Sequence[WeightRow], names: Sequence[str]) -> NDArray[np.int64]:
    """Return (R, M): the weight of every name in every row, zero where a row does not have it."""
    column = {name: index for index, name in enumerate(names)}
    lengths = [len(row.weights) for row in rows]
    contributors = itertools.chain.from_iterable(row.contributors for row in rows)
    columns = np.fromiter(map(column.__getitem__, contributors), dtype=np.intp, count=sum(lengths))
    values = itertools.chain.from_iterable(row.weights for row in rows)
    weights = np.zeros((len(rows), len(names)), dtype=np.int64)
    positions = np.repeat(np.arange(len(rows)), lengths), columns
    weights[positions] = np.fromiter(values, dtype=np.int64, count=sum(lengths))
    return weights
