"""Sums of groups: a server and members that work together, that add no noise, and that split the group.

Everything runs on the product's own shares and secure sums. The victim's examples are canaries of norm C, one
per coordinate, each there by a fair coin. Whoever attacks knows all but the coins and others' noise.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmosaic.experiments.attacks.statistics import results
from fedmosaic.experiments.attacks.statistics.empirical import CanaryScores, audit_figures, epsilon_of_noise
from fedmosaic.privacy.accounting.leverage import effective_noise_multiplier, noise_share
from fedmosaic.privacy.federation.terms import GroupSumTerms
from fedmosaic.privacy.mechanism.gaussian import ClippedSum
from fedmosaic.privacy.mechanism.noise import NoiseSource
from fedmosaic.privacy.mechanism.shares import noisy_share, plan_grid
from fedmosaic.privacy.secureaggregation.collector import SumCollector
from fedmosaic.privacy.secureaggregation.masks import Masks, pair_mask_key, private_key, to_words, unpack
from fedmosaic.privacy.secureaggregation.member import SumMember
from fedmosaic.privacy.secureaggregation.messages import transcript
from fedmosaic.privacy.secureaggregation.partition import NO_ROUND, Partition, sum_context
from fedmosaic.privacy.secureaggregation.terms import SumTerms

SUMS: Final = "Sums of groups"
_FEDERATION: Final = "attacked"


class Group:
    """Members of one group with their keys, and the terms of a round's sum."""

    def __init__(self, size: int, sums: GroupSumTerms, dimensions: int) -> None:
        self.sums, self.dimensions = sums, dimensions
        self.names = tuple(f"m{number:03}" for number in range(size))
        self.identities = {name: Ed25519PrivateKey.generate() for name in self.names}
        self.partition = Partition(groups=(self.names,), mixing=dict.fromkeys(self.names, (1.0,)))

    def terms(self, round_number: int = 2, partition: Partition | None = None) -> SumTerms:
        """As the members of a partition agree on them."""
        shown = partition or self.partition
        context = sum_context(_FEDERATION, "run", round_number, bytes(32), shown, NO_ROUND)
        keys = {name: key.public_key().public_bytes_raw() for name, key in self.identities.items()}
        return shown.terms(context, keys, self.sums, self.dimensions)[0]

    def members(self, terms: SumTerms) -> dict[str, SumMember]:
        """Fresh ones."""
        return {name: SumMember(terms, name, self.identities[name]) for name in self.names}

    def shared(self, names: Collection[str] = ()) -> tuple[SumCollector, dict[str, SumMember]]:
        """A server and its members after the envelopes; only the named ones are shown to each other."""
        terms = self.terms()
        server, members = SumCollector(terms), self.members(terms)
        taking_part = sorted(names or self.names)
        for name in taking_part:
            server.add_opening(name, members[name].open())
        openings = server.close_openings()
        for name in taking_part:
            sealed = members[name].share(openings)
            server.add_envelopes(name, b"".join(sealed[other] for other in sorted(sealed)))
        return server, {name: members[name] for name in taking_part}

    def total(self, vectors: Mapping[str, np.ndarray]) -> np.ndarray:
        """The sum that the server is left with, over the members whose vectors are given."""
        server, members = self.shared(vectors)
        for name, member in members.items():
            member.accept(server.envelopes_for(name))
            server.add_vector(name, member.mask(vectors[name]))
        survivors = server.close_vectors()
        for name, member in members.items():
            server.add_signature(name, member.agree(survivors))
        for name, member in members.items():
            server.add_unmasking(name, member.unmask(server.signatures()))
        return server.finish()


@dataclass(frozen=True)
class Coalition:
    """Who attacks: members that tell the server all they have, members that add no noise.

    If the terms' claim does not cover them (`within`), a member's own noise is all that is promised. With
    `split` the server shows half of a group of twice the size nothing of the other half.
    """

    words: str
    colluders: int
    silent: int
    within: bool
    split: bool = False


