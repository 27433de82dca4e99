"""What a client plans before its first round: σ of DP-SGD, and the integers of a group's sum."""

from dataclasses import dataclass

from fedmosaic.privacy.accounting.calibrate import noise_multiplier_for
from fedmosaic.privacy.accounting.leverage import noise_share
from fedmosaic.privacy.federation.terms import Terms
from fedmosaic.privacy.federation.terms_checks import plan_inputs
from fedmosaic.privacy.mechanism.shares import ShareGrid, plan_grid
from fedmosaic.protos.errors import AccountingError


@dataclass(frozen=True)
class AdapterPlan:
    """DP-SGD parameters of this client, planned once for the whole run.

    σ is noise over clipping norm, 0 where the adapter is not trained privately; the sampling rate q is the
    expected batch size over the number of examples.
    """

    noise_multiplier: float
    sampling_rate: float


def sampling_rate(terms: Terms, examples: float) -> float:
    """Poisson sampling rate q of DP-SGD: the expected batch size over the number of examples."""
    return min(1.0, terms.adapter_privacy.expected_batch_size / examples)


def plan_adapter(
    terms: Terms, examples: float, delta: float, target_epsilon: float, steps: int
) -> AdapterPlan:
    """Find σ for so many private steps of n examples, from the budget (ε, δ) that the profile leaves.

    Raises:
        AccountingError: the profile alone passes the target, no noise suffices, or the client has too few
            examples for the noise that the members of a group sum have agreed on.
    """
    if not terms.adapter.private:
        return AdapterPlan(0.0, sampling_rate(terms, examples))
    if not terms.adapter.in_group_sums:
        settled, rate = plan_inputs(terms, examples)
        return AdapterPlan(noise_multiplier_for(target_epsilon, delta, settled, rate, steps), rate)
    sums = terms.group_sums
    if sums.noise_multiplier is None:
        raise AccountingError(
            "the roster does not say the noise of its group sums; found the federation again"
        )
    if examples < sums.least_examples:
        raise AccountingError(
            f"{examples:.0f} examples are fewer than the {sums.least_examples} that a member needs for the "
            "noise which all have agreed on (group_sums.least_examples); add examples or leave"
        )
    return AdapterPlan(sums.noise_multiplier, sampling_rate(terms, examples))


def group_grid(terms: Terms, members: int) -> ShareGrid:
    """The integers of a group's sum, a function of the signed terms and the group's size alone."""
    sums = terms.group_sums
    noise = noise_share(sums.noise_multiplier or 0.0, sums.minimum_contributors, sums.colluders)
    return plan_grid(members, terms.adapter_privacy.expected_batch_size, noise, sums.bits)
