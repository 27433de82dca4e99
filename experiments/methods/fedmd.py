"""FedMD: clients learn from the mean of what all say about public data."""

from collections.abc import Sequence

import torch

from fedmosaic.experiments.methods.knowledge import Knowledge, KnowledgeStrategy, Lesson
from fedmosaic.experiments.methods.strategy import ServerSide


class FedMd(KnowledgeStrategy):
    """Every client tells what it says about public examples and learns from the mean of all.

    Probabilities are averaged: logits of different vocabularies have no common scale. Models are pretrained,
    so there is no first training on the public examples. Reference: Li and Wang (2019), arXiv 1910.03581.
    """

    def answer(self, server: ServerSide, opinions: Sequence[Sequence[Knowledge]]) -> list[Knowledge]:
        """The consensus."""
        return [mean_knowledge(about) for about in zip(*opinions, strict=True)]

    def lesson(self, answer: Sequence[Knowledge], own: Sequence[Knowledge]) -> Lesson:
        """All of it."""
        return Lesson(answer)


def mean_knowledge(items: Sequence[Knowledge]) -> Knowledge:
    """The mean of several predictions about one answer, all in one vocabulary."""
    return Knowledge(
        torch.cat([item.tokens for item in items], dim=1),
        torch.cat([item.probabilities for item in items], dim=1) / len(items),
        sum(item.loss for item in items) / len(items),
    )
