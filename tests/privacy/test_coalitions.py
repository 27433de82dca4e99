"""What recipients who put rows together know: against a dense inverse, by hand, and by count."""

import numpy as np
import pytest

from fedmosaic.experiments.attacks.statistics.collusion import smallest_coalition
from fedmosaic.privacy.coalitions import SOLVED, close_pairs, counted_coalition, estimate_errors, pair_errors


def test_the_errors_are_those_of_least_squares_on_real_adapters() -> None:
    generator = np.random.default_rng(0)
    weights = generator.dirichlet(np.ones(6), size=3)
    adapters = generator.standard_normal((6, 20_000))
    estimate = np.linalg.pinv(weights) @ (weights @ adapters)
    measured = np.linalg.norm(estimate - adapters, axis=1) / np.linalg.norm(adapters, axis=1)
    np.testing.assert_allclose(estimate_errors(weights), measured, atol=0.02)


def test_a_pair_is_what_its_two_rows_say_without_its_own_columns() -> None:
    generator = np.random.default_rng(1)
    rows = generator.dirichlet(np.ones(7), size=7)
    np.fill_diagonal(rows, 0.0)
    for member in range(1, 7):
        others = list(range(member))
        found = pair_errors(member, rows[member], others, rows[others])
        for other in others:
            outside = [index for index in range(7) if index not in (member, other)]
            exact = estimate_errors(rows[[member, other]][:, outside]).min()
            assert found[other] == pytest.approx(exact, abs=1e-7)
    assert pair_errors(3, rows[3], [], rows[[]]).shape == (0,)


@pytest.mark.parametrize("spread", [0.001, 0.05, 1.0])
@pytest.mark.parametrize("count", [4, 7, 40])
def test_no_pair_that_solves_for_an_adapter_is_passed_over(count: int, spread: float) -> None:
    generator = np.random.default_rng(2)
    seen = 0
    for _ in range(40):
        rows = np.maximum(0.0, 1.0 + spread * generator.standard_normal((count, count)))
        rows *= generator.random((count, count)) < generator.choice([0.6, 1.0])
        rows[:, :2] *= generator.choice([1.0, 30.0])
        np.fill_diagonal(rows, 0.0)
        rows = np.round(rows / np.maximum(rows.sum(axis=1, keepdims=True), 1e-9) * 4096) / 4096
        others = list(range(1, count))
        squares = rows[1:] ** 2
        close = close_pairs(0, rows[0], others, rows[1:], squares.sum(axis=1), squares.max(axis=1))
        solved = np.flatnonzero(pair_errors(0, rows[0], others, rows[1:]) < SOLVED)
        assert set(solved) <= set(close)
        seen += len(solved)
    assert seen or (count, spread) == (4, 1.0), "the test sees what it is about"


def test_most_pairs_of_a_large_federation_need_no_closer_look() -> None:
    rows = np.random.default_rng(3).normal(1.0, 0.3, (400, 400)).clip(0.0) / 400
    np.fill_diagonal(rows, 0.0)
    squares = rows[1:] ** 2
    known = squares.sum(axis=1), squares.max(axis=1)
    assert len(close_pairs(0, rows[0], list(range(1, 400)), rows[1:], *known)) == 0


def test_equal_rows_are_one_equation_and_a_unit_of_difference_is_another() -> None:
    """Rows that are meant to be equal, at 12 bits: what rounding moved by one unit is an adapter alone."""
    alike = np.array([[820, 819, 819, 819, 819], [820, 819, 819, 819, 819]]) / 4096
    assert estimate_errors(alike).min() == pytest.approx(np.sqrt(0.8), abs=1e-3)
    rounded = np.array([[820, 819, 819, 819, 819], [819, 819, 819, 819, 820]]) / 4096
    errors = estimate_errors(rounded)
    np.testing.assert_allclose(errors[[0, 4]], np.sqrt(0.5 - 1 / 6), atol=0.2)
    single = np.array([[820, 819, 819, 819], [819, 819, 819, 819]]) / 4096
    assert estimate_errors(single)[0] < 1e-3 < SOLVED < estimate_errors(single)[1]


def test_the_two_rows_of_the_review_give_both_adapters() -> None:
    """Rows over {V, X, C2} for C1 and {V, X, C1} for C2, each within every limit."""
    v, x, c1, c2 = range(4)
    rows = np.zeros((4, 4))
    rows[c1, [v, x, c2]] = 0.4, 0.3, 0.3
    rows[c2, [v, x, c1]] = 0.3, 0.4, 0.3
    assert estimate_errors(rows[[c1, c2]][:, [v, x]]).max() < 1e-6
    assert smallest_coalition([rows]) == 2
    assert counted_coalition(3, 1) == 2


def test_one_recipient_suffices_when_its_rows_change_and_the_adapters_do_not() -> None:
    first, second = np.zeros((5, 5)), np.zeros((5, 5))
    first[0, 1:], second[0, 1:] = (0.25, 0.25, 0.25, 0.25), (0.4, 0.2, 0.2, 0.2)
    assert smallest_coalition([first]) == 4
    assert smallest_coalition([first, second]) == 1


def test_rows_in_general_position_need_as_many_recipients_as_the_count_says() -> None:
    for members in (4, 5, 6, 7):
        rows = np.random.default_rng(members).dirichlet(np.full(members, 3.0), size=members)
        np.fill_diagonal(rows, 0.0)
        exact = next(size for size in range(1, members) if estimate_errors(rows[:size, size:]).min() < 1e-6)
        assert exact == counted_coalition(members - 1, 1)
        # A small error may be had earlier, never an exact one.
        found = smallest_coalition([rows])
        assert found is not None
        assert found <= exact


@pytest.mark.parametrize(
    ("contributors", "rows", "size"),
    [(1, 1, 1), (3, 1, 2), (4, 1, 3), (5, 1, 3), (11, 1, 6), (3, 2, 2), (11, 11, 1)],
)
def test_the_count_of_equations(contributors: int, rows: int, size: int) -> None:
    assert counted_coalition(contributors, rows) == size
