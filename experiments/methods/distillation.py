"""Learning from another model's logits at the positions of answers. B batch, K positions, V vocabulary."""

import torch
from torch import nn
from torch.nn import functional

from fedmosaic.client.model.examples import IGNORED
from fedmosaic.client.model.loss import Batch, logits_at


def answer_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits (B, K, V), float32, at every position that is an answer's in some row."""
    positions = (batch["labels"][:, 1:] != IGNORED).any(dim=0).nonzero().squeeze(1)
    return logits_at(model, batch, positions).float()


def answer_labels(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (B, K) at the positions that `answer_logits` looks at, and which of them are an answer's."""
    labels_BT = batch["labels"][:, 1:]
    labels_BK = labels_BT[:, (labels_BT != IGNORED).any(dim=0)]
    return labels_BK, labels_BK != IGNORED


def answer_mean(values_BK: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean over each row's answer tokens, (B,)."""
    _, mask_BK = answer_labels(batch)
    return (values_BK * mask_BK).sum(dim=1) / mask_BK.sum(dim=1)


def label_losses(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Cross entropy with the answers themselves, (B,), of logits (B, K, V)."""
    labels_BK, _ = answer_labels(batch)
    hard = functional.cross_entropy(
        logits.flatten(0, 1), labels_BK.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return answer_mean(hard.view_as(labels_BK), batch)


def soft_divergence(
    student: torch.Tensor, teacher: torch.Tensor, batch: Batch, temperature: float = 2.0
) -> torch.Tensor:
    """T² KL(teacher ‖ student), (B,), of logits (B, K, V)."""
    divergence = functional.kl_div(
        (student / temperature).log_softmax(-1),
        (teacher / temperature).log_softmax(-1),
        reduction="none",
        log_target=True,
    )
    return answer_mean(temperature**2 * divergence.sum(-1), batch)
