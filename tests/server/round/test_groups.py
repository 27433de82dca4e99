"""Groups from similarities: right, without regard to order, and not to be shrunk from outside."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmosaic.server.round.groups import divide, group_clients, mixing_weights
from fedmosaic.server.round.relevance import Relevance, corrected_cosine


def _profiles(
    sizes: list[int], seed: int = 0, dimensions: int = 32, spread: float = 0.3
) -> tuple[list[str], npt.NDArray[np.float64]]:
    source = np.random.default_rng(seed)
    centres = np.linalg.qr(source.normal(size=(dimensions, len(sizes))))[0].T
    rows = [
        centre + spread * source.normal(size=dimensions) / np.sqrt(dimensions)
        for centre, size in zip(centres, sizes, strict=True)
        for _ in range(size)
    ]
    names = [f"c{index:02}" for index in range(sum(sizes))]
    return names, np.array(rows)


def _relevance(rows: npt.NDArray[np.float64]) -> Relevance:
    return corrected_cosine(rows, np.full(len(rows), 1e-4))


def test_planted_groups_are_found() -> None:
    names, rows = _profiles([6, 5, 7])
    found = group_clients(names, _relevance(rows), 3, 4)
    assert found == (tuple(names[:6]), tuple(names[6:11]), tuple(names[11:]))


@given(st.permutations(range(18)), st.integers(0, 2**16))
def test_the_order_of_clients_changes_nothing(order: list[int], seed: int) -> None:
    names, rows = _profiles([6, 5, 7], seed, spread=1.0)
    plain = group_clients(names, _relevance(rows), 3, 4)
    shuffled = group_clients([names[k] for k in order], _relevance(rows[list(order)]), 3, 4)
    assert shuffled == plain


@given(st.integers(0, 2**16), st.integers(1, 6), st.integers(2, 9), st.integers(4, 30))
def test_every_client_is_in_one_group_of_enough_members(
    seed: int, groups: int, least: int, count: int
) -> None:
    source = np.random.default_rng(seed)
    rows = source.normal(size=(count, 8)) * source.uniform(0, 2, (count, 1))
    rows[source.uniform(size=count) < 0.2] = np.nan
    names = [f"c{index:02}" for index in range(count)]
    found = group_clients(names, _relevance(rows), groups, least)
    assert sorted(name for group in found for name in group) == names
    assert len(found) <= max(1, groups)
    assert len(found) == 1 or min(map(len, found)) >= least


def test_who_fits_nowhere_joins_the_nearest_and_who_has_no_profile_the_largest() -> None:
    names, rows = _profiles([6, 7])
    stranger = rows[0] * 0.6 + np.roll(rows[0], 5) * 0.8
    rows = np.vstack([rows, stranger, np.full(32, np.nan)])
    found = group_clients([*names, "odd", "silent"], _relevance(rows), 3, 4)
    assert found == ((*names[:6], "odd"), (*names[6:], "silent"))


def test_a_spoofing_member_cannot_get_a_group_below_the_least_number() -> None:
    """It may choose its own profile and so its group; the group of anybody else keeps enough others."""
    names, rows = _profiles([6, 6])
    for seed in range(20):
        spoofed = rows.copy()
        spoofed[0] = np.random.default_rng(seed).normal(size=32) * 10.0 ** (seed % 5)
        found = group_clients(names, _relevance(spoofed), 6, 5)
        assert min(map(len, found)) >= 5


def test_no_family_is_in_a_group_of_another_or_mixes_its_sums() -> None:
    """Profiles that are alike across families change nothing; two families share the number of groups."""
    names, rows = _profiles([6, 6])
    families = {name: "xy"[index % 2] for index, name in enumerate(names)}
    made = divide(families, _relevance(rows), 4, 3, 0.2)
    kin = [{families[name] for name in group} for group in made.groups]
    assert sorted(map(sorted, kin)) == [["x"], ["x"], ["y"], ["y"]]
    for name, row in made.mixing.items():
        assert sum(row) == pytest.approx(1.0)
        assert all((weight > 0.0) == (families[name] in of) for weight, of in zip(row, kin, strict=True))
        made.check(name, families, 3, 4)
    shuffled = [7, 3, 11, 0, 5, 9, 1, 10, 2, 6, 4, 8]
    again = divide({names[k]: families[names[k]] for k in shuffled}, _relevance(rows[shuffled]), 4, 3, 0.2)
    assert again.groups == made.groups
    assert all(again.mixing[name] == pytest.approx(row) for name, row in made.mixing.items())


def test_mixing_prefers_the_own_group_and_adds_up_to_one() -> None:
    names, rows = _profiles([6, 6])
    found = _relevance(rows)
    groups = group_clients(names, found, 2, 4)
    mixing = mixing_weights(names, found, groups, 0.2)
    assert all(sum(row) == pytest.approx(1.0) for row in mixing.values())
    assert all(mixing[name][0] > 0.9 for name in names[:6])
    assert all(mixing[name][1] > 0.9 for name in names[6:])


def test_without_a_profile_the_own_group_alone_counts() -> None:
    names, rows = _profiles([6, 6])
    rows[3] = np.nan
    found = _relevance(rows)
    groups = group_clients(names, found, 2, 4)
    own = next(index for index, group in enumerate(groups) if "c03" in group)
    assert mixing_weights(names, found, groups, 0.2)["c03"][own] == 1.0