def coalitions(sums: GroupSumTerms) -> tuple[Coalition, ...]:
    """Up to what the terms assume, one more, and everybody but the victim."""
    t, m = sums.colluders, sums.minimum_contributors
    return (
        Coalition("the server alone", 0, 0, True),
        Coalition(f"the server and {t} members (t)", t, 0, True),
        Coalition(f"the server, and {t} members that add no noise (t)", 0, t, True),
        Coalition(f"the server and {t} members of one half, shown no other keys", t, 0, True, split=True),
        Coalition(f"the server and {t + 1} members (t + 1)", t + 1, 0, False),
        Coalition(f"the server, and {t + 1} members that add no noise (t + 1)", 0, t + 1, False),
        Coalition(f"the server and all other {m - 1} members", m - 1, 0, False),
    )


def sum_results(
    sums: GroupSumTerms,
    sigma: float,
    noise: NoiseSource,
    coins: np.random.Generator,
    *,
    canaries: int,
    setting: results.Setting,
) -> Iterator[results.AttackResult]:
    """What each coalition reads out of one sum of the least number of contributors, beside the claim."""
    m, t = sums.minimum_contributors, sums.colluders
    share = noise_share(sigma, m, t)
    for coalition in coalitions(sums):
        included = coins.random(canaries) < 0.5
        scores = _scores(sums, share, coalition, noise, included)
        claimed = epsilon_of_noise(sigma if coalition.within else share)
        left = epsilon_of_noise(effective_noise_multiplier(share, m, coalition.colluders + coalition.silent))
        # The noise of one coordinate is independent of another's, so every canary is a release of its own.
        pair = audit_figures(CanaryScores(scores[included], scores[~included]), claimed)
        certified = (*pair, results.Figure.exact("ε of the noise that is left", left))
        yield results.AttackResult(
            attack=SUMS,
            adversary="malicious server with members of the group",
            sees="one secure sum of the least number of contributors, all data but the coins, its members' "
            "noise",
            statistic=f"the sum less what is known, at each of {scores.size:,} canaries",
            release=coalition.words,
            setting=setting if coalition.within else "variant",
            epsilon=claimed,
            figures=certified,
            note=f"up to t members the claim is ε = {epsilon_of_noise(sigma):.3g} of one sum; beyond t only "
            "a member's own noise is promised, and more than the claim is read, as must be",
        )
    yield _late_vector(sums, setting)


def _scores(
    sums: GroupSumTerms, share: float, coalition: Coalition, noise: NoiseSource, included: np.ndarray
) -> np.ndarray:
    """(canaries,) the sum less what the coalition knows, in units of C."""
    m, canaries = sums.minimum_contributors, len(included)
    group = Group(2 * m if coalition.split else m, sums, canaries)
    grid = plan_grid(len(group.names), 1, share, sums.bits)
    nothing = ClippedSum.empty(canaries)
    vectors = {name: noisy_share(nothing, grid, noise) for name in group.names[1:m]}
    vectors |= {name: np.zeros_like(nothing.units) for name in group.names[1 : 1 + coalition.silent]}
    own = ClippedSum(included * grid.steps, 0, 0, int(included.sum()))
    vectors[group.names[0]] = noisy_share(own, grid, noise)
    known = sum(vectors[name] for name in group.names[1 : 1 + coalition.colluders])
    return np.asarray((group.total(vectors) - known) / grid.steps)


def _late_vector(sums: GroupSumTerms, setting: results.Setting) -> results.AttackResult:
    """The server tells the others that the victim vanished, and its vector comes late: t members help."""
    size = 64
    group = Group(max(sums.minimum_contributors + 1, 3 * sums.colluders + 2), sums, size)
    server, members = group.shared()
    victim, *others = group.names
    truth = np.arange(size, dtype=np.int64)
    for name, member in members.items():
        member.accept(server.envelopes_for(name))
    masked = members[victim].mask(truth)
    for name in others:
        server.add_vector(name, members[name].mask(truth))
    signatures = {name: members[name].agree(server.close_vectors()) for name in others}
    for name in others:
        members[name].unmask(signatures)
    # With its mask key, which those who are left give away, the pairwise masks come off; its own stays.
    openings, terms = server.close_openings(), group.terms()
    key = private_key(members[victim]._mask_seed, terms.digest)
    guess, masks = unpack(masked, size, sums.bits).copy(), Masks(size, sums.bits)
    for name in others:
        pair = (victim, name)
        shared = pair_mask_key(key, openings[name].mask_key, transcript(terms, openings), pair)
        guess = guess - masks.of(shared) if victim < name else guess + masks.of(shared)
    wrong = np.bitwise_count((guess ^ to_words(truth, sums.bits)) & np.uint32(2**32 - 1))
    hits, tried = int(32 * size - wrong.sum()), 32 * size
    figure = results.Figure.share("bits read right", hits, tried)
    sure, _ = results.clopper_pearson(hits, tried, 1.0 - 2.0 * results.ALARM_LEVEL)
    return results.AttackResult(
        attack=SUMS,
        adversary="malicious server with members of the group",
        sees="a vector that came late, and all shares that are given for those who vanished",
        statistic="pairwise masks taken off",
        release="a late vector",
        setting=setting,
        figures=(figure.model_copy(update={"bound": 0.5, "broken": sure > 0.5}),),
    )


