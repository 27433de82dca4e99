"""In which order examples are trained on."""

from typing import Final

import numpy as np

from fedmosaic.protos.errors import ConfigurationError, StateError

_STATE: Final = ("size", "seed", "epoch", "position")


class EpochSampler:
    """Walks over all examples in a fresh random order per epoch, and can be stopped and resumed."""

    def __init__(self, size: int, seed: int) -> None:
        """Begin over `size` examples; equal seeds give equal orders."""
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
        values = (self._size, self._seed, self._epoch, self._position)
        return dict(zip(_STATE, values, strict=True))

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where another sampler stood; over another number of examples, with the next epoch."""
        values = [state.get(name) for name in _STATE] if isinstance(state, dict) else []
        if not values or any(type(value) is not int or value < 0 for value in values):
            raise StateError(f"the sampler's state must hold {', '.join(_STATE)}, none below 0")
        size, seed, epoch, position = (state[name] for name in _STATE)
        if position >= size:
            raise StateError(f"the sampler's state is at example {position} of {size}")
        # Their order within the epoch that was left says nothing about the examples that there are now.
        self._seed = seed
        self._epoch, self._position = (epoch, position) if size == self._size else (epoch + 1, 0)
