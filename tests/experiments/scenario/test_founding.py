"""The public basis that a run keeps for the next one, and a log that is silent for a while only."""

import io
import logging
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedmosaic.client.profile import fit
from fedmosaic.experiments.scenario.founding import fit_profile
from fedmosaic.experiments.scenario.quiet_log import quiet_log
from fedmosaic.privacy.federation.kits import BASIS
from fedmosaic.privacy.mechanism.profile import ProfileMechanism


def test_a_fitted_basis_is_kept_for_the_next_run_and_a_damaged_one_is_not_used(
    tmp_path: Path, tiny_scenario: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[object] = []
    really = fit.fit

    def noting(arguments: fit.Arguments) -> ProfileMechanism:
        fits.append(arguments)
        return really(arguments)

    monkeypatch.setattr(fit, "fit", noting)

    def fitted(name: str) -> Any:
        return fit_profile(
            tiny_scenario(),
            tmp_path / name,
            Console(file=io.StringIO()),
            own_process=False,
            kept=tmp_path / "cache" / "basis",
        )

    first = fitted("one")
    assert fitted("two") == first
    assert len(fits) == 1
    assert (tmp_path / "two" / "profile" / BASIS).read_bytes() == (
        tmp_path / "one" / "profile" / BASIS
    ).read_bytes()
    (tmp_path / "cache" / "basis" / BASIS).write_bytes(b"cut off")
    assert fitted("three") == first
    assert len(fits) == 2
    assert fitted("four") == first
    assert len(fits) == 2


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
