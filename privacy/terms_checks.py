"""What is checked of a federation's terms when it is founded, so that no client finds out after its first round."""

import logging
from pathlib import Path
from typing import Final

from fedmosaic.privacy.accounting import default_delta
from fedmosaic.privacy.events import GaussianEvent
from fedmosaic.privacy.planning import check_plannable
from fedmosaic.privacy.projection import PublicBasis
from fedmosaic.privacy.roster import Terms
from fedmosaic.protos.errors import AccountingError, ConfigurationError

log = logging.getLogger(__name__)
_LARGEST_CLIENT: Final = 1_000_000


def check_basis(terms: Terms, basis: Path | None) -> None:
    """Refuse a public basis other than the one that the terms name by its hash.

    Args:
        terms: of the federation.
        basis: file of the public basis; None if there is none.

    Raises:
        ConfigurationError: it is missing, not needed, or another one.
        MechanismError: it cannot be read.
    """
    agreed = terms.profile.basis_sha256
    if agreed is None:
        if basis is not None:
            raise ConfigurationError(f"the terms' task profile uses no public basis; leave {basis} out")
        return
    if basis is None:
        raise ConfigurationError(
            f"terms.profile.basis_sha256 names the public basis {agreed[:16]}…, but no file is given: pass the "
            "one that `fedmosaic probe` wrote with --basis"
        )
    found = PublicBasis.load(basis).sha256
    if found != agreed:
        raise ConfigurationError(
            f"{basis} is the public basis {found[:16]}…, terms.profile.basis_sha256 says {agreed[:16]}…: both "
            "must be of the same run of `fedmosaic probe`, so give its basis or copy the tables it printed anew"
        )


def check_plan(terms: Terms) -> None:
    """Refuse terms under which no client's noise can be planned; warn where some clients' cannot.

    Args:
        terms: of the federation; tried for clients of `profile.minimum_examples` to a million examples, each
            with the default δ.

    Raises:
        ConfigurationError: no number of examples can be planned for; what would be possible is named.
    """
    if not terms.adapter.private:
        return
    sizes = sorted({terms.profile.minimum_examples, 1_000, 10_000, 100_000, _LARGEST_CLIENT})
    problems = {n: problem for n in sizes if (problem := _problem(terms, n, terms.schedule.rounds))}
    if not problems:
        return
    reason = next(iter(problems.values()))
    if len(problems) < len(sizes):
        named = ", ".join(f"{n:,}" for n in problems)
        log.warning("a client of %s examples could not plan its noise under these terms: %s", named, reason)
        return
    steps = terms.adapter_privacy.steps_per_round
    raise ConfigurationError(
        f"no client could plan its noise for {terms.schedule.rounds:,} rounds of {steps:,} private steps: "
        f"{reason}. {_possible(terms, sizes)}"
    )


def plan_inputs(terms: Terms, examples: int, rounds: int) -> tuple[list[GaussianEvent], float, int]:
    """What a client of so many examples plans its noise from.

    Args:
        terms: schedule, batch size, profile mechanism.
        examples: n of the client.
        rounds: R; the terms' own, or fewer.

    Returns:
        The profile's release, the sampling rate q of a private step, and the number of steps.
    """
    privacy = terms.adapter_privacy
    profile = GaussianEvent(terms.profile.noise_multiplier, terms.profile.sampling_rate, 1)
    return [profile], min(1.0, privacy.expected_batch_size / examples), privacy.steps_per_round * rounds


def _problem(terms: Terms, examples: int, rounds: int) -> str:
    settled, rate, steps = plan_inputs(terms, examples, rounds)
    try:
        check_plannable(
            terms.adapter_privacy.target_epsilon, default_delta(examples), settled, rate, steps
        )
    except AccountingError as error:
        return str(error)
    return ""


def _possible(terms: Terms, sizes: list[int]) -> str:
    rounds = terms.schedule.rounds // 2
    while rounds:
        if not all(_problem(terms, n, rounds) for n in sizes):
            return f"Schedule.rounds = {rounds} can be planned, or as much fewer steps_per_round"
        rounds //= 2
    return (
        "Fewer rounds do not help: raise terms.adapter_privacy.target_epsilon or terms.profile.noise_multiplier"
    )
