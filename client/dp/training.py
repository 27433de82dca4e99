"""Private training of the shared branch: DP-SGD on the cores P and Q, and on nothing else; then the rest.

One step draws a Poisson sample of the examples, clips each example's gradient to the norm C, adds the clipped
gradients up, adds N(0, σ²C²) to every coordinate of the sum, and divides by a public constant:

    g̃ = ( Σ_{i in B} clip_C(g_i) + N(0, σ²C² I) ) / expected_batch_size

The realised batch size is private under add/remove and divides nothing. An empty sample releases noise like
any other and is charged like any other. What the optimizer makes of g̃ is post-processing, so the cores after
the round are a release with the cost of the round's steps, provided that the values they started from were
public or an earlier release, and that no other private tensor takes part in the forward pass (`checks`). One
example moves the sum by at most C whatever it is, the others are, and was received (`engine` says why). The
model is in evaluation mode throughout: dropout draws from one stream for all examples, and a layer with
running statistics carries one example to the next. One thing remains outside the guarantee: the time of a
step grows with the size of its sample.

In a round P and Q come first, alone, everything that has ever seen private data without noise out of the
forward pass; then the personal branch, the other layers' LoRA and the gate, without DP, which never leave.
The order is the guarantee: what is trained second cannot reach what is released.

Reference: Abadi et al., "Deep learning with differential privacy", CCS 2016, algorithm 1; Mironov, Talwar and
Zhang 2019, "Rényi differential privacy of the sampled Gaussian mechanism".
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from fedmosaic.client.colora import set_active_branches, set_trainable
from fedmosaic.client.data.records import by_unit
from fedmosaic.client.dp.checks import assert_only_shared_branch, check_engine
from fedmosaic.client.dp.engine import (
    check_cores,
    clip_and_sum,
    core_parameters,
    dimensions_of,
    example_gradient,
    only_shared_branch,
    private_parameters,
)
from fedmosaic.client.model.examples import EncodedExample
from fedmosaic.client.model.loss import ExampleLosses, example_losses, in_bfloat16, training_mode
from fedmosaic.client.model.training import TrainingSettings
from fedmosaic.client.planning import group_grid
from fedmosaic.client.progress import Progress
from fedmosaic.client.round.records import digest_of
from fedmosaic.client.round.releases import Releases
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.configuration import Frozen
from fedmosaic.privacy.federation.terms import AdapterTerms, Terms
from fedmosaic.privacy.mechanism import gaussian
from fedmosaic.privacy.mechanism.gaussian import ClippedSum
from fedmosaic.privacy.mechanism.noise import IntArray, NoiseSource, Randomness, poisson_sample
from fedmosaic.privacy.mechanism.shares import noisy_share
from fedmosaic.protos.errors import ConfigurationError, PrivacyError

log = logging.getLogger(__name__)


class PrivateTrainingSettings(Frozen):
    """How the shared branch is trained privately; all of it public and fixed before the run.

    Attributes:
        steps: Noisy steps of one round; each is charged, whatever its sample holds.
        sampling_rate: Probability q that an example takes part in a step.
        expected_batch_size: Public divisor of the noisy sum, of the federation's terms.
        max_grad_norm: Clipping norm C of one example's gradient over all cores, from public data.
        noise_multiplier: σ, the noise's standard deviation over C.
        bf16: Wide products in bfloat16; gradients of the cores, clipping and noise are exact as ever.
    """

    learning_rate: float = Field(default=1e-3, gt=0.0, le=10.0, allow_inf_nan=False)
    optimizer: Literal["adam", "sgd"] = "adam"
    steps: int = Field(default=100, ge=1)
    sampling_rate: float = Field(default=0.02, gt=0.0, le=1.0, allow_inf_nan=False)
    expected_batch_size: int = Field(default=32, ge=1)
    max_grad_norm: float = Field(default=1.0, gt=1e-6, le=1e6, allow_inf_nan=False)
    noise_multiplier: float = Field(default=1.0, gt=0.0, le=1e6, allow_inf_nan=False)
    bf16: bool = False

    @property
    def event(self) -> GaussianEvent:
        """What a round of these steps costs, to be charged before the first."""
        return GaussianEvent(self.noise_multiplier, self.sampling_rate, self.steps)


def private_steps(
    model: nn.Module,
    cores: Mapping[str, nn.Linear],
    examples: Sequence[EncodedExample],
    settings: PrivateTrainingSettings,
    *,
    private_parameters: Mapping[str, nn.Parameter],
    randomness: Randomness,
    losses: ExampleLosses = example_losses,
    progress: Callable[[int, int], None] | None = None,
) -> Callable[[], ClippedSum]:
    """DP-SGD on the cores, checked and not yet begun; the new values in them will be one release.

    What takes part is checked on public tokens, with public values in the place of what was received; no data
    is touched. The caller charges `settings.event` and then calls what it is given, once. A failure
    afterwards leaves the charge standing. No value that was received, or is private, can end the training: a
    gradient that is not finite counts as zero. That there are gradients to clip is tried before, once, by
    `checks.check_engine`.

    The cores start from values that are public or an earlier release, all else in the model is frozen, and
    `private_parameters`, which private data reaches without noise, must be out of the forward pass. A seeded
    `randomness` voids the guarantee.

    Returns what takes the steps. It gives how many gradients there were over all of them, clipped or rejected
    ones among them: private, for the client's own people. Its sum is empty. ConfigurationError if there is no
    example; PrivacyError if a private tensor takes part; ModelError if the cores cannot be trained privately.
    """
    if not examples:
        raise ConfigurationError("there is no example to train on; give at least one")
    loss_of = in_bfloat16(losses) if settings.bf16 else losses
    check_cores(cores)
    assert_only_shared_branch(model, cores, private_parameters, losses=loss_of)

    def train() -> ClippedSum:
        with training_mode(model, False):
            return _steps(model, cores, examples, settings, randomness, loss_of, progress)

    return train


def noisy_sum(
    total: ClippedSum, max_grad_norm: float, noise_multiplier: float, noise: NoiseSource
) -> torch.Tensor:
    """Draw noise and turn a private sum of D coordinates into (D,) float64; see `gaussian.noisy_sum`."""
    return torch.from_numpy(gaussian.noisy_sum(total, max_grad_norm, noise_multiplier, noise))


def set_gradients(parameters: Sequence[nn.Parameter], flat: torch.Tensor) -> None:
    """Give parameters their parts of a flat (D,) gradient, in order."""
    parts = torch.split(flat, [parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter).to(dtype=parameter.dtype, device=parameter.device)


def _steps(
    model: nn.Module,
    cores: Mapping[str, nn.Linear],
    examples: Sequence[EncodedExample],
    settings: PrivateTrainingSettings,
    randomness: Randomness,
    losses: ExampleLosses,
    progress: Callable[[int, int], None] | None,
) -> ClippedSum:
    parameters = core_parameters(cores)
    kind = torch.optim.SGD if settings.optimizer == "sgd" else torch.optim.Adam
    optimizer = kind(parameters, lr=settings.learning_rate)
    before = [parameter.detach().clone() for parameter in parameters]
    # Only the counts of this running total are used; it has no coordinates.
    counts = ClippedSum.empty(0)
    for step in range(1, settings.steps + 1):
        total = ClippedSum.empty(dimensions_of(cores))
        for index in poisson_sample(len(examples), settings.sampling_rate, randomness):
            row = example_gradient(model, cores, examples[index], losses)
            total = total + clip_and_sum(row[None], settings.max_grad_norm)
        noisy_D = noisy_sum(total, settings.max_grad_norm, settings.noise_multiplier, randomness)
        set_gradients(parameters, noisy_D / settings.expected_batch_size)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        counts += replace(total, units=counts.units)
        if progress is not None:
            progress(step, settings.steps)
    if all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True)):
        # No error: how large the weights are that a step is too small for may come from what was received.
        log.error("private training moved no weight; raise the learning rate of the shared branch")
    return counts


# The received branch has this constant share while the local one is trained: the learnt gate has seen
# private data, so it may not take part.
GLOBAL_WEIGHT = 0.5


def check_model(model: nn.Module, terms: Terms, training: TrainingSettings) -> None:
    """Try on public values that a fresh adapted model can be trained privately, before anything comes in."""
    losses = in_bfloat16() if training.bf16 else example_losses
    # As in every round but the first: the personal branches are open when the private step begins.
    open_personal_branches(model, terms.adapter)
    with only_shared_branch(model, global_weight=GLOBAL_WEIGHT) as cores:
        check_cores(cores)
        assert_only_shared_branch(model, cores, private_parameters(model), losses=losses)
        check_engine(model, cores, clip=terms.encryption.clip, losses=losses)


@dataclass(frozen=True)
class PrivateRound:
    """What a client's private training of P and Q works on, in a round of any kind.

    The settings are the client's own; all that costs privacy is in the terms and in the plan of `releases`.
    """

    model: nn.Module
    examples: Sequence[EncodedExample]
    terms: Terms
    training: TrainingSettings
    releases: Releases
    progress: Progress

    def train(self, round_number: int) -> None:
        """Train P and Q privately, or go on without, in receive-only mode, if the budget does not allow."""
        model, releases, privacy = self.model, self.releases, self.terms.adapter_privacy
        settings = PrivateTrainingSettings(
            learning_rate=self.training.private_learning_rate,
            steps=privacy.steps_per_round,
            sampling_rate=releases.adapter_plan.sampling_rate,
            expected_batch_size=privacy.expected_batch_size,
            max_grad_norm=privacy.clipping_norm,
            noise_multiplier=releases.adapter_plan.noise_multiplier,
            bf16=self.training.bf16,
        )
        self.progress.stage(round_number, "private training", settings.steps)
        with only_shared_branch(model, global_weight=GLOBAL_WEIGHT) as cores:
            counts = releases.release_adapter(
                round_number,
                settings.event,
                lambda: private_steps(
                    model,
                    cores,
                    self.examples,
                    settings,
                    private_parameters=private_parameters(model),
                    randomness=releases.randomness,
                    progress=lambda step, _total: self.progress.advance(step),
                ),
                lambda steps: steps(),
            )
        if counts is None:
            return
        releases.clipping.add("adapter", counts.clipped, counts.rows)
        if counts.rows:
            share = 100 * counts.clipped / counts.rows
            log.info("round %d: %.0f %% of the gradients were clipped", round_number, share)

    def share(self, round_number: int, members: int) -> IntArray | None:
        """This member's part of its group's noisy sum: one step of DP-SGD on P and Q, not taken.

        Gives (D,) integers for the secure sum alone; None where the budget allows no more. MechanismError if
        the group is too large for the bits of the terms; PrivacyError if the plan charges another noise than
        they add.
        """
        releases, grid = self.releases, group_grid(self.terms, members)
        plan = releases.adapter_plan
        if plan.noise_multiplier != self.terms.group_sums.noise_multiplier:
            raise PrivacyError(
                f"the ledger would be charged for σ = {plan.noise_multiplier}, the roster's sums have "
                f"{self.terms.group_sums.noise_multiplier}: plan from the roster's terms"
            )
        units = by_unit(self.examples, self.terms.unit)

        def noisy(total: ClippedSum) -> IntArray:
            releases.clipping.add("adapter", total.clipped, total.rows)
            return noisy_share(total, grid, releases.randomness)

        event = GaussianEvent(plan.noise_multiplier, plan.sampling_rate, 1)
        summed = partial(self._clipped_sum, round_number, units, grid.steps)
        return releases.release_adapter(round_number, event, summed, noisy, digest_of)

    def _clipped_sum(
        self, round_number: int, units: Sequence[tuple[EncodedExample, ...]], grid: int
    ) -> ClippedSum:
        """The clipped gradients of one Poisson sample of the units, added up on the grid; checked before."""
        model, releases = self.model, self.releases
        losses = in_bfloat16() if self.training.bf16 else example_losses
        with only_shared_branch(model) as cores, training_mode(model, False):
            check_cores(cores)
            assert_only_shared_branch(model, cores, private_parameters(model), losses=losses)
            chosen = poisson_sample(len(units), releases.adapter_plan.sampling_rate, releases.randomness)
            # Not how far it is: that would tell how many were drawn, which no noise covers.
            self.progress.stage(round_number, "private gradients")
            total = ClippedSum.empty(dimensions_of(cores))
            for index in chosen:
                # What one person's examples add up to is clipped as one: that bounds what it contributes,
                # however many they are.
                own = [example_gradient(model, cores, example, losses) for example in units[index]]
                row = torch.stack(own).sum(dim=0)
                total = total + clip_and_sum(row[None], self.terms.adapter_privacy.clipping_norm, grid)
        return total


def open_personal_branches(model: nn.Module, terms: AdapterTerms) -> None:
    """Take every branch into the forward pass and train only what never leaves."""
    set_active_branches(model, {"local", "global", "personal"}, layers="shared")
    set_trainable(model, {"personal", "gate"}, layers="shared")
    if terms.other_layers == "lora":
        set_active_branches(model, {"local"}, layers="family")
        set_trainable(model, {"local"}, layers="family")
