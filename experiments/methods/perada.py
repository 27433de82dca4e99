"""PerAda: Ditto, and the server distils the clients' logits on public data."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from fedmosaic.client.model.loss import Batch
from fedmosaic.client.model.training import train_local
from fedmosaic.experiments.methods.distillation import answer_logits, soft_divergence
from fedmosaic.experiments.methods.ditto import Ditto
from fedmosaic.experiments.methods.knowledge import mean_logits
from fedmosaic.experiments.methods.lora import Vector, read_adapter, using, write_adapter
from fedmosaic.experiments.methods.strategy import PERSONAL, SHARED, TEACHER, ServerSide


class PerAda(Ditto):
    """Ditto's client; the server distils the clients' mean logits on public examples into the average.

    Teachers are the clients of the same architecture (Xie et al. 2024, arXiv 2302.06637).
    """

    adapters: ClassVar[tuple[str, ...]] = (SHARED, PERSONAL, TEACHER)
    steps: ClassVar[int] = 10
    """Optimizer steps of the server in a round."""

    def combine(self, uploads: Mapping[str, Vector], server: ServerSide) -> Mapping[str, Vector]:
        """The mean, then distillation."""
        mean, vectors = super().combine(uploads, server), [uploads[name] for name in sorted(uploads)]

        def from_teachers(model: nn.Module, batch: Batch) -> torch.Tensor:
            with torch.no_grad():
                teacher = mean_logits(server, vectors, batch)
            return soft_divergence(answer_logits(model, batch), teacher, batch)

        write_adapter(server.model, SHARED, next(iter(mean.values())))
        with using(server.model, [SHARED], [SHARED]):
            train_local(
                server.model,
                server.public,
                server.settings.model_copy(update={"steps": self.steps}),
                pad_token_id=server.pad_token_id,
                losses=from_teachers,
            )
        return dict.fromkeys(uploads, read_adapter(server.model, SHARED))
