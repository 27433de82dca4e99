"""The privacy statement of one client, made from its own ledger and the roster's terms."""

import datetime as dt

from fedmosaic.client.planning import AdapterPlan, plan_adapter
from fedmosaic.client.round.records import CLIPPING, ClippingRecord
from fedmosaic.client.state import ClientState
from fedmosaic.privacy.accounting.epsilon import person_epsilon
from fedmosaic.privacy.coalitions import counted_coalition
from fedmosaic.privacy.federation.roster import Roster
from fedmosaic.privacy.federation.terms import Terms
from fedmosaic.privacy.ledger.ledger import Ledger, parameters_of
from fedmosaic.privacy.statement.models import (
    ClientInputs,
    CoalitionRows,
    PlannedChannel,
    PrivacyStatement,
    StatementInputs,
)
from fedmosaic.privacy.statement.parts import charged_to
from fedmosaic.privacy.statement.rounding import round_down
from fedmosaic.privacy.statement.shareable import cell, rounded_delta
from fedmosaic.protos.errors import AccountingError

STATEMENT, HANDED_OVER = "statement.json", "statement-handed-over.json"
"""In the state directory: the member's own, and the one that was handed over, from rounded numbers."""
_PLANNING_MARGIN = 0.98
"""Two planned σ may differ by more than the planner's 0.1 % where they ought to be equal."""


def statement_inputs(
    roster: Roster, state: ClientState, ledger: Ledger, plan: AdapterPlan
) -> StatementInputs:
    """What a client's own statement is made from and, after `for_handing_over`, the shared one.

    The plan tells what DP would have cost where there is none. Shares of clipped examples are for this
    client's own eyes.
    """
    smallest_row = state.smallest_row()
    terms, parameters = roster.terms, roster.terms.encryption
    named = f"{parameters.backend}, parameters {parameters.digest().hex()[:16]}"
    fewest = smallest_row or terms.policy.fewest_contributors
    return StatementInputs(
        run_id=state.record.run_id,
        created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        clients=(
            ClientInputs(
                ledger=tuple(ledger.export()),
                client_id=state.record.client,
                target_epsilon=ledger.parameters.target_epsilon,
                budgeted_channels=ledger.parameters.budgeted_channels,
                adapter_protection=terms.adapter.protection,
                family_protection=terms.adapter.protection if terms.adapter.family_dimensions else None,
                clipped_share=ClippingRecord(state.directory / CLIPPING).shares(),
                planned={
                    "adapter": PlannedChannel(sampling_rate=plan.sampling_rate, steps=roster.private_steps)
                },
                expected_batch_size=terms.adapter_privacy.expected_batch_size,
                largest_delta=terms.adapter_privacy.largest_delta,
            ),
        ),
        roster_sha256=roster.hash.hex(),
        encryption=named if terms.adapter.encrypted else "",
        witness=roster.witness.id if roster.witness else "",
        minimum_contributors=terms.policy.fewest_contributors,
        weight_cap=terms.policy.weight_cap,
        squares_cap=terms.policy.squares_cap,
        rounds=terms.schedule.rounds,
        smallest_row=smallest_row,
        coalition_rows=() if terms.adapter.in_group_sums else coalition_rows(fewest, terms.schedule.rounds),
    )


def for_handing_over(inputs: StatementInputs, terms: Terms, examples: int) -> StatementInputs:
    """The same facts of one client with the least σ that the terms plan for any of about n examples."""
    (client,) = inputs.clients
    if not terms.adapter.private:
        return inputs
    if terms.adapter.in_group_sums:
        # The noise of a sum is a term of the roster, the same for members of every size.
        known = client.model_copy(update={"least_noise": terms.group_sums.noise_multiplier})
        return inputs.model_copy(update={"clients": (known,)})
    _, high = cell(examples)
    delta = rounded_delta(parameters_of(client.ledger).delta, client.largest_delta)
    try:
        target, steps = terms.adapter_privacy.target_epsilon, client.planned["adapter"].steps
        planned = plan_adapter(terms, high, delta, target, steps).noise_multiplier
    except AccountingError:
        return inputs  # not planned by these terms; a coarse grid of σ is used
    least = round_down(planned * _PLANNING_MARGIN, 3)
    return inputs.model_copy(update={"clients": (client.model_copy(update={"least_noise": least}),)})


def person_words(inputs: StatementInputs, examples: int) -> str:
    """What DP releases reveal of the person with most examples, k ≥ 2 of them; for this client's own eyes."""
    (client,) = inputs.clients
    private = (row for row in client.ledger if row.covered_by == "dp")
    events = [charge.event for charge in charged_to(private, "colluding_recipients_with_server")]
    delta = parameters_of(client.ledger).delta
    return (
        f"one person has {examples} of the training examples. Of that person the releases under differential "
        f"privacy reveal at most ε = {person_epsilon(events, delta, examples):.3g} at δ = {delta:.1e}, not "
        "the ε of one example. This line stays here"
    )


def with_warning(statement: PrivacyStatement, warning: str) -> PrivacyStatement:
    """The statement for this client's own eyes with one more warning; not for the one handed over."""
    (client,) = statement.clients
    clients = (client.model_copy(update={"warnings": (*client.warnings, warning)}),)
    return statement.model_copy(update={"clients": clients})


def coalition_rows(contributors: int, rounds: int) -> tuple[CoalitionRows, ...]:
    """What k recipients hold together, up to the first k that solves with the rows of one round.

    Each holds one weight row per round from the second on, linear equations in the same adapters. Recipients
    that contribute to one another know their own adapters, which leaves contributors - (k - 1) unknown; R - 1
    aggregates add up if adapters hardly move.
    """
    return tuple(
        CoalitionRows(
            colluding_recipients=size,
            independent_rows=min(size * (rounds - 1), contributors - size + 1),
            contributors=contributors - size + 1,
        )
        for size in range(1, counted_coalition(contributors, 1) + 1)
    )
