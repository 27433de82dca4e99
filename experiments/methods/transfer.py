"""Baselines that carry knowledge between architectures by what models say about public examples."""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from fedmosaic.experiments.methods.knowledge import (
    Knowledge,
    Lesson,
    Translator,
    by_architecture,
    knowledge_of,
    learn,
    mean_knowledge,
)
from fedmosaic.experiments.methods.lora import Vector, read_adapter
from fedmosaic.experiments.methods.server_side import TEACHER
from fedmosaic.experiments.methods.strategies import (
    SHARED,
    Exchange,
    FedAvg,
    ServerSide,
    Strategy,
    check_uploads,
)


class Takfl(FedAvg):
    """The clients of each architecture teach every architecture's mean; what each lesson changed is added up.

    For every student and every teaching architecture (the student's own among them) distillation begins at
    the student's mean adapter; the task vectors, result less mean, are averaged and added to the mean. The
    release of FedMosaic's authors subtracts a result from itself, so its task vectors are zero.

    Reference: Morafah et al. (2024), arXiv 2409.18461, with the temperatures of the authors' comparison.
    """

    adapters: ClassVar[tuple[str, ...]] = (SHARED, TEACHER)
    temperature: ClassVar[float] = 3.0
    anchor_temperature: ClassVar[float] = 20.0
    anchor_weight: ClassVar[float] = 0.01

    def __init__(self) -> None:
        super().__init__()
        self._translate = Translator()

    def exchange(self, uploads: Mapping[str, Vector], servers: Mapping[str, ServerSide]) -> Exchange:
        """One student per architecture, taught by all."""
        check_uploads(uploads)
        groups = list(by_architecture(uploads, servers))
        lessons = [knowledge_of(server, list(own.values()), self.temperature) for server, own in groups]
        received: dict[str, Vector] = {}
        for student, own in groups:
            mean = next(iter(self.combine(own, student).values()))
            vectors = [
                learn(
                    student,
                    mean,
                    Lesson(
                        self._translate(lesson, teacher, student),
                        temperature=self.temperature,
                        anchor_weight=self.anchor_weight,
                        anchor_temperature=self.anchor_temperature,
                    ),
                )
                - mean
                for (teacher, _), lesson in zip(groups, lessons, strict=True)
            ]
            moved = (mean + np.mean(vectors, axis=0, dtype=np.float64)).astype(np.float32)
            received |= dict.fromkeys(own, moved)
        return Exchange.of_adapters(uploads, received)


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
        said = {
            name: (server, knowledge_of(server, [vector]))
            for server, own in groups
            for name, vector in own.items()
        }
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


class FedMkt(Strategy):
    """Clients and a model of the server teach each other what they know better, example by example.

    The server's model learns, for each public example, from the client with the least loss, if that is less
    than its own; then each client learns from the server's model where that has less loss. The server keeps
    one model per architecture, as in the comparison of FedMosaic's authors; the original keeps one large one.

    Reference: Fan et al. (2024), arXiv 2406.02224, equations 7 to 10 and algorithm 2.
    """

    adapters: ClassVar[tuple[str, ...]] = (SHARED, TEACHER)
    shares = True
    label_weight: ClassVar[float] = 0.9
    """λ: of the public answers themselves, beside 1 - λ of what others say."""

    def __init__(self) -> None:
        super().__init__()
        self._translate = Translator()

    def exchange(self, uploads: Mapping[str, Vector], servers: Mapping[str, ServerSide]) -> Exchange:
        """From the clients to the server's models, and back."""
        check_uploads(uploads)
        groups = list(by_architecture(uploads, servers))
        said = {
            name: (server, knowledge_of(server, [vector]))
            for server, own in groups
            for name, vector in own.items()
        }
        received: dict[str, Vector] = {}
        got: dict[str, int] = {}
        for server, own in groups:
            begun = self.server_state.get(server.architecture)
            begun = read_adapter(server.model, SHARED) if begun is None else begun
            opinions = [self._translate(items, teacher, server) for teacher, items in said.values()]
            best = [min(about, key=lambda item: item.loss) for about in zip(*opinions, strict=True)]
            taught = learn(server, begun, self._lesson(best, knowledge_of(server, [begun])))
            self.server_state[server.architecture] = taught
            dispatched = knowledge_of(server, [taught])
            for name, vector in own.items():
                received[name] = learn(server, vector, self._lesson(dispatched, said[name][1]))
                got[name] = sum(item.nbytes for item in dispatched)
        sent = {name: sum(item.nbytes for item in items) for name, (_, items) in said.items()}
        return Exchange(received, sent, got)

    def newcomer(self, alike: Mapping[str, Vector], architecture: str) -> Vector | None:
        """The server's model of the architecture."""
        return self.server_state.get(architecture)

    def _lesson(self, others: list[Knowledge], own: list[Knowledge]) -> Lesson:
        better = better_known(others, own)
        return Lesson(better, weight=1.0 - self.label_weight, label_weight=self.label_weight)


def better_known(others: list[Knowledge], own: list[Knowledge]) -> list[Knowledge | None]:
    """What others know with less loss, None for the rest."""
    return [theirs if theirs.loss < mine.loss else None for theirs, mine in zip(others, own, strict=True)]
