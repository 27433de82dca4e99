"""FedDAT: shared and personal adapter teach each other."""

import torch
from torch import nn

from fedmosaic.client.model.loss import Batch
from fedmosaic.experiments.methods.distillation import answer_logits, label_losses, soft_divergence
from fedmosaic.experiments.methods.lora import read_adapter, using, write_adapter
from fedmosaic.experiments.methods.strategy import PERSONAL, RECEIVED, SHARED, Strategy, Trainer


class FedDat(Strategy):
    """Dual adapter teacher (Chen et al. 2024, arXiv 2308.12305), beside the frozen received adapter."""

    adapters = (SHARED, PERSONAL, RECEIVED)
    shares = True
    scored_with = (RECEIVED, PERSONAL)
    scored_scale = 0.5

    def train(self, trainer: Trainer) -> None:
        """Per batch: the shared adapter learns from the pair, the personal one from the shared one."""
        inner = trainer.model
        write_adapter(inner, RECEIVED, read_adapter(inner, SHARED))

        def mutual(_model: nn.Module, batch: Batch) -> torch.Tensor:
            with using(inner, [SHARED], [SHARED]):
                shared = answer_logits(inner, batch)
            with using(inner, [RECEIVED, PERSONAL], [PERSONAL], scale=0.5):
                pair = answer_logits(inner, batch)
            return distilled(shared, pair.detach(), batch) + distilled(pair, shared.detach(), batch)

        with using(inner, self.adapters, [SHARED, PERSONAL]):
            trainer.fit(mutual)


def distilled(student: torch.Tensor, teacher: torch.Tensor, batch: Batch) -> torch.Tensor:
    """½ (cross entropy + T² KL(teacher ‖ student)) per example, (B,), of logits (B, K, V)."""
    return 0.5 * (label_losses(student, batch) + soft_divergence(student, teacher, batch))
