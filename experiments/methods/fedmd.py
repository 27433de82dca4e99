"""FedMD: clients learn from the mean of what all say about public data."""

from collections.abc import Mapping
from typing import ClassVar

from fedmosaic.experiments.methods.knowledge import (
    Lesson,
    Translator,
    by_architecture,
    learn,
    mean_knowledge,
    told,
)
from fedmosaic.experiments.methods.lora import Vector
from fedmosaic.experiments.methods.strategy import (
    SHARED,
    TEACHER,
    Exchange,
    ServerSide,
    Strategy,
    check_uploads,
)


class FedMd(Strategy):
    """Every client tells what it says about public examples and learns from the mean of all.

    No weights leave. Probabilities are averaged, not logits: logits of different vocabularies have no common
    scale. The first training on the public examples is left out, because the models are pretrained.

    Reference: Li and Wang (2019), arXiv 1910.03581.
    """

    adapters: ClassVar[tuple[str, ...]] = (SHARED, TEACHER)
    shares = True

    def __init__(self) -> None:
        super().__init__()
        self._translate = Translator()

    def exchange(self, uploads: Mapping[str, Vector], servers: Mapping[str, ServerSide]) -> Exchange:
        """Consensus, then every client digests it."""
        check_uploads(uploads)
        groups = list(by_architecture(uploads, servers))
        said = told(groups)
        received: dict[str, Vector] = {}
        got: dict[str, int] = {}
        for student, own in groups:
            opinions = [self._translate(items, teacher, student) for teacher, items in said.values()]
            consensus = [mean_knowledge(about) for about in zip(*opinions, strict=True)]
            for name, vector in own.items():
                received[name] = learn(student, vector, Lesson(consensus))
                got[name] = sum(item.nbytes for item in consensus)
        sent = {name: sum(item.nbytes for item in items) for name, (_, items) in said.items()}
        return Exchange(received, sent, got)

    def newcomer(self, alike: Mapping[str, Vector], architecture: str) -> Vector | None:
        """A fresh adapter: what members go on with is their own."""
        return None
