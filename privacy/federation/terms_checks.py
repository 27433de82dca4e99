"""Whether clients can plan their noise under a federation's terms, asked when it is founded."""

import logging
import math
from collections.abc import Sequence
from typing import Final

from fedmosaic.privacy.accounting.calibrate import check_plannable, noise_multiplier_for
from fedmosaic.privacy.accounting.epsilon import default_delta
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.accounting.leverage import noise_share
from fedmosaic.privacy.federation.kits import MemberEntry, lonely
from fedmosaic.privacy.federation.terms import Terms
from fedmosaic.privacy.mechanism.shares import plan_grid
from fedmosaic.privacy.secureaggregation.partition import Partition, RoundTotals
from fedmosaic.protos import bounds
from fedmosaic.protos.errors import AccountingError, ConfigurationError, MechanismError

log = logging.getLogger(__name__)
MOST_STEPS: Final = 500_000
"""Private steps of a run. One evaluation of ε takes 30 s at 400,000 steps on a processor's core, and every
round's charge needs one."""

LARGEST_DELTA: Final = 1e-5
_LARGEST_CLIENT: Final = 1_000_000
_LONGEST_NUMBER: Final = 1.2345678901234567e-100


def settled(terms: Terms, members: Sequence[MemberEntry]) -> Terms:
    """Terms on which these members can found a federation, noise written in; else ConfigurationError."""
    if problem := lonely(members, terms):
        raise ConfigurationError(problem)
    check_plan(terms, len(members))
    terms = with_planned_noise(terms, len(members))
    check_sums(terms, [member.id for member in members])
    return terms


def check_plan(terms: Terms, members: int) -> None:
    """Refuse terms under which no client's noise can be planned; warn where some clients' cannot.

    Tried for clients of `profile.minimum_examples` to a million examples, each with the default δ.
    """
    if not terms.adapter.private:
        return
    steps, turns = terms.adapter_privacy.steps_per_round, terms.schedule.turns(members)
    if steps * turns > MOST_STEPS:
        raise ConfigurationError(
            f"a member takes part in {turns:,} of schedule.rounds {terms.schedule.rounds:,}, which times "
            f"adapter_privacy.steps_per_round {steps:,} is {steps * turns:,} private steps; every charge "
            f"would take the accountant minutes beyond {MOST_STEPS:,}. Take part in at most "
            f"{max(1, MOST_STEPS // steps):,} rounds of {min(steps, MOST_STEPS):,} steps"
        )
    sizes = sorted({terms.profile.minimum_examples, 1_000, 10_000, 100_000, _LARGEST_CLIENT})
    problems = {n: problem for n in sizes if (problem := _problem(terms, n, steps * turns))}
    if not problems:
        return
    reason = next(iter(problems.values()))
    if len(problems) < len(sizes):
        named = ", ".join(f"{n:,}" for n in problems)
        log.warning("a client of %s examples could not plan its noise under these terms: %s", named, reason)
        return
    raise ConfigurationError(
        f"no client could plan its noise for {turns:,} rounds of {steps:,} private steps: "
        f"{reason}. {_possible(terms, sizes, members)}"
    )


def with_bounded_delta(terms: Terms) -> Terms:
    """Terms with the bound on δ written in, 1e-5 where the founder chose none."""
    if terms.adapter_privacy.largest_delta is not None:
        return terms
    bounded = terms.adapter_privacy.model_copy(update={"largest_delta": LARGEST_DELTA})
    return terms.model_copy(update={"adapter_privacy": bounded})


def with_planned_noise(terms: Terms, members: int) -> Terms:
    """Terms with the noise of group sums written in: equal at all members, so that integers add up."""
    sums = terms.group_sums
    if not terms.adapter.in_group_sums or sums.noise_multiplier is not None:
        return terms
    try:
        sigma = noise_multiplier_for(*_planned_for(terms, sums.least_examples, terms.private_steps(members)))
    except AccountingError as error:
        raise ConfigurationError(
            f"no noise can be planned for members of "
            f"group_sums.least_examples = {sums.least_examples}: {error}"
        ) from None
    # Rounded up, so that the roster says what every machine reads.
    planned = sums.model_copy(update={"noise_multiplier": math.ceil(sigma * 1e6) / 1e6})
    return terms.model_copy(update={"group_sums": planned})


def check_sums(terms: Terms, members: Sequence[str]) -> None:
    """Refuse group sums that a federation of these members could not form, before anything is spent."""
    sums = terms.group_sums
    if not terms.adapter.in_group_sums:
        return
    noise = noise_share(sums.noise_multiplier or 0.0, sums.minimum_contributors, sums.colluders)
    most = terms.schedule.share(len(members), len(members))
    try:
        plan_grid(most, terms.adapter_privacy.expected_batch_size, noise, sums.bits)
    except MechanismError as error:
        raise ConfigurationError(f"terms.group_sums.bits is {sums.bits}: {error}") from None
    names = tuple(sorted(members))
    longest = Partition(groups=(names,), mixing=dict.fromkeys(names, (_LONGEST_NUMBER,) * sums.groups))
    vector = bytes(-(-terms.adapter.shared_dimensions * sums.bits // 8))
    total = RoundTotals(1, (names[:most],), (vector,)).messages()["group-0"]
    for what, message, remedy in (
        ("the groups and their weights", longest.encoded(), "terms.group_sums.groups"),
        ("a sum and the names behind it", total, "terms.adapter.rank or terms.adapter.blocks"),
    ):
        if len(message) > bounds.MAX_CHUNK_BYTES:
            raise ConfigurationError(
                f"{what} may take {len(message):,} bytes with {len(names):,} members, at most "
                f"{bounds.MAX_CHUNK_BYTES:,} can be sent: lower {remedy}, or name members more shortly"
            )


def plan_inputs(terms: Terms, examples: float) -> tuple[list[GaussianEvent], float]:
    """What a client of n examples plans its noise beside, the profile's release, and its sampling rate q."""
    profile = GaussianEvent(terms.profile.noise_multiplier, terms.profile.sampling_rate, 1)
    return [profile], min(1.0, terms.adapter_privacy.expected_batch_size / examples)


def _planned_for(
    terms: Terms, examples: int, steps: int
) -> tuple[float, float, list[GaussianEvent], float, int]:
    privacy = terms.adapter_privacy
    delta = default_delta(examples, privacy.largest_delta)
    return privacy.target_epsilon, delta, *plan_inputs(terms, examples), steps


def _problem(terms: Terms, examples: int, steps: int) -> str:
    try:
        check_plannable(*_planned_for(terms, examples, steps))
    except AccountingError as error:
        return str(error)
    return ""


def _possible(terms: Terms, sizes: list[int], members: int) -> str:
    schedule, per_round = terms.schedule, terms.adapter_privacy.steps_per_round
    while rounds := schedule.rounds // 2:
        schedule = schedule.model_copy(update={"rounds": rounds})
        if not all(_problem(terms, n, per_round * schedule.turns(members)) for n in sizes):
            return f"Schedule.rounds = {rounds} can be planned, or as much fewer steps_per_round"
    return (
        "Fewer rounds do not help: raise terms.adapter_privacy.target_epsilon, "
        "terms.profile.noise_multiplier or terms.adapter_privacy.largest_delta"
    )
