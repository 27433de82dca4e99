"""Which layers and modules Co-LoRA takes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedmosaic.client.colora import find_decoder_layers, target_layers
from fedmosaic.client.colora.placement import plan_placements, select_modules
from fedmosaic.protos.errors import ConfigurationError, ModelError
from tiny import LINEARS, tiny_decoder, tiny_llava

# The authors' get_target_layers evaluated on the models of the paper; 0-based.
AUTHORS_TABLE = [
    (16, 4, (3, 7, 11, 15)),
    (28, 4, (6, 13, 20, 27)),
    (32, 4, (7, 15, 23, 31)),
    (24, 4, (5, 11, 17, 23)),
    (36, 4, (8, 17, 26, 35)),
    (16, 8, (1, 3, 5, 7, 9, 11, 13, 15)),
    (28, 8, (2, 5, 8, 11, 14, 17, 20, 27)),
    (32, 8, (3, 7, 11, 15, 19, 23, 27, 31)),
    (24, 8, (2, 5, 8, 11, 14, 17, 20, 23)),
    (36, 8, (3, 7, 11, 15, 19, 23, 27, 35)),
]


def test_the_first_and_the_last_layers_share_whatever_the_depth() -> None:
    assert target_layers(6, 4, "first") == target_layers(30, 4, "first") == (0, 1, 2, 3)
    assert (target_layers(30, 2, "late"), target_layers(2, 2, "late")) == ((28, 29), (0, 1))
    assert (target_layers(6, 4), target_layers(6, 4, "authors")) == ((1, 2, 4, 5), (0, 1, 2, 5))


@pytest.mark.parametrize(("depth", "blocks", "expected"), AUTHORS_TABLE)
def test_authors_rule_is_the_published_table(depth: int, blocks: int, expected: tuple[int, ...]) -> None:
    assert target_layers(depth, blocks, "authors") == expected
    assert (target_layers(depth, blocks) == expected) == (depth % blocks == 0), "both rules agree there"


@given(data=st.data(), depth=st.integers(1, 200), rule=st.sampled_from(["relative_depth", "authors", "late"]))
def test_targets_increase_and_end_at_the_last_layer(data: st.DataObject, depth: int, rule: str) -> None:
    blocks = data.draw(st.integers(1, depth))
    layers = target_layers(depth, blocks, rule)
    assert len(layers) == blocks
    assert list(layers) == sorted(set(layers))
    assert layers[0] >= 0
    assert layers[-1] == depth - 1


@given(data=st.data(), depth=st.integers(1, 200))
def test_relative_depth_is_within_half_a_layer_of_the_ideal(data: st.DataObject, depth: int) -> None:
    blocks = data.draw(st.integers(1, depth))
    for k, layer in enumerate(target_layers(depth, blocks), start=1):
        assert abs((layer + 1) - k * depth / blocks) <= 0.5


def test_target_layers_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ModelError, match="3 decoder layers, fewer than the 4 blocks"):
        target_layers(3, 4)
    with pytest.raises(ConfigurationError, match="at least 1"):
        target_layers(3, 0)
    with pytest.raises(ConfigurationError, match="relative_depth, authors"):
        target_layers(3, 1, "deepest")


def test_llava_language_part_is_found_even_when_the_vision_tower_is_as_deep() -> None:
    model = tiny_llava(tiny_decoder().config, image_token_index=5)
    name, layers = find_decoder_layers(model)
    assert "language_model" in name
    assert layers is model.model.language_model.layers


def test_plain_modules_without_a_configuration_are_found_by_name() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])
            self.vision_tower = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])})

    assert find_decoder_layers(Plain())[0] == "layers"


def test_ambiguous_or_absent_layer_lists_are_refused_with_what_exists() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])})
            self.b = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])})

    with pytest.raises(ModelError, match=r"a\.layers \(1\), b\.layers \(1\)"):
        find_decoder_layers(Two())
    with pytest.raises(ModelError, match="found 0"):
        find_decoder_layers(nn.Linear(4, 4))


def test_select_modules_takes_last_parts_and_full_names() -> None:
    assert select_modules(LINEARS, ["q_proj", "mlp.up_proj"]) == ("mlp.up_proj", "self_attn.q_proj")
    assert select_modules(LINEARS, None) == LINEARS


@pytest.mark.parametrize("wanted", [["c_attn"], ["q_proj", "roj"], []])
def test_unknown_modules_are_refused_with_what_exists(wanted: list[str]) -> None:
    with pytest.raises(ModelError, match=r"self_attn\.q_proj"):
        select_modules(LINEARS, wanted)
    with pytest.raises(ModelError, match=r"torch\.nn\.Linear"):
        select_modules([], None)


@pytest.mark.parametrize("layers", [(1, 1), (2, 1), (0, 4), (-1, 2), ()])
def test_shared_layers_outside_the_model_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match="shared_layers"):
        plan_placements(tiny_decoder(depth=4), layers, None, family=False)


def test_shared_layers_without_the_same_modules_are_refused() -> None:
    model = tiny_decoder(depth=2)
    model.model.layers[0].mlp.up_proj = nn.Identity()
    with pytest.raises(ModelError, match=r"Layer 0 .* lacks mlp\.up_proj"):
        plan_placements(model, (0, 1), None, family=False)
    assert "model.layers.0.mlp.up_proj" not in plan_placements(model, (1,), None, family=True)
