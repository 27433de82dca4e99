"""Layer pairs: the rules, linear CKA against its definition, the best increasing assignment."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmosaic.alignment.blocks import HsicSums, LayerSimilarity, choose_layers
from fedmosaic.client.colora import target_layers
from fedmosaic.protos.errors import ConfigurationError, ModelError


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """The definition of Kornblith et al. on centred features."""
    x, y = x - x.mean(0), y - y.mean(0)
    return float((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def similarity(left: list[torch.Tensor], right: list[torch.Tensor]) -> LayerSimilarity:
    sums = HsicSums()
    sums.update(left, right)
    return sums.finish()


def test_cka_is_the_definition_on_many_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8192, 6, generator=generator)
    mixed = x @ torch.randn(6, 9, generator=generator) + torch.randn(8192, 9, generator=generator)
    other = torch.randn(8192, 5, generator=generator)
    found = similarity([x, mixed], [mixed, other])
    for i, left in enumerate((x, mixed)):
        for j, right in enumerate((mixed, other)):
            assert float(found.cka_LM[i, j]) == pytest.approx(linear_cka(left, right), abs=0.03)


def test_cka_is_one_for_the_same_up_to_rotation_scale_and_shift() -> None:
    x = torch.randn(512, 6, generator=torch.Generator().manual_seed(1))
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2)))[0]
    found = similarity([x], [5.0 * x @ rotation + 100.0])
    assert float(found.cka_LM) == pytest.approx(1.0, abs=1e-4)


def test_cka_of_independent_states_has_no_bias() -> None:
    # The plain estimator would give about H/n = 0.5 here.
    generator = torch.Generator().manual_seed(3)
    left, right = ([torch.randn(4096, 128, generator=generator)] for _ in range(2))
    assert abs(float(similarity(left, right).cka_LM)) < 0.05
    assert linear_cka(left[0][:256], right[0][:256]) > 0.3


def test_minibatches_of_different_calls_add_up() -> None:
    x = torch.randn(512, 4, generator=torch.Generator().manual_seed(4))
    y = x + torch.randn(512, 4, generator=torch.Generator().manual_seed(5))
    sums = HsicSums()
    for start in (0, 256):
        sums.update([x[start : start + 256]], [y[start : start + 256]])
    torch.testing.assert_close(sums.finish().cka_LM, similarity([x], [y]).cka_LM)


@pytest.mark.parametrize("states", [torch.ones(300, 4), torch.randn(3, 4)])
def test_states_that_say_nothing_are_refused(states: torch.Tensor) -> None:
    with pytest.raises(ModelError):
        similarity([states], [states])


def test_deviation_is_zero_on_the_diagonal_and_large_when_reversed() -> None:
    eye = torch.eye(6, dtype=torch.float64)
    assert LayerSimilarity(eye).mean_deviation() == 0.0
    assert LayerSimilarity(eye.flip(1)).mean_deviation() == pytest.approx(0.5)
    # Twice as deep, each layer most like the one at the same relative depth.
    deep = torch.zeros(4, 8, dtype=torch.float64)
    deep[torch.arange(4), 2 * torch.arange(4) + 1] = 1.0
    assert LayerSimilarity(deep).mean_deviation() == 0.0
    assert LayerSimilarity(deep).of_pairs([0, 1], [1, 2]) == (1.0, 0.0)


def test_rules_by_name_are_those_of_the_adapter() -> None:
    assert choose_layers(30, (1, 3, 5, 7), "relative_depth") == target_layers(30, 4) == (7, 14, 22, 29)
    assert choose_layers(6, (1, 3, 5, 7), "authors") == (0, 1, 2, 5)
    assert choose_layers(30, (1, 3, 5, 7), "late") == (26, 27, 28, 29)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), depth=st.integers(3, 8))
def test_the_cka_rule_finds_the_best_increasing_layers(seed: int, depth: int) -> None:
    cka = torch.rand(5, depth, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    anchor = (0, 2, 4)
    found = choose_layers(depth, anchor, "cka", LayerSimilarity(cka))
    assert list(found) == sorted(set(found))

    def total(layers: tuple[int, ...]) -> float:
        return sum(float(cka[a, m]) for a, m in zip(anchor, layers, strict=True))

    assert total(found) == pytest.approx(max(total(layers) for layers in combinations(range(depth), 3)))


def test_wrong_rules_are_named() -> None:
    with pytest.raises(ConfigurationError, match="'nearest'"):
        choose_layers(6, (1, 3), "nearest")
    with pytest.raises(ConfigurationError, match="similarity"):
        choose_layers(6, (1, 3), "cka")
    for rule in ("cka", "late"):
        with pytest.raises(ModelError, match="fewer"):
            choose_layers(1, (1, 3), rule, LayerSimilarity(torch.rand(4, 1)))
