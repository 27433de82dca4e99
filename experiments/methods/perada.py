"""PerAda: Ditto, and the server distils the clients' logits on public data."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from fedmosaic.client.model.loss import Batch
from fedmosaic.experiments.methods.distillation import answer_logits, soft_divergence
from fedmosaic.experiments.methods.ditto import Ditto
from fedmosaic.experiments.methods.knowledge import STEPS, mean_logits
from fedmosaic.experiments.methods.lora import Vector, read_adapter, write_adapter
from fedmosaic.experiments.methods.strategy import PERSONAL, SHARED, TEACHER, ServerSide


class PerAda(Ditto):
    """Ditto's client; the server distils the clients' mean logits on public examples into the average.

    Teachers are the clients of the same architecture (Xie et al. 2024, arXiv 2302.06637).
    """

    adapters: ClassVar[tuple[str, ...]] = (SHARED, PERSONAL, TEACHER)

    def combine(self, uploads: Mapping[str, Vector], server: ServerSide) -> Mapping[str, Vector]:
        """The mean, then distillation."""
        mean, vectors = super().combine(uploads, server), [uploads[name] for name in sorted(uploads)]

        def from_teachers(model: nn.Module, batch: Batch) -> torch.Tensor:
            with torch.no_grad():
                teacher = mean_logits(server, vectors, batch)
            return soft_divergence(answer_logits(model, batch), teacher, batch)

        write_adapter(server.model, SHARED, next(iter(mean.values())))
        server.distil(server.public, STEPS, from_teachers)
        return dict.fromkeys(uploads, read_adapter(server.model, SHARED))
