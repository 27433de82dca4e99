"""FedSim: shared and personal adapter trained on their summed logits."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import nn

from fedmosaic.client.model.loss import example_losses
from fedmosaic.experiments.methods.lora import SummedLogits, using
from fedmosaic.experiments.methods.strategy import PERSONAL, SHARED, Strategy, Trainer


class FedSim(Strategy):
    """One loss on the summed logits trains both adapters (Pillutla et al. 2022, arXiv 2204.03809)."""

    adapters = (SHARED, PERSONAL)
    shares = True
    alike = False

    def train(self, trainer: Trainer) -> None:
        """Both adapters at once."""
        summed = SummedLogits(trainer.model, self.adapters, self.adapters)
        with using(trainer.model, self.adapters, self.adapters):
            trainer.fit(lambda _model, batch: example_losses(summed, batch))

    @contextmanager
    def scored(self, model: PeftModel) -> Iterator[nn.Module]:
        """The sum of both adapters' logits."""
        yield SummedLogits(model, self.adapters)
