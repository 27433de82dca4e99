"""Who adds up with whom: groups of clients with like task profiles, and how each mixes the groups' sums.

Pure functions of the profiles, which are differentially private releases, so groups cost no budget. A group
of fewer than the least number of contributors could form no sum; its members join the nearest one.

Shape legend: N clients, R groups.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from fedmosaic.privacy.secureaggregation.partition import Partition
from fedmosaic.server.round.relevance import FloatArray, Relevance


def group_clients(
    clients: Sequence[str], relevance: Relevance, groups: int, least: int
) -> tuple[tuple[str, ...], ...]:
    """Divide clients into groups by average linkage of their similarity.

    Args:
        clients: N names in the order of `relevance`'s rows.
        relevance: similarity of all clients; NaN where a profile is missing.
        groups: R at most.
        least: members that a group must have; with fewer than 2·least clients there is one group.

    Returns:
        Groups of names in ascending order, by their first member. A client without a significant profile is
        in the largest group: nothing says where it fits.

    Reference:
        Sokal and Michener 1958 (average linkage), as used for federated clients by Briggs, Fan and Andras,
        "Federated learning with hierarchical clustering of local updates", IJCNN 2020.
    """
    order = sorted(range(len(clients)), key=lambda index: clients[index])
    known = [index for index in order if relevance.significant[index]]
    similarity_NN = np.where(np.isfinite(relevance.similarity), relevance.similarity, 0.0)
    found: list[list[int]] = [known]
    if groups > 1 and len(known) >= 2 * least:
        distance_NN = 1.0 - similarity_NN[np.ix_(known, known)]
        np.fill_diagonal(distance_NN, 0.0)
        tree = linkage(squareform(np.clip(distance_NN, 0.0, 2.0), checks=False), method="average")
        labels = fcluster(tree, groups, criterion="maxclust")
        found = [[known[k] for k in np.flatnonzero(labels == label)] for label in np.unique(labels)]
    large = [group for group in found if len(group) >= least] or [
        [index for group in found for index in group]
    ]
    placed = {index for group in large for index in group}
    centres = [list(group) for group in large]
    for index in (index for index in known if index not in placed):
        nearest = max(range(len(large)), key=lambda r: float(similarity_NN[index, centres[r]].mean()))
        large[nearest].append(index)
    largest = max(large, key=len)
    largest.extend(index for index in order if index not in set(known))
    return tuple(sorted(tuple(sorted(clients[index] for index in group)) for group in large if group))


def divide(
    families: Mapping[str, str], relevance: Relevance, most: int, least: int, temperature: float
) -> Partition:
    """Groups of one family each, and how each client mixes those of its own; see the two functions beside.

    `families` has the family by client, in the order of `relevance`'s rows. There are at most so many groups
    in all, as many in each family, and at least one.
    """
    clients, each = list(families), max(1, most // len(set(families.values())))
    groups: list[tuple[str, ...]] = []
    mixing: dict[str, tuple[float, ...]] = {}
    for family in sorted(set(families.values())):
        kin = [index for index, client in enumerate(clients) if families[client] == family]
        names = [clients[index] for index in kin]
        own = Relevance(relevance.similarity[np.ix_(kin, kin)], relevance.significant[kin])
        found = group_clients(names, own, each, least)
        before, after = (0.0,) * len(groups), len(found)
        mixed = mixing_weights(names, own, found, temperature)
        mixing = {client: (*row, *(0.0,) * after) for client, row in mixing.items()}
        mixing |= {client: (*before, *row) for client, row in mixed.items()}
        groups.extend(found)
    return Partition(groups=tuple(groups), mixing=mixing)


def mixing_weights(
    clients: Sequence[str], relevance: Relevance, groups: Sequence[Sequence[str]], temperature: float
) -> dict[str, tuple[float, ...]]:
    """How each client mixes the group sums: a softmax of its similarity to the groups' members.

        M_ir = exp(S̄_ir / τ) / Σ_s exp(S̄_is / τ),    S̄_ir the mean of S_ij over the members j ≠ i of group r

    The N clients are in the order of `relevance`'s rows; by client, R weights for the R groups, which add up
    to 1. A client without a significant profile mixes its own group alone.

    Reference:
        FedMosaic (arXiv 2506.11024): softmax with temperature, over groups in place of single members.
    """
    similarity_NN: FloatArray = np.where(np.isfinite(relevance.similarity), relevance.similarity, 0.0)
    position = {client: index for index, client in enumerate(clients)}
    weights: dict[str, tuple[float, ...]] = {}
    for client, index in position.items():
        own = [float(client in group) for group in groups]
        if not relevance.significant[index]:
            weights[client] = tuple(own)
            continue
        others = [[position[name] for name in group if name != client] for group in groups]
        mean_R = np.array([similarity_NN[index, members].mean() if members else 1.0 for members in others])
        exponentials_R = np.exp((mean_R - mean_R.max()) / temperature)
        weights[client] = tuple((exponentials_R / exponentials_R.sum()).tolist())
    return weights
