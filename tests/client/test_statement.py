"""What the statement says of coalitions: from the rows that were accepted, never from the roster's size."""

from pathlib import Path

import pytest

from fedmosaic.client.state import ClientState
from fedmosaic.client.statement import coalition_rows
from fedmosaic.protos.errors import PolicyError
from fedmosaic.protos.messages import WeightRow


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
