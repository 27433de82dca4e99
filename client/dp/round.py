"""One round of training under `dp` or `dp+encrypted`: the shared branch privately, the rest on top.

First P and Q alone, with DP-SGD, everything that has ever seen private data without noise out of the
forward pass. Then the personal branch, the other layers' LoRA and the gate, without DP; none of them
ever leaves. The order is the guarantee: what is trained second cannot reach what is released.
"""

import logging
from collections.abc import Sequence

import torch
from torch import nn

from fedmosaic.client.colora import set_active_branches, set_trainable
from fedmosaic.client.data.records import by_unit
from fedmosaic.client.dp.branch import only_shared_branch, private_parameters
from fedmosaic.client.dp.checks import assert_only_shared_branch, check_engine
from fedmosaic.client.dp.engine import check_cores, clip_and_sum, dimensions_of, example_gradient
from fedmosaic.client.dp.training import PrivateTrainingSettings, private_steps
from fedmosaic.client.model.examples import EncodedExample
from fedmosaic.client.model.loss import example_losses, in_bfloat16, training_mode
from fedmosaic.client.model.training import TrainingSettings
from fedmosaic.client.planning import group_grid
from fedmosaic.client.progress import Progress
from fedmosaic.client.records import digest_of
from fedmosaic.client.releases import Releases
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.federation.terms import AdapterPrivacyTerms, AdapterTerms, Terms
from fedmosaic.privacy.mechanism.gaussian import ClippedSum
from fedmosaic.privacy.mechanism.noise import IntArray, poisson_sample
from fedmosaic.privacy.mechanism.shares import noisy_share
from fedmosaic.protos.errors import PrivacyError

log = logging.getLogger(__name__)

# The received branch has this constant share while the local one is trained: the learnt gate has seen
# private data, so it may not take part.
GLOBAL_WEIGHT = 0.5


def check_model(model: nn.Module, terms: Terms, training: TrainingSettings) -> None:
    """Try on public values that a fresh adapted model can be trained privately, before anything is received.

    Raises:
        ModelError: it has no gradient, or something in it carries one example to the next.
        PrivacyError: a tensor that will see private data takes part in the private step.
    """
    losses = in_bfloat16() if training.bf16 else example_losses
    # As in every round but the first: the personal branches are open when the private step begins.
    open_personal_branches(model, terms.adapter)
    with only_shared_branch(model, global_weight=GLOBAL_WEIGHT) as cores:
        check_cores(cores)
        assert_only_shared_branch(model, cores, private_parameters(model), losses=losses)
        check_engine(model, cores, clip=terms.encryption.clip, losses=losses)


def train_shared(
    model: nn.Module,
    examples: Sequence[EncodedExample],
    terms: AdapterPrivacyTerms,
    training: TrainingSettings,
    *,
    releases: Releases,
    round_number: int,
    progress: Progress,
) -> None:
    """Train P and Q privately, or go on without, in receive-only mode, if the budget does not allow it."""
    plan = releases.adapter_plan
    settings = PrivateTrainingSettings(
        learning_rate=training.private_learning_rate,
        steps=terms.steps_per_round,
        sampling_rate=plan.sampling_rate,
        expected_batch_size=terms.expected_batch_size,
        max_grad_norm=terms.clipping_norm,
        noise_multiplier=plan.noise_multiplier,
        bf16=training.bf16,
    )
    progress.stage(round_number, "private training", terms.steps_per_round)
    with only_shared_branch(model, global_weight=GLOBAL_WEIGHT) as cores:
        counts = releases.release_adapter(
            round_number,
            settings.event,
            lambda: private_steps(
                model,
                cores,
                examples,
                settings,
                private_parameters=private_parameters(model),
                randomness=releases.randomness,
                progress=lambda step, _total: progress.advance(step),
            ),
            lambda steps: steps(),
        )
    if counts is None:
        return
    releases.clipping.add("adapter", counts.clipped, counts.rows)
    if counts.rows:
        share = 100 * counts.clipped / counts.rows
        log.info("round %d: %.0f %% of the gradients were clipped", round_number, share)


def group_share(
    model: nn.Module,
    examples: Sequence[EncodedExample],
    terms: Terms,
    training: TrainingSettings,
    *,
    members: int,
    releases: Releases,
    round_number: int,
    progress: Progress,
) -> IntArray | None:
    """This member's part of its group's noisy sum: one step of DP-SGD on P and Q, not taken.

    Args:
        model: the adapted model, with the group's shared branch in it.
        examples: the client's encoded examples.
        terms: what the members agreed on.
        training: number format.
        members: of the group.
        releases: plans the noise, and charges before any is drawn.
        round_number: for the ledger.
        progress: told of every example.

    Returns:
        (D,) integers for the secure sum alone; None where the budget allows no more.

    Raises:
        MechanismError: the group is too large for the bits of the terms.
        PrivacyError: the plan charges another noise than the terms add.
    """
    plan, grid = releases.adapter_plan, group_grid(terms, members)
    if plan.noise_multiplier != terms.group_sums.noise_multiplier:
        raise PrivacyError(
            f"the ledger would be charged for σ = {plan.noise_multiplier}, the roster's sums have "
            f"{terms.group_sums.noise_multiplier}: plan from the roster's terms"
        )
    losses = in_bfloat16() if training.bf16 else example_losses
    units = by_unit(examples, terms.unit)

    def clipped() -> ClippedSum:
        with only_shared_branch(model) as cores, training_mode(model, False):
            check_cores(cores)
            assert_only_shared_branch(model, cores, private_parameters(model), losses=losses)
            chosen = poisson_sample(len(units), plan.sampling_rate, releases.randomness)
            progress.stage(round_number, "private gradients", len(chosen))
            total = ClippedSum.empty(dimensions_of(cores))
            for done, index in enumerate(chosen, start=1):
                # What one person's examples add up to is clipped as one: that bounds what it contributes,
                # however many they are.
                own = [example_gradient(model, cores, example, losses) for example in units[index]]
                row = torch.stack(own).sum(dim=0)
                total = total + clip_and_sum(row[None], terms.adapter_privacy.clipping_norm, grid.steps)
                progress.advance(done)
        return total

    def noisy(total: ClippedSum) -> IntArray:
        releases.clipping.add("adapter", total.clipped, total.rows)
        return noisy_share(total, grid, releases.randomness)

    event = GaussianEvent(plan.noise_multiplier, plan.sampling_rate, 1)
    return releases.release_adapter(round_number, event, clipped, noisy, digest_of)


def open_personal_branches(model: nn.Module, terms: AdapterTerms) -> None:
    """Take every branch into the forward pass and train only what never leaves."""
    set_active_branches(model, {"local", "global", "personal"}, layers="shared")
    set_trainable(model, {"personal", "gate"}, layers="shared")
    if terms.other_layers == "lora":
        set_active_branches(model, {"local"}, layers="family")
        set_trainable(model, {"local"}, layers="family")
