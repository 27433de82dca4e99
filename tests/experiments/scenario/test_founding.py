"""The public basis that a run keeps for the next one."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedmosaic.experiments.scenario import founding
from fedmosaic.experiments.scenario.founding import fit_profile
from fedmosaic.privacy.federation.kits import BASIS


def test_a_fitted_basis_is_kept_for_the_next_run_and_a_damaged_one_is_not_used(
    tmp_path: Path, tiny_scenario: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[object] = []
    really = founding.fit
    monkeypatch.setattr(founding, "fit", lambda arguments: fits.append(arguments) or really(arguments))

    def fitted(name: str) -> Any:
        return fit_profile(
            tiny_scenario(), tmp_path / name, Console(file=io.StringIO()), own_process=False,
            kept=tmp_path / "cache" / "basis",
        )  # fmt: skip

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
