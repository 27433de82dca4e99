"""The package's log is silent for a while only, whatever happens in between."""

import logging

import pytest

from fedmosaic.experiments.scenario.quiet_log import quiet_log


def test_what_is_said_in_between_is_not_shown_and_later_is(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("fedmosaic.server.coordinator")
    with caplog.at_level(logging.INFO):
        with quiet_log():
            log.warning("between")
        log.info("afterwards")
    assert caplog.messages == ["afterwards"]


def test_an_error_leaves_no_silence_behind() -> None:
    logger = logging.getLogger("fedmosaic")
    before = logger.level, logger.propagate
    with pytest.raises(KeyError), quiet_log():
        raise KeyError("lost")
    assert (logger.level, logger.propagate) == before
