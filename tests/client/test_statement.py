"""What the statement says of coalitions: from the rows that were accepted, never from the roster's size."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from builders import founding
from fedmosaic.client.planning import AdapterPlan
from fedmosaic.client.state import ClientState
from fedmosaic.client.statement import coalition_rows, statement_inputs
from fedmosaic.privacy.ledger.ledger import LEDGER, Ledger
from fedmosaic.privacy.ledger.rows import Channel
from fedmosaic.privacy.statement.build import statement
from fedmosaic.protos.errors import PolicyError
from fedmosaic.protos.messages import WeightRow


def test_the_budget_that_is_told_is_the_one_that_this_run_was_held_to(tmp_path: Path) -> None:
    """Stricter, and over more channels, than that of the run before, which opened the ledger."""
    path, state = tmp_path / LEDGER, ClientState(tmp_path / "state", "f", "ada")
    state.join_run("0" * 32)
    Ledger.open(path, "north", 1e-5, 8.0, "rdp", budgeted_channels=("profile",)).close()
    about = {"hash": bytes(32), "witness": None, "private_steps": 1}
    roster: Any = SimpleNamespace(terms=founding().terms, **about)
    both: tuple[Channel, ...] = ("adapter", "profile")
    with Ledger.open(path, "ada", 1e-5, 2.0, "rdp", budgeted_channels=both) as ledger:
        (told,) = statement(statement_inputs(roster, state, ledger, AdapterPlan(0.0, 0.1))).clients
    state.release()
    assert (told.client_id, told.target_epsilon, told.budgeted_channels) == ("ada", 2.0, both)


def row(*weights: int) -> WeightRow:
    return WeightRow(tuple("bcdefgh"[: len(weights)]), weights, 4)


def test_the_smallest_row_that_was_accepted_is_remembered_over_restarts(tmp_path: Path) -> None:
    state = ClientState(tmp_path / "state", "f", "a")
    assert state.smallest_row() is None
    state.accept_row("shared", 1, row(4, 4, 4, 4))
    state.accept_row("family", 1, row(6, 5, 5))
    # A contributor of weight zero contributes nothing.
    state.accept_row("shared", 2, row(4, 4, 4, 4, 0))
    assert state.smallest_row() == 3
    with pytest.raises(PolicyError, match="a different weight row"):
        state.accept_row("shared", 1, row(8, 8))
    state.release()
    again = ClientState(tmp_path / "state", "f", "a")
    assert again.smallest_row() == 3
    again.release()


def test_two_recipients_solve_for_what_rows_of_three_hide() -> None:
    """The true number of a federation of any size in which one row had three contributors."""
    assert [(r.colluding_recipients, r.independent_rows, r.contributors) for r in coalition_rows(3, 2)] == [
        (1, 1, 3),
        (2, 2, 2),
    ]


def test_rows_of_several_rounds_add_up_and_the_table_ends_where_one_round_suffices() -> None:
    found = [(r.colluding_recipients, r.independent_rows, r.contributors) for r in coalition_rows(11, 4)]
    assert found == [(1, 3, 11), (2, 6, 10), (3, 9, 9), (4, 8, 8), (5, 7, 7), (6, 6, 6)]
    assert coalition_rows(3, 1)[0].independent_rows == 0
