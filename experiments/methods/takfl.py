"""TAKFL: architectures teach each other, and the task vectors are averaged."""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from fedmosaic.experiments.methods.fedavg import FedAvg
from fedmosaic.experiments.methods.knowledge import Lesson, Translator, knowledge_of, learn
from fedmosaic.experiments.methods.lora import Vector
from fedmosaic.experiments.methods.strategy import SHARED, TEACHER, Exchange, ServerSide


class Takfl(FedAvg):
    """The clients of each architecture teach every architecture's mean; what each lesson changed is added up.

    Every distillation begins at the student's mean adapter; the task vectors, result less mean, are averaged
    and added to it (the release of FedMosaic's authors subtracts a result from itself). Reference: Morafah et
    al. (2024), arXiv 2409.18461, with the temperatures of the authors' comparison.
    """

    adapters = (SHARED, TEACHER)
    temperature: ClassVar[float] = 3.0

    def __init__(self) -> None:
        super().__init__()
        self._translate = Translator()

    def exchange(self, uploads: Mapping[str, Vector], servers: Mapping[str, ServerSide]) -> Exchange:
        """One student per architecture, taught by all."""
        lessons = [
            (server, knowledge_of(server, [uploads[name] for name in sorted(server.ranks)], self.temperature))
            for server in servers.values()
        ]
        received: dict[str, Vector] = {}
        for student in servers.values():
            mean = next(iter(self.combine({name: uploads[name] for name in student.ranks}, student).values()))
            vectors = []
            for teacher, told in lessons:
                targets = self._translate(told, teacher, student)
                weights = {"anchor_weight": 0.01, "anchor_temperature": 20.0}
                lesson = Lesson(targets, temperature=self.temperature, **weights)
                vectors.append(learn(student, mean, lesson) - mean)
            moved = (mean + np.mean(vectors, axis=0, dtype=np.float64)).astype(np.float32)
            received |= dict.fromkeys(student.ranks, moved)
        return Exchange.of_adapters(uploads, received)
