"""δ of a ledger that is kept while the data changes a little."""

from pathlib import Path

import pytest

from fedmosaic.client.__main__ import ledger_delta
from fedmosaic.privacy.accounting import default_delta
from fedmosaic.privacy.ledger import Ledger
from fedmosaic.protos.errors import LedgerError


def test_a_new_ledger_gets_the_default(tmp_path: Path) -> None:
    assert ledger_delta(tmp_path / "ledger.sqlite", 1000) == default_delta(1000)


@pytest.mark.parametrize("now", [200, 999, 1000, 1001, 1900])
def test_a_kept_ledger_keeps_its_delta_while_it_is_at_most_one_over_n(tmp_path: Path, now: int) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger.open(path, "ada", default_delta(1000), 8.0).close()
    assert ledger_delta(path, now) == default_delta(1000)
    Ledger.open(path, "ada", ledger_delta(path, now), 8.0, examples=now).close()


def test_more_examples_than_that_are_refused_with_the_number_that_is_possible(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger.open(path, "ada", default_delta(1000), 8.0).close()
    with pytest.raises(LedgerError, match="at most 1995 examples"):
        ledger_delta(path, 2000)
    assert ledger_delta(path, 1995) == default_delta(1000)
