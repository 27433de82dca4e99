"""HETLoRA with the pruning of ranks: clients give up the tail of their rank where training shrinks it."""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from fedmosaic.client.model.loss import Batch, example_losses
from fedmosaic.experiments.methods.hetlora import HetLora
from fedmosaic.experiments.methods.lora import Vector, factors, using
from fedmosaic.experiments.methods.matrices import Matrices, pack, pad, unpack
from fedmosaic.experiments.methods.strategy import SHARED, Exchange, ServerSide, Trainer


class HetLoraPruned(HetLora):
    """HETLoRA in whole: beside padding and weights by norm, ranks shrink while training.

    The size ‖B_tail‖·‖A_tail‖ of what lies beyond the first γ·r rows of A and columns of B is added to the
    loss; if it is smaller after a round's training than before, the tail is given up: zero in both, where no
    gradient brings it back, and not filled when the mean comes. Reference: Cho et al. (2024), arXiv
    2401.06432. γ and the weight are our choice.
    """

    kept_share: ClassVar[float] = 0.9
    tail_weight: ClassVar[float] = 0.005

    def train(self, trainer: Trainer) -> None:
        """Train with the tail in the loss, then give it up if it has become smaller."""
        pairs = factors(trainer.model, SHARED)
        rank = live_rank([(a.detach().cpu().numpy(), b.detach().cpu().numpy()) for a, b in pairs])
        keep = max(1, math.floor(self.kept_share * rank))
        before = float(tail_size(pairs, keep).detach())

        def with_tail(model: nn.Module, batch: Batch) -> torch.Tensor:
            return example_losses(model, batch) + self.tail_weight * tail_size(pairs, keep)

        with using(trainer.model, [SHARED], [SHARED]):
            trainer.fit(with_tail)
        if float(tail_size(pairs, keep).detach()) < before:
            with torch.no_grad():
                for down, up in pairs:
                    down[keep:] = 0.0
                    up[:, keep:] = 0.0

    def combine(self, uploads: Mapping[str, Vector], server: ServerSide) -> Mapping[str, Vector]:
        """As HETLoRA, but nobody gets back what it gave up."""
        received = super().combine(uploads, server)
        cut = {}
        for name, vector in received.items():
            rank = live_rank(unpack(uploads[name], server, name))
            matrices = [(a[:rank], b[:, :rank]) for a, b in unpack(vector, server, name)]
            cut[name] = pack([pad(pair, server.ranks[name]) for pair in matrices])
        return cut

    def exchange(self, uploads: Mapping[str, Vector], servers: Mapping[str, ServerSide]) -> Exchange:
        """Only the live part of an adapter travels."""
        exchanged = super().exchange(uploads, servers)
        shares = {
            name: live_rank(unpack(uploads[name], server, name)) / server.ranks[name]
            for server in servers.values()
            for name in server.ranks
        }
        sent, got = (
            {name: round(count * shares[name]) for name, count in side.items()}
            for side in (exchanged.sent, exchanged.got)
        )
        return Exchange(exchanged.received, sent, got)


def live_rank(matrices: Matrices) -> int:
    """How many leading rows of A and columns of B have not been given up; at least 1."""
    live = [
        np.flatnonzero(a.any(axis=1) | b.any(axis=0)).max(initial=0) + 1  # zero in both is given up
        for a, b in matrices
    ]
    return int(max(live))


def tail_size(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], keep: int) -> torch.Tensor:
    """‖B_tail‖·‖A_tail‖, Frobenius, summed over the modules."""
    return torch.stack(
        [torch.linalg.norm(up[:, keep:]) * torch.linalg.norm(down[keep:]) for down, up in pairs]
    ).sum()
