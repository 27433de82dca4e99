"""Who gets which combination of the uploads, and when a combination is refused.

From relevance to integer weight rows that keep the policy, and of which no two solve for a single adapter
where that can be had. The sums themselves are the back end's work; blocks of different architectures are
matched by their index in the shared vector's layout.
"""

import hashlib
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedmosaic.privacy.coalitions import SOLVED, close_pairs, estimate_errors, pair_errors
from fedmosaic.privacy.policy import (
    AggregationPolicy,
    cap_weights,
    check_row,
    integer_weights,
    spread_weights,
)
from fedmosaic.protos.errors import PolicyError
from fedmosaic.protos.messages import SectionName, WeightRow
from fedmosaic.server.round.relevance import FloatArray, Relevance, softmax_weights

_TILTS: Final = 10
"""Rows that are tried for a recipient beside the one that relevance asks for."""
_TILT: Final = 0.025
"""How much further each of them moves a weight at most; the last one by a quarter."""


def section_label(section: SectionName, family: str) -> str:
    """Name under which a back end binds a vector: "shared", or "family:" and the family."""
    return "shared" if section == "shared" else f"family:{family}"


@dataclass(frozen=True)
class Group:
    """Members that share one section: everybody, or one family, whose name is empty for everybody.

    `contributors` have uploaded the vector, of length `dimensions`; `recipients` are to receive it.
    """

    section: SectionName
    family: str
    dimensions: int
    contributors: frozenset[str]
    recipients: frozenset[str]

    @property
    def label(self) -> str:
        """Name of the vector: "shared", or "family:" and the family."""
        return section_label(self.section, self.family)


@dataclass(frozen=True)
class Plan:
    """What a group will receive: a weight row for each recipient, or why it gets none."""

    group: Group
    rows: Mapping[str, WeightRow]
    refusals: Mapping[str, str]
    smallest_coalition: int | None
    """Recipients who together solve for an adapter with these rows: 1, 2, or None where that takes more."""


def groups(
    uploaded: Mapping[str, Collection[SectionName]],
    recipients: Collection[str],
    families: Mapping[str, str],
    shared_dimensions: int,
    family_dimensions: Mapping[str, int],
) -> list[Group]:
    """The shared section, and one group for every family that shares.

    `uploaded` has the section names of every client's upload of this round, `families` the family in which a
    client shares, `family_dimensions` the length of each family's vector.
    """
    everybody = frozenset(client for client, sections in uploaded.items() if "shared" in sections)
    found = [Group("shared", "", shared_dimensions, everybody, frozenset(recipients))]
    for family in sorted(family_dimensions):
        kin = {client for client, name in families.items() if name == family}
        contributors = frozenset(c for c, sections in uploaded.items() if "family" in sections and c in kin)
        found.append(
            Group("family", family, family_dimensions[family], contributors, frozenset(kin & set(recipients)))
        )
    return found


def plan(
    group: Group,
    clients: Sequence[str],
    relevance: Relevance,
    temperature: float,
    policy: AggregationPolicy,
    bits: int,
    families: Sequence[str] = (),
) -> Plan:
    """Weight rows of one group.

    Every recipient's softmax runs over the group's contributors but itself, is capped and spread, and is
    rounded to integers that sum to 2**bits. Contributors whose weight rounds to zero are left out of the row.
    A row that, with the row of an earlier recipient (by name), solves for a single adapter is tilted: each
    weight is moved by up to some per cent, up or down, until no pair does. Between four members nothing
    helps, two equations being enough for two unknowns. Where the policy promises more than one recipient
    (`AggregationPolicy.withstands`), the later of the two is then refused.

    The clients are in the order of `relevance`'s rows and columns; their families are given if each is to
    receive from its own only.
    """
    present = np.array([client in group.contributors for client in clients], dtype=bool)
    wanted = np.array([client in group.recipients for client in clients], dtype=bool)
    weights_NN = softmax_weights(relevance, temperature, present, wanted, families)
    made = _Rows(clients, policy, bits)
    rows: dict[str, WeightRow] = {}
    refusals: dict[str, str] = {}
    pair_solves = False
    for index in sorted(np.flatnonzero(wanted).tolist(), key=lambda i: clients[i]):
        try:
            rows[clients[index]], solved = made.add(index, weights_NN[index])
            pair_solves |= solved
        except PolicyError as error:
            refusals[clients[index]] = str(error)
    one_solves = any(estimate_errors(row_N[None, :]).min() < SOLVED for row_N in made.shares_RN)
    return Plan(group, rows, refusals, 1 if one_solves else 2 if pair_solves else None)


