"""The part of `make chaos` that needs no processes of its own, too short to find more than itself broken."""

from pathlib import Path
from typing import get_args

from chaos.campaign import MODES
from chaos.formats import mutate_everything
from fedmosaic.privacy.federation.terms import Protection


def test_every_call_and_format_has_an_original_that_is_read_as_it_is(tmp_path: Path) -> None:
    tried, _ = mutate_everything(tmp_path, seed=1, count=2)
    assert tried == 2 * (8 + 8 + 22 + 40)


def test_every_protection_has_its_runs() -> None:
    assert {terms.adapter.protection for _, terms in MODES.values()} == set(get_args(Protection))