def sum_refusals(sums: GroupSumTerms) -> tuple[results.RefusalResult, ...]:
    """What a server may try with a group, each against a member's real part in a sum."""
    return tuple(
        results.RefusalResult.of(
            f"sums: {words}", "server", partial(attempt, Group(2 * sums.minimum_contributors, sums, 8))
        )
        for words, attempt in _ATTEMPTS.items()
    )


def _share_with_others(group: Group, own: SumTerms, others: SumTerms) -> None:
    """A victim on its own terms is shown openings that the others made on theirs."""
    name, members = group.names[0], group.members(others)
    victim = SumMember(own, name, group.identities[name])
    victim.share({name: victim.open(), **{other: members[other].open() for other in group.names[1:]}})


def _few_masks(group: Group) -> None:
    server, members = group.shared()
    victim = group.names[0]
    few = dict(itertools.islice(server.envelopes_for(victim).items(), group.sums.minimum_contributors))
    members[victim].accept(few)


def _other_keys(group: Group) -> None:
    """Halves are shown different keys, and a member of one the envelopes of the other."""
    names, middle = group.names, len(group.names) // 2
    server, members = group.shared(names[:middle])
    others, _ = group.shared(names[middle - 1 :])
    foreign = {name: next(iter(others.envelopes_for(names[-1]).values())) for name in names[1:middle]}
    members[names[0]].accept(server.envelopes_for(names[0]) | foreign)


def _masked(group: Group) -> dict[str, SumMember]:
    server, members = group.shared()
    for name, member in members.items():
        member.accept(server.envelopes_for(name))
        server.add_vector(name, member.mask(np.zeros(group.dimensions, dtype=np.int64)))
    return members


def _two_lists(group: Group) -> None:
    members = _masked(group)
    lists = (group.names[:-1], group.names[1:])
    signed: tuple[dict[str, bytes], dict[str, bytes]] = ({}, {})
    for number, name in enumerate(group.names[1:-1]):
        signed[number % 2][name] = members[name].agree(lists[number % 2])
    members[group.names[1]].unmask(signed[0])


def _check_groups(group: Group, groups: tuple[tuple[str, ...], ...], member: str) -> None:
    shown = Partition(groups=groups, mixing=dict.fromkeys(group.names, (1.0, 0.0)))
    shown.check(member, dict.fromkeys(group.names, ""), group.sums.minimum_contributors, 2)


_ATTEMPTS: Final[Mapping[str, Callable[[Group], object]]] = {
    "two members are shown different groups or weights": lambda g: _share_with_others(
        g,
        g.terms(),
        g.terms(partition=g.partition.model_copy(update={"mixing": dict.fromkeys(g.names, (0.5,))})),
    ),
    "openings of an earlier round replayed": lambda g: _share_with_others(g, g.terms(3), g.terms(2)),
    "a half of fewer than m_min is shown no other keys": lambda g: g.shared(
        g.names[: g.sums.minimum_contributors - 1]
    ),
    "masks in common with a few members alone, who then vanish": _few_masks,
    "halves with different keys are brought together again": _other_keys,
    "a list of fewer than m_min contributors": lambda g: _masked(g)[g.names[0]].agree(
        g.names[: g.sums.minimum_contributors - 1]
    ),
    "two lists of contributors, half of the members each": _two_lists,
    "a second vector for a sum": lambda g: _masked(g)[g.names[0]].mask(
        np.zeros(g.dimensions, dtype=np.int64)
    ),
    "groups that overlap": lambda g: _check_groups(g, (g.names, g.names[1:]), g.names[1]),
    "a group of one": lambda g: _check_groups(g, (g.names[:1], g.names[1:]), g.names[0]),
}
