"""Ditto: a shared adapter, and a personal one near it."""

from typing import ClassVar

import torch
from torch import nn

from fedmosaic.client.model.loss import Batch, example_losses
from fedmosaic.experiments.methods.lora import factors, using
from fedmosaic.experiments.methods.strategy import PERSONAL, SHARED, Strategy, Trainer

PROXIMITY = 0.001
"""Ditto's pull of the personal adapter towards the received one, on the squared distance."""


class Ditto(Strategy):
    """Ditto (Li et al. 2021, arXiv 2012.04221): a shared adapter, and a personal one held near it."""

    adapters: ClassVar[tuple[str, ...]] = (SHARED, PERSONAL)
    shares = True
    scored_with = (PERSONAL,)
    passes = 2

    def train(self, trainer: Trainer) -> None:
        """The personal adapter towards the received one, then the shared one, on the same batches."""
        anchor = [part.detach().clone() for pair in factors(trainer.model, SHARED) for part in pair]

        def near(model: nn.Module, batch: Batch) -> torch.Tensor:
            parts = [part for pair in factors(model, PERSONAL) for part in pair]
            distance = torch.stack(
                [(part - fixed).float().square().sum() for part, fixed in zip(parts, anchor, strict=True)]
            ).sum()
            return example_losses(model, batch) + PROXIMITY * distance

        with using(trainer.model, [PERSONAL], [PERSONAL]):
            trainer.fit(near, again=True)
        with using(trainer.model, [SHARED], [SHARED]):
            trainer.fit()
