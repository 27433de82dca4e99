"""FedMKT: clients and a server's model teach each other what they know better."""

from collections.abc import Sequence
from typing import ClassVar

from fedmosaic.experiments.methods.knowledge import Knowledge, KnowledgeStrategy, Lesson, knowledge_of, learn
from fedmosaic.experiments.methods.lora import read_adapter
from fedmosaic.experiments.methods.strategy import SHARED, ServerSide


class FedMkt(KnowledgeStrategy):
    """Clients and a model of the server teach each other what they know better, example by example.

    The server's model learns from the client with the least loss, if that is less than its own; then each
    client learns from it likewise. There is one per architecture, as in the comparison of FedMosaic's
    authors. Reference: Fan et al. (2024), arXiv 2406.02224, equations 7 to 10 and algorithm 2.
    """

    label_weight: ClassVar[float] = 0.9
    """λ: of the public answers themselves, beside 1 - λ of what others say."""

    def answer(self, server: ServerSide, opinions: Sequence[Sequence[Knowledge]]) -> list[Knowledge]:
        """What the server's model says once it has learnt from the best of all."""
        begun = self.server_state.get(server.architecture)
        begun = read_adapter(server.model, SHARED) if begun is None else begun
        best = [min(about, key=lambda item: item.loss) for about in zip(*opinions, strict=True)]
        taught = learn(server, begun, self.lesson(best, knowledge_of(server, [begun])))
        self.server_state[server.architecture] = taught
        return knowledge_of(server, [taught])

    def lesson(self, answer: Sequence[Knowledge], own: Sequence[Knowledge]) -> Lesson:
        """What others know better, beside the public answers themselves."""
        better = better_known(answer, own)
        return Lesson(better, weight=1.0 - self.label_weight, label_weight=self.label_weight)


def better_known(others: Sequence[Knowledge], own: Sequence[Knowledge]) -> list[Knowledge | None]:
    """What others know with less loss, None for the rest."""
    return [theirs if theirs.loss < mine.loss else None for theirs, mine in zip(others, own, strict=True)]
