"""Adapters as vectors, switches and bases."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from fedmosaic.client.colora import (
    CoLoraConfig,
    adapted_layers,
    copy_branch,
    fix_gate,
    get_basis,
    read_family,
    read_shared,
    set_active_branches,
    set_basis,
    set_trainable,
    shared_layout,
    write_family,
    write_shared,
)
from fedmosaic.client.colora.layer import CoLoraLayer
from fedmosaic.client.colora.linear import BranchedLoraLinear, CoLoraLinear, draw_orthonormal
from fedmosaic.protos.errors import ModelError
from tiny import LINEARS as MODULES
from tiny import copied, tiny_decoder

RANK, BLOCKS = 4, 2
SIZE = BLOCKS * len(MODULES) * (RANK**2 + RANK)


@copied
def adapted(kind: str = "llama", hidden: int = 32, depth: int = 3, **changes: Any) -> PeftModel:
    config = CoLoraConfig(**{"r": RANK, "blocks": BLOCKS, **changes})
    return get_peft_model(tiny_decoder(kind, hidden, depth), config)


def numbers(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def test_the_vector_has_the_documented_order() -> None:
    model = adapted(depth=5)
    vector = numbers(SIZE)
    write_shared(model, vector, "local")
    at = 0
    for layer in (2, 4):  # nearest to 1/2 and 1 of a depth of 5, halves going deeper
        for module in MODULES:
            adapted_module = model.get_submodule(f"base_model.model.model.layers.{layer}.{module}")
            assert isinstance(adapted_module, CoLoraLinear)
            core = adapted_module.core("default", "local")
            p, q = vector[at : at + 16].reshape(4, 4), vector[at + 16 : at + 20]
            np.testing.assert_array_equal(core.weight.detach().numpy(), p)
            np.testing.assert_array_equal(core.bias.detach().numpy(), q)
            at += 20
    assert at == SIZE


@pytest.mark.parametrize("branch", ["local", "global", "personal"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_written_is_read_and_nothing_else_changes(branch: str, dtype: type[np.floating]) -> None:
    model = adapted(personal_branch=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shared, family = numbers(SIZE).astype(dtype), numbers(read_family(model).size, 1).astype(dtype)
    write_shared(model, shared, branch)
    write_family(model, family, branch)
    read_shared(model, branch)[:] = 1.0  # of a copy
    np.testing.assert_array_equal(read_shared(model, branch), shared)
    np.testing.assert_array_equal(read_family(model, branch), family)
    for name, tensor in model.state_dict().items():
        if f"_{branch}." not in name:
            assert torch.equal(tensor, before[name]), name


def test_layouts_agree_across_width_depth_and_architecture() -> None:
    models = [adapted(), adapted(hidden=48, depth=6), adapted("qwen2", hidden=64, depth=4)]
    layouts = [shared_layout(model) for model in models]
    assert len({layout.spec_hash for layout in layouts}) == 1
    assert layouts[0].modules == MODULES
    assert {layout.size for layout in layouts} == {SIZE}
    assert all(read_shared(model).shape == (SIZE,) for model in models)
    assert len({read_family(model).size for model in models}) == 3


def test_the_hash_is_of_canonical_json_and_depends_on_every_field() -> None:
    layout = shared_layout(adapted())
    plain = {"alpha": 32.0, "basis": "seed:0", "blocks": 2, "format": "fedmosaic/shared-adapter/1"}
    canonical = json.dumps({**plain, "modules": list(MODULES), "rank": 4}, separators=(",", ":"))
    assert layout.spec_hash == hashlib.sha256(canonical.encode()).hexdigest()
    changes: dict[str, Any] = {"rank": 5, "alpha": 16.0, "blocks": 3, "modules": MODULES[:-1]}
    changes |= {"basis_label": "aligned:x"}
    changed = {replace(layout, **{name: value}).spec_hash for name, value in changes.items()}
    assert len({layout.spec_hash, *changed}) == 6


@pytest.mark.parametrize(
    "change", [{"basis_seed": 1}, {"alpha": 8}, {"target_modules": ["q_proj"]}, {"blocks": 3}]
)
def test_configurations_that_must_not_be_averaged_have_different_hashes(change: dict[str, object]) -> None:
    assert shared_layout(adapted(**change)).spec_hash != shared_layout(adapted()).spec_hash


def test_the_map_moves_between_widths() -> None:
    # What is transferred is the map between the two frozen subspaces: A' x' = A x gives Bᵀ Δy = B'ᵀ Δy'.
    narrow, wide = adapted(hidden=32), adapted("qwen2", hidden=48)
    write_shared(narrow, numbers(SIZE), "local")
    write_shared(wide, read_shared(narrow), "local")
    reduced = torch.randn(3, RANK)
    outputs = []
    for model in (narrow, wide):
        layer = model.get_submodule("base_model.model.model.layers.2.self_attn.q_proj")
        assert isinstance(layer, CoLoraLinear)
        a, b = layer.colora_A["default"], layer.colora_B["default"]
        x = reduced @ a  # the vector in the span of A with coordinates `reduced`
        outputs.append((layer(x) - layer.linear(x)) @ b)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    assert outputs[0].abs().max() > 0.1


def test_the_family_vector_is_empty_without_lora() -> None:
    model = adapted(other_layers="none")
    assert read_family(model).shape == (0,)
    assert read_family(model).size == 0
    write_family(model, np.zeros(0, dtype=np.float32))
    with pytest.raises(ModelError, match=r"needs \(0,\)"):
        write_family(model, np.zeros(1, dtype=np.float32))


def test_the_family_vector_holds_a_then_b_of_each_module() -> None:
    model = adapted()
    np.testing.assert_array_equal(read_family(model), read_family(adapted(), "global"))
    assert read_family(model).any(), "clients of one architecture start alike, in both branches"
    vector = numbers(read_family(model).size)
    write_family(model, vector, "local")
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    assert isinstance(layer, BranchedLoraLinear)
    down, up = layer.branch_tensors("default", "local")
    np.testing.assert_array_equal(down.detach().numpy(), vector[: 4 * 64].reshape(4, 64))
    np.testing.assert_array_equal(up.detach().numpy(), vector[4 * 64 : 4 * 96].reshape(32, 4))


@pytest.mark.parametrize("layers", ["all", "shared", "family"])
def test_copy_branch(layers: str) -> None:
    model = adapted()
    write_shared(model, numbers(SIZE), "local")
    write_family(model, numbers(read_family(model).size), "local")
    copy_branch(model, "local", "global", layers=layers)
    assert (read_shared(model, "global") == read_shared(model)).all() == (layers != "family")
    assert (read_family(model, "global") == read_family(model)).all() == (layers != "shared")
    write_shared(model, np.zeros(SIZE, dtype=np.float32), "local")
    assert read_shared(model, "global").any() == (layers != "family"), "a copy, not an alias"


def test_a_branch_is_moved_part_of_the_way_to_another() -> None:
    model = adapted()
    own, received = numbers(SIZE), numbers(SIZE)[::-1].copy()
    write_shared(model, own, "local")
    write_shared(model, received, "global")
    copy_branch(model, "global", "local", share=0.25, layers="shared")
    np.testing.assert_allclose(
        read_shared(model, "local"), 0.75 * own + 0.25 * received, rtol=1e-5, atol=1e-7
    )
    np.testing.assert_array_equal(read_shared(model, "global"), received)


BAD_VECTORS: list[tuple[str, np.ndarray]] = [
    ("shape", np.zeros(SIZE - 1, dtype=np.float32)),
    ("shape", np.zeros((1, SIZE), dtype=np.float32)),
    ("shape", np.zeros(0, dtype=np.float32)),
    ("type int64", np.zeros(SIZE, dtype=np.int64)),
    ("type complex128", np.zeros(SIZE, dtype=np.complex128)),
    ("1 of 280 values that are not finite", np.append(np.full(SIZE - 1, 0.123456), np.nan)),
    ("1 of 280 values that are not finite", np.append(np.zeros(SIZE - 1), -np.inf)),
    ("2 of 280 values that are not finite", np.append(np.zeros(SIZE - 2), [1e300, -1e39])),
]


@pytest.mark.parametrize(("message", "vector"), BAD_VECTORS)
def test_a_bad_vector_is_refused_before_anything_is_written(message: str, vector: np.ndarray) -> None:
    model = adapted()
    write_shared(model, numbers(SIZE))
    with pytest.raises(ModelError, match=message) as caught:
        write_shared(model, vector)
    assert "0.123" not in str(caught.value), "values of the vector are not shown"
    np.testing.assert_array_equal(read_shared(model, "global"), numbers(SIZE))


REFUSALS: list[tuple[str, Callable[[nn.Module], object]]] = [
    ("no branch 'personal'", lambda model: read_shared(model, "personal")),
    ("no branch 'lokal'", lambda model: copy_branch(model, "lokal", "global")),
    (r"\['personal'\] do not exist.*personal_branch=True", lambda model: set_trainable(model, {"personal"})),
    (r"\['gate'\] do not exist", lambda model: set_active_branches(model, {"gate"})),
    ("string 'local'", lambda model: set_trainable(model, "local")),
    ("layers is 'some'", lambda model: set_trainable(model, {"local"}, layers="some")),
    (r"should lie in \[0, 1\]", lambda model: fix_gate(model, 1.5)),
    (r"should lie in \[0, 1\]", lambda model: fix_gate(model, float("nan"))),
    ("no Co-LoRA adapter", lambda _: read_shared(nn.Linear(2, 2))),
]


@pytest.mark.parametrize(("message", "act"), REFUSALS)
def test_what_does_not_exist_is_refused(message: str, act: Callable[[nn.Module], object]) -> None:
    with pytest.raises(ModelError, match=message):
        act(adapted())


def test_writing_into_a_merged_adapter_is_refused() -> None:
    model = adapted()
    model.merge_adapter()
    acts: list[Callable[[], None]] = [
        lambda: write_shared(model, numbers(SIZE)),
        lambda: copy_branch(model, "local", "global"),
        lambda: fix_gate(model, 0.5),
        lambda: set_active_branches(model, {"local"}),
    ]
    for act in acts:
        with pytest.raises(ModelError, match="unmerge_adapter"):
            act()
    model.unmerge_adapter()
    write_shared(model, numbers(SIZE))


@pytest.mark.parametrize("groups", [set(), {"local"}, {"global"}, {"personal", "gate"}])
@pytest.mark.parametrize("layers", ["all", "shared", "family"])
def test_set_trainable_freezes_all_else_on_the_chosen_layers(groups: set[str], layers: str) -> None:
    model = adapted(personal_branch=True)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    set_trainable(model, groups, layers=layers)
    for name, parameter in model.named_parameters():
        if "colora_" not in name:
            assert not parameter.requires_grad
        elif layers in {"all", "shared" if name.split(".")[4] in {"1", "2"} else "family"}:
            assert parameter.requires_grad == any(
                group in name.partition("colora_")[2] for group in groups
            ), name
        else:
            assert parameter.requires_grad == before[name], name


def test_fix_gate_can_be_undone() -> None:
    model, ids = adapted().eval(), torch.arange(8)[None]
    for branch, seed in (("local", 0), ("global", 1)):
        write_shared(model, numbers(SIZE, seed), branch)
    learned = model(ids).logits
    fix_gate(model, 0.0)
    assert not torch.allclose(model(ids).logits, learned, atol=1e-3)
    fix_gate(model, 0.5)  # σ(0), where every gate starts
    torch.testing.assert_close(model(ids).logits, learned)
    fix_gate(model, 1)
    only_global = model(ids).logits
    set_active_branches(model, {"global"})
    torch.testing.assert_close(model(ids).logits, only_global)
    set_active_branches(model, {"local", "global"})
    fix_gate(model, None)
    torch.testing.assert_close(model(ids).logits, learned)


def fresh_bases(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {
        name: (draw_orthonormal(a.shape[1], RANK, 90).T, draw_orthonormal(b.shape[0], RANK, 91))
        for name, (a, b) in get_basis(model).items()
    }


def test_set_basis_replaces_bases_and_names_them_in_the_layout() -> None:
    model, ids = adapted().eval(), torch.arange(8)[None]
    write_shared(model, numbers(SIZE), "local")
    before, hash_before = model(ids).logits, shared_layout(model).spec_hash
    bases = fresh_bases(model)
    set_basis(model, {name: (a.numpy(), b.double()) for name, (a, b) in bases.items()}, label="aligned:abc")
    get_basis(model)[NAME][0].zero_()  # of a copy
    for name, (a, b) in get_basis(model).items():
        torch.testing.assert_close(a, bases[name][0])
        torch.testing.assert_close(b, bases[name][1])
        assert a.dtype == b.dtype == torch.float32
    assert not torch.allclose(model(ids).logits, before, atol=1e-3)
    assert shared_layout(model).spec_hash != hash_before
    config = model.peft_config["default"]
    assert isinstance(config, CoLoraConfig)
    assert shared_layout(model).basis_label == config.basis_label == "aligned:abc"


NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("message", "damage"),
    [
        ("Missing: .*up_proj", lambda bases: bases.pop(NAME)),
        (r"unknown: \['x'\]", lambda bases: bases.update(x=bases[NAME])),
        ("A has shape", lambda bases: bases.update({NAME: (bases[NAME][0].T, bases[NAME][1])})),
        ("B has shape", lambda bases: bases.update({NAME: (bases[NAME][0], bases[NAME][1][:, :2])})),
        ("orthonormal only to 3", lambda bases: bases.update({NAME: (bases[NAME][0], 2 * bases[NAME][1])})),
        ("not finite", lambda bases: bases.update({NAME: (bases[NAME][0] / 0, bases[NAME][1])})),
    ],
)
def test_a_bad_basis_is_refused_before_anything_is_changed(
    message: str, damage: Callable[[dict[str, object]], object]
) -> None:
    model = adapted()
    before = get_basis(model)
    bases: dict[str, object] = dict(fresh_bases(model))
    damage(bases)
    with pytest.raises(ModelError, match=message):
        set_basis(model, bases)  # type: ignore[arg-type]  # the point
    for name, (a, b) in get_basis(model).items():
        assert torch.equal(a, before[name][0])
        assert torch.equal(b, before[name][1])


def test_adapted_layers_come_in_the_order_of_the_vectors() -> None:
    model = adapted(depth=12, blocks=2)
    places = [layer.settings["default"].placement for layer in adapted_layers(model)]
    assert [(place.layer, place.module) for place in places] == [
        (layer, module) for layer in range(12) for module in MODULES
    ], "layer 10 comes after layer 9, not after layer 1"
    assert all(isinstance(layer, CoLoraLayer) for layer in adapted_layers(model, "shared"))
    assert [place.block for place in places if place.block is not None] == [0] * 7 + [1] * 7
