"""In which order examples are trained on."""

import numpy as np

from fedmosaic.protos.errors import ConfigurationError, StateError


class EpochSampler:
    """Walks over all examples in a fresh random order per epoch, and can be stopped and resumed.

    Args:
        size: Number of examples, at least 1.
        seed: Seed of the orders, at least 0.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1 or seed < 0:
            raise ConfigurationError(
                f"a sampler over {size} examples with seed {seed}; give at least one and a seed of 0 or more"
            )
        self._size, self._seed, self._epoch, self._position = size, seed, 0, 0

    def take(self, count: int) -> list[int]:
        """The next ``count`` indices; an epoch's end inside them is stepped over."""
        taken: list[int] = []
        while len(taken) < count:
            order = np.random.default_rng([self._seed, self._epoch]).permutation(self._size)
            part = order[self._position : self._position + count - len(taken)].tolist()
            taken += part
            self._position += len(part)
            if self._position == self._size:
                self._epoch, self._position = self._epoch + 1, 0
        return taken

    def state_dict(self) -> dict[str, int]:
        """Where the walk stands, as plain integers."""
        return {
            "size": self._size,
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where another sampler stood; over other examples, at the beginning of the next epoch.

        Args:
            state: What `state_dict` gave.

        Over another number of examples, the next epoch begins: where the old walk stood means nothing then.

        Raises:
            StateError: The state is malformed.
        """
        names = ("size", "seed", "epoch", "position")
        values = [state.get(name) for name in names] if isinstance(state, dict) else []
        if not values or any(type(value) is not int or value < 0 for value in values):
            raise StateError(f"the sampler's state must hold {', '.join(names)}, none below 0")
        size, seed, epoch, position = (int(state[name]) for name in names)
        if position >= size:
            raise StateError(f"the sampler's state is at example {position} of {size}")
        # Their order within the epoch that was left says nothing about the examples that there are now.
        self._seed = seed
        self._epoch, self._position = (epoch, position) if size == self._size else (epoch + 1, 0)
