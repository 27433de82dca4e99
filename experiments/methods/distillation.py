"""Learning from another model's logits at the positions of answers. B batch, K positions, V vocabulary."""

import torch
from torch import nn
from torch.nn import functional

from fedmosaic.client.model.examples import IGNORED
from fedmosaic.client.model.loss import Batch, logits_at

DISTILLATION_TEMPERATURE = 2.0


def answer_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits (B, K, V), float32, at every position that is an answer's in some row."""
    positions = (batch["labels"][:, 1:] != IGNORED).any(dim=0).nonzero().squeeze(1)
    return logits_at(model, batch, positions).float()


def answer_labels(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (B, K) at the positions that `answer_logits` looks at, and which of them are an answer's."""
    labels_BT = batch["labels"][:, 1:]
    labels_BK = labels_BT[:, (labels_BT != IGNORED).any(dim=0)]
    return labels_BK, labels_BK != IGNORED


def soft_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² KL(teacher ‖ student) at every position, (B, K), of logits (B, K, V)."""
    divergence = functional.kl_div(
        (student / temperature).log_softmax(-1),
        (teacher / temperature).log_softmax(-1),
        reduction="none",
        log_target=True,
    )
    return temperature**2 * divergence.sum(-1)


def distilled(student: torch.Tensor, teacher: torch.Tensor, batch: Batch) -> torch.Tensor:
    """½ (cross entropy + T² KL(teacher ‖ student)) per example, each a mean over its answer tokens.

    Args:
        student: (B, K, V) from `answer_logits`.
        teacher: the same, without gradient.
        batch: with labels.

    Returns:
        (B,) losses.
    """
    labels_BK, mask_BK = answer_labels(batch)
    hard_BK = functional.cross_entropy(
        student.flatten(0, 1), labels_BK.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(labels_BK)
    both_BK = 0.5 * (hard_BK + soft_divergence(student, teacher, DISTILLATION_TEMPERATURE)) * mask_BK
    return both_BK.sum(dim=1) / mask_BK.sum(dim=1)
