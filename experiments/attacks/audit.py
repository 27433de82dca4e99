"""Empirical ε of the adapter channel: canaries of the largest allowed gradient through the real DP-SGD.

`private_steps` trains a model of cores alone. The loss of an example has a huge gradient at one entry of P
and none elsewhere, so clipping brings it to exactly C in a direction of its own. Half of the canaries, by
fair coins, are in the data. With plain SGD the change of the cores is the sum of all noisy gradients, all
that an observer can use.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import nn

from fedmosaic.client.dp.training import PrivateTrainingSettings, private_steps
from fedmosaic.client.model.examples import EncodedExample
from fedmosaic.client.model.loss import Batch
from fedmosaic.experiments.attacks.statistics.empirical import CanaryScores, audit_figures
from fedmosaic.experiments.attacks.statistics.one_run import one_run_figure
from fedmosaic.experiments.attacks.statistics.results import DELTA, AttackResult, Setting
from fedmosaic.experiments.attacks.statistics.roc import ceiling_of
from fedmosaic.privacy.accounting.epsilon import epsilon_bound
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.mechanism.noise import Randomness

AUDIT: Final = "Empirical ε of the adapter's DP-SGD, one run"
RANK: Final = 16


@dataclass(frozen=True, eq=False)
class OneRun:
    """One audited run: (m,) movement of the cores along each canary in units of C, coins, charge."""

    scores: np.ndarray
    included: np.ndarray
    event: GaussianEvent


class CanaryModel(nn.Module):
    """Cores that see one-hot inputs: example (a, b) moves entry (a, b) of P, and nothing else.

    A second position with input zero and the opposite sign takes the gradient of Q off again.
    """

    def __init__(self, cores: int) -> None:
        super().__init__()
        self.cores = nn.ModuleDict({f"core{i}": nn.Linear(RANK, RANK) for i in range(cores)})
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def named_cores(self) -> dict[str, nn.Linear]:
        """The cores by name."""
        return {name: core for name, core in self.cores.items() if isinstance(core, nn.Linear)}

    def losses(self, batch: Batch) -> torch.Tensor:
        """(B,) losses, each linear in one entry of one P."""
        rows, columns = batch["input_ids"][:, 0], batch["input_ids"][:, 1]
        inputs = torch.zeros(len(rows), 2, RANK)
        inputs[torch.arange(len(rows)), 0, columns % RANK] = 1.0
        total = torch.zeros(len(rows))
        for number, core in enumerate(self.cores.values()):
            produced = core(inputs)
            mine = (rows // RANK == number).float()
            entry = produced.gather(2, (rows % RANK)[:, None, None].expand(-1, 2, 1))[..., 0]
            total = total + 1e3 * mine * (entry[:, 0] - entry[:, 1])
        return total


def one_run(
    canaries: int, settings: PrivateTrainingSettings, randomness: Randomness, coins: np.random.Generator
) -> OneRun:
    """Train once by plain SGD with about half of m canaries, one per entry of P, and read their scores."""
    model = CanaryModel(-(-canaries // RANK**2))
    included = coins.random(canaries) < 0.5
    examples = []
    for number in np.flatnonzero(included):
        ids = torch.tensor([number // RANK, number % RANK, 0])
        examples.append(EncodedExample(f"canary-{number}", ids, ids.clone()))
    private_steps(
        model,
        model.named_cores(),
        examples,
        settings,
        private_parameters={},
        randomness=randomness,
        losses=lambda _model, batch: model.losses(batch),
    )()
    moved = torch.cat([core.weight.detach().flatten() for core in model.named_cores().values()]).numpy()
    unit = settings.learning_rate * settings.max_grad_norm / settings.expected_batch_size
    return OneRun(-moved[:canaries].astype(np.float64) / unit, included, settings.event)


def audit_result(run: OneRun, *, setting: Setting = "product", words: str = "") -> AttackResult:
    """The certified ε of one run beside the claimed one; `words` say what was audited, else its event."""
    event = run.event

    def scaled(factor: float) -> list[GaussianEvent]:
        return [GaussianEvent(event.noise_multiplier * factor, event.sampling_rate, event.steps)]

    def epsilon_at(factor: float) -> float:
        return epsilon_bound(scaled(factor), DELTA, "pld").epsilon

    claimed = epsilon_at(1.0)
    figures = [one_run_figure(run.scores, run.included, lambda s: ceiling_of(scaled(s)), epsilon_at)]
    if event.sampling_rate == 1.0:
        # Without sampling a score is Gaussian, and canaries in orthogonal directions are independent.
        scores = CanaryScores(run.scores[run.included], run.scores[~run.included])
        figures.append(audit_figures(scores, claimed)[0])
    default = f"σ = {event.noise_multiplier:.3g}, q = {event.sampling_rate:.3g}, {event.steps} steps"
    return AttackResult(
        attack=AUDIT,
        adversary="observer of every DP-SGD step who plants canaries",
        sees="the final cores of one run of plain SGD",
        statistic=f"movement along each of {run.scores.size:,} canaries of norm C; guesses at both ends",
        release=words or default,
        setting=setting,
        epsilon=claimed,
        figures=tuple(figures),
        note="one run, f-DP: Mahloujifar, Melis and Chaudhuri 2024; the value holds for trade-off curves of "
        "the same kind with another noise, its alarm (the claim is refuted) for any",
    )