class _Rows:
    """Rows of a group that are made one after the other, each with a look at those before it."""

    def __init__(self, clients: Sequence[str], policy: AggregationPolicy, bits: int) -> None:
        self._clients = clients
        self._policy = policy
        self._bits = bits
        self._order: list[int] = []
        self._table_NN = np.zeros((len(clients), len(clients)))
        self._squares_N, self._peaks_N = np.zeros((2, len(clients)))

    @property
    def shares_RN(self) -> FloatArray:
        """(R, N) shares of the rows that were made, one a recipient."""
        return self._table_NN[: len(self._order)]

    def add(self, index: int, weights_N: FloatArray) -> tuple[WeightRow, bool]:
        """A row with which no pair solves for an adapter, if there is one, and whether a pair does.

        PolicyError if the policy cannot be kept.
        """
        recipient = self._clients[index]
        chosen, solves = self._row(recipient, weights_N), True
        candidates = itertools.chain((chosen,), self._tilted(recipient, weights_N))
        for row in candidates:
            if not self._solves(index, self._shares(row)):
                chosen, solves = row, False
                break
        if solves and self._policy.withstands > 1:
            raise PolicyError(
                f"{self._policy.withstands} recipients together must not solve for an adapter, and no row of "
                "this one was found with which none could: more contributors are needed"
            )
        made, shares_N = len(self._order), self._shares(chosen)
        self._table_NN[made] = shares_N
        self._squares_N[made], self._peaks_N[made] = (shares_N**2).sum(), (shares_N**2).max()
        self._order.append(index)
        return chosen, solves

    def _solves(self, index: int, shares_N: FloatArray) -> bool:
        """Whether a row, with one of those before it, solves for an adapter."""
        made = len(self._order)
        known = self._squares_N[:made], self._peaks_N[:made]
        close = close_pairs(index, shares_N, self._order, self.shares_RN, *known)
        others = [self._order[position] for position in close]
        errors = pair_errors(index, shares_N, others, self.shares_RN[close])
        return bool(errors.min(initial=1.0) < SOLVED)

    def _tilted(self, recipient: str, weights_N: FloatArray) -> Iterator[WeightRow]:
        """Rows beside the one that relevance asks for; one that breaks the policy is left out."""
        for step in range(1, _TILTS + 1):
            # Factors around 1 by names, and so the same on every machine.
            digests = (hashlib.sha256(f"{recipient}/{c}/{step}".encode()).digest() for c in self._clients)
            signs_N = np.array([int.from_bytes(digest[:4], "little") / 2**31 - 1.0 for digest in digests])
            with suppress(PolicyError):
                yield self._row(recipient, weights_N * (1.0 + _TILT * step * signs_N))

    def _row(self, recipient: str, weights_N: FloatArray) -> WeightRow:
        policy, bits = self._policy, self._bits
        contributors = [client for client, weight in zip(self._clients, weights_N, strict=True) if weight > 0]
        if len(contributors) < policy.minimum_contributors:
            raise PolicyError(
                f"{len(contributors)} contributors other than the recipient, at least "
                f"{policy.minimum_contributors} are required"
            )
        shares = cap_weights(weights_N[weights_N > 0.0].tolist(), policy.weight_cap)
        integers = integer_weights(np.array(spread_weights(shares, policy.squares_cap, bits)), bits)
        kept = [(name, int(w)) for name, w in zip(contributors, integers, strict=True) if w > 0]
        names, weights = tuple(name for name, _ in kept), tuple(w for _, w in kept)
        row = WeightRow(names, weights, bits)
        check_row(recipient, row, policy)
        return row

    def _shares(self, row: WeightRow) -> FloatArray:
        """(N,) shares of a row; zeros for those it leaves out."""
        found = dict(zip(row.contributors, row.weights, strict=True))
        return np.array([found.get(client, 0) for client in self._clients]) / 2.0**row.bits
