"""FedMKT: clients and a server's model teach each other what they know better."""

from collections.abc import Mapping
from typing import ClassVar

from fedmosaic.experiments.methods.knowledge import (
    Knowledge,
    Lesson,
    Translator,
    by_architecture,
    knowledge_of,
    learn,
    told,
)
from fedmosaic.experiments.methods.lora import Vector, read_adapter
from fedmosaic.experiments.methods.strategy import (
    SHARED,
    TEACHER,
    Exchange,
    ServerSide,
    Strategy,
    check_uploads,
)


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
        said = told(groups)
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
