"""Keep the log of this package out of a console that shows something else, and put it back afterwards."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_log(level: int = logging.ERROR) -> Iterator[None]:
    """While open, the package logs only from `level` on, and only to handlers of its own loggers."""
    logger = logging.getLogger("fedmosaic")
    before, propagate = logger.level, logger.propagate
    logger.setLevel(level)
    logger.propagate = False
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.propagate = propagate
