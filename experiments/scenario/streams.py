"""When a client's examples arrive, and which of those that have arrived are trained on.

Everything is a function of examples, rounds and a seed: a run that goes on sees the same stream.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from fedmosaic.client.data.records import Example
from fedmosaic.client.model.training import EpochSampler
from fedmosaic.protos.errors import ConfigurationError


def arrivals(
    tasks: Sequence[Sequence[Example]], rounds: int, order: Literal["static", "dynamic"], seed: int
) -> tuple[tuple[Example, ...], ...]:
    """Cut a client's tasks into one slice per round, from round 1 on; every example arrives exactly once.

    "dynamic" lets the tasks arrive one after the other, each over an equal share of the rounds, which may end
    within a round; "static" mixes all tasks into every round. Slices differ by at most one example per task.
    After DRAKE's PFL-Dynamic and PFL-Static (arXiv 2506.11024). `ConfigurationError` if there is no example
    or no round.
    """
    if rounds < 1 or not any(tasks):
        raise ConfigurationError(f"a stream of {sum(map(len, tasks))} examples over {rounds} rounds is empty")
    shuffled = [
        [examples[i] for i in np.random.default_rng([seed, number]).permutation(len(examples))]
        for number, examples in enumerate(tasks)
    ]
    if order == "static":
        everything = [example for examples in shuffled for example in examples]
        mixed = np.random.default_rng([seed, len(tasks)]).permutation(len(everything))
        return _slices([everything[i] for i in mixed], rounds)
    # In units of 1/len(tasks) of a round, so that a share of the rounds is a whole number.
    slices: list[list[Example]] = [[] for _ in range(rounds)]
    for number, examples in enumerate(shuffled):
        for unit, part in enumerate(_slices(examples, rounds)):
            slices[(number * rounds + unit) // len(tasks)].extend(part)
    return tuple(tuple(part) for part in slices)


def _slices(examples: Sequence[Example], count: int) -> tuple[tuple[Example, ...], ...]:
    borders = [len(examples) * i // count for i in range(count + 1)]
    return tuple(tuple(examples[a:b]) for a, b in pairwise(borders))


@dataclass(frozen=True)
class Stream:
    """What arrives in each round from 1 on, and batches of what has arrived, those drawn least first."""

    slices: tuple[tuple[Example, ...], ...]
    batches: int
    batch_size: int
    seed: int

    def arriving(self, round_number: int) -> tuple[Example, ...]:
        """Examples that arrive in a round."""
        return self.slices[round_number - 1]

    def training(self, round_number: int) -> list[Example]:
        """Examples of a round's batches, end to end; see `drawn`."""
        arrived = [example for part in self.slices[:round_number] for example in part]
        return [arrived[index] for index in self.drawn(round_number)]

    def drawn(self, round_number: int) -> list[int]:
        """Which examples, numbered by arrival, the batches of a round hold, end to end.

        While a round's examples arrive one by one, batches are drawn at an even pace with probabilities
        softmax(-count / 0.125) over what is there; counts fade by 0.99 per batch. A memory smaller than a
        batch is repeated to fill it. `ConfigurationError` if nothing has arrived by then.
        """
        counts = np.zeros(sum(map(len, self.slices)))
        present = 0
        drawn: list[int] = []
        for number in range(1, round_number + 1):
            drawn = []
            for arrived, batches in self._pace(len(self.arriving(number))):
                present += arrived
                for _ in range(batches):
                    if not present:
                        raise ConfigurationError(f"no example has arrived by round {number}")
                    drawn += self._batch(counts[:present], number, len(drawn))
        return drawn

    def _pace(self, arriving: int) -> list[tuple[int, int]]:
        """(arrivals, batches after them), in order; the batches sum to those of a round."""
        if not arriving:
            return [(0, self.batches)]
        due = [math.floor(self.batches * (i + 1) / arriving) for i in range(arriving)]
        return [(1, b - a) for a, b in zip([0, *due], due, strict=False)]

    def _batch(self, counts: np.ndarray, number: int, position: int) -> list[int]:
        counts *= 0.99
        random = np.random.default_rng([self.seed, number, position])
        logits = -(counts - counts.min()) / 0.125
        # Gumbel's trick draws without replacement with these probabilities, also where they underflow.
        order = np.argsort(-(logits + random.gumbel(size=len(counts))), kind="stable")
        chosen = order[: self.batch_size].tolist()
        counts[chosen] += 1.0
        return [chosen[i % len(chosen)] for i in range(self.batch_size)]


class InOrder(EpochSampler):
    """Walks over examples as they stand, once; for a list that a replay has already put in order."""

    def __init__(self, size: int, seed: int, round_number: int) -> None:
        super().__init__(size, seed)
        self._round, self._taken = round_number, 0

    def take(self, count: int) -> list[int]:
        """The next `count` indices; begins anew at the end."""
        first = self._taken
        self._taken += count
        return [i % self._size for i in range(first, first + count)]

    def state_dict(self) -> dict[str, int]:
        """Where the walk stands; the round stands for the epoch."""
        return {"size": self._size, "seed": self._seed, "epoch": self._round, "position": self._taken}
