"""Who gets which combination of the uploads, and when a combination is refused.

From relevance to integer weight rows that keep the policy. The sums themselves are the back end's work;
blocks of different architectures are matched by their index in the shared vector's layout.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedmosaic.privacy.encryption.weights import integer_weights
from fedmosaic.privacy.policy import AggregationPolicy, WeightRow, cap_weights, check_row
from fedmosaic.protos.errors import PolicyError
from fedmosaic.protos.messages import SectionName
from fedmosaic.server.relevance import FloatArray, Relevance, softmax_weights


@dataclass(frozen=True)
class Group:
    """Members that share one section: everybody, or one family.

    Attributes:
        section: "shared" or "family".
        family: name of the family; empty for the shared section.
        dimensions: length of the vector.
        contributors: who uploaded it in this round.
        recipients: who is to receive it.
    """

    section: SectionName
    family: str
    dimensions: int
    contributors: frozenset[str]
    recipients: frozenset[str]

    @property
    def label(self) -> str:
        """Name of the vector: "shared", or "family:" and the family."""
        return f"family:{self.family}" if self.family else self.section


@dataclass(frozen=True)
class Plan:
    """What a group will receive.

    Attributes:
        group: the group.
        rows: one weight row per recipient that gets an aggregate, by recipient.
        refusals: why a recipient gets none, by recipient.
    """

    group: Group
    rows: Mapping[str, WeightRow]
    refusals: Mapping[str, str]


def section_label(section: SectionName, family: str) -> str:
    """Name under which a back end binds a vector: "shared", or "family:" and the family."""
    return "shared" if section == "shared" else f"family:{family}"


def groups(
    uploaded: Mapping[str, Collection[SectionName]],
    recipients: Collection[str],
    families: Mapping[str, str],
    shared_dimensions: int,
    family_dimensions: Mapping[str, int],
) -> list[Group]:
    """The shared section, and one group for every family that shares.

    Args:
        uploaded: section names of every client's upload of this round.
        recipients: everybody who is to receive.
        families: family in which a client shares, by client.
        shared_dimensions: length of the shared vector.
        family_dimensions: length of each sharing family's vector.
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
    *,
    round_number: int,
    temperature: float,
    policy: AggregationPolicy,
    bits: int,
) -> Plan:
    """Weight rows of one group.

    Every recipient's softmax runs over the group's contributors but itself, is capped, and is rounded to
    integers that sum to 2**bits. Contributors whose weight rounds to zero are left out of the row.

    Args:
        group: who contributes and who receives.
        clients: order of the rows and columns of `relevance`.
        relevance: similarity of all clients.
        round_number: round of the uploads.
        temperature: τ of the softmax.
        policy: limits on every row.
        bits: precision of the weights.

    Returns:
        Rows, and refusals where the policy cannot be kept.
    """
    present = np.array([client in group.contributors for client in clients], dtype=bool)
    wanted = np.array([client in group.recipients for client in clients], dtype=bool)
    weights_NN = softmax_weights(relevance, temperature, present, wanted)
    rows: dict[str, WeightRow] = {}
    refusals: dict[str, str] = {}
    for index, recipient in enumerate(clients):
        if not wanted[index]:
            continue
        try:
            rows[recipient] = _row(recipient, weights_NN[index], clients, policy, bits, round_number)
        except PolicyError as error:
            refusals[recipient] = f"round {round_number}, {group.label}: {error}"
    return Plan(group, rows, refusals)


def _row(
    recipient: str,
    weights_N: FloatArray,
    clients: Sequence[str],
    policy: AggregationPolicy,
    bits: int,
    round_number: int,
) -> WeightRow:
    contributors = [client for client, weight in zip(clients, weights_N, strict=True) if weight > 0.0]
    if len(contributors) < policy.minimum_contributors:
        raise PolicyError(
            f"{len(contributors)} contributors other than the recipient, at least "
            f"{policy.minimum_contributors} are required"
        )
    shares = cap_weights(weights_N[weights_N > 0.0].tolist(), policy.weight_cap)
    integers = integer_weights(np.array(shares), bits)
    kept = [(name, int(w)) for name, w in zip(contributors, integers, strict=True) if w > 0]
    row = WeightRow(round_number, recipient, tuple(name for name, _ in kept), tuple(w for _, w in kept), bits)
    check_row(recipient, row, policy, round_number=round_number)
    return row
