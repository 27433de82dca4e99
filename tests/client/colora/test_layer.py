"""The algebra of the adapted layers: formula, gate, branches, merging, precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedmosaic.client.colora import CoLoraConfig
from fedmosaic.client.colora.layer import CoLoraLayer
from fedmosaic.client.colora.linear import (
    BranchedLoraLinear,
    CoLoraLinear,
    draw_orthonormal,
    orthonormality_error,
)
from fedmosaic.client.colora.placement import Placement
from fedmosaic.protos.errors import ConfigurationError, ModelError

D_IN, D_OUT, RANK, ALPHA = 12, 20, 4, 6.0
SCALE = ALPHA / RANK
Kind = type[CoLoraLayer]
KINDS: list[Kind] = [CoLoraLinear, BranchedLoraLinear]


def make(
    kind: Kind = CoLoraLinear, *, bias: bool = True, dtype: torch.dtype = torch.float32, fill: bool = True
) -> CoLoraLayer:
    """An adapted linear module with three branches, all filled with numbers unless fill=False."""
    torch.manual_seed(1)
    config = CoLoraConfig(r=RANK, alpha=ALPHA, personal_branch=True, basis_seed=3)
    block = 0 if kind is CoLoraLinear else None
    placement = Placement(name="m.layers.0.q_proj", module="q_proj", layer=0, block=block)
    layer = kind(nn.Linear(D_IN, D_OUT, bias=bias).to(dtype), "default", config, placement)
    if fill:
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if "colora_" in name:
                    parameter.normal_()
    return layer


def core_of(layer: CoLoraLayer) -> nn.Linear:
    assert isinstance(layer, CoLoraLinear)
    return layer.core("default", "local")


def inputs(batch: int = 3, positions: int = 5) -> torch.Tensor:
    return torch.randn(batch, positions, D_IN, generator=torch.Generator().manual_seed(0))


def branch_output(layer: CoLoraLayer, branch: str, x: torch.Tensor) -> torch.Tensor:
    """One branch written out by the formula in float64, scale included."""
    x = x.double()
    if isinstance(layer, CoLoraLinear):
        a, b = layer.colora_A["default"].double(), layer.colora_B["default"].double()
        core = layer.core("default", branch)
        reduced = torch.einsum("rd,btd->btr", a, x)
        inner = torch.einsum("qr,btr->btq", core.weight.double(), reduced) + core.bias.double()
        return SCALE * torch.einsum("or,btr->bto", b, inner)
    assert isinstance(layer, BranchedLoraLinear)
    down, up = layer.branch_tensors("default", branch)
    return SCALE * torch.einsum("or,rd,btd->bto", up.double(), down.double(), x)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_formula(kind: Kind) -> None:
    layer, x = make(kind), inputs()
    g = torch.sigmoid(layer.colora_gate["default"].double())
    expected = layer.linear(x).double()
    expected = expected + (1 - g) * branch_output(layer, "local", x) + g * branch_output(layer, "global", x)
    expected = expected + branch_output(layer, "personal", x)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_gradient_of_the_core_is_the_closed_form() -> None:
    # With one branch of weight 1: ∂L/∂P = s Σ_t (Bᵀδ_t)(A x_t)ᵀ and ∂L/∂Q = s Σ_t Bᵀδ_t.
    layer, x = make(fill=False), inputs()
    assert isinstance(layer, CoLoraLinear)
    layer.settings["default"].active = frozenset({"local"})
    out = layer(x)
    out.backward(delta := torch.randn_like(out))
    back = delta.flatten(0, 1) @ layer.colora_B["default"]
    reduced = x.flatten(0, 1) @ layer.colora_A["default"].T
    core = layer.core("default", "local")
    torch.testing.assert_close(core.weight.grad, SCALE * back.T @ reduced, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(core.bias.grad, SCALE * back.sum(0), rtol=1e-4, atol=1e-5)


def test_one_core_for_all_branches_gives_what_the_branches_apart_give() -> None:
    """A core that somebody hooks is called by itself; nobody may see another output or gradient for it."""
    together, apart, x = make(), make(), inputs()
    called: list[str] = []
    assert isinstance(apart, CoLoraLinear)
    for branch in ("local", "global", "personal"):
        apart.core("default", branch).register_forward_hook(lambda *_, name=branch: called.append(name))
    outputs = [layer(x) for layer in (together, apart)]
    delta = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(delta)
    assert called == ["local", "global", "personal"]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    theirs = dict(apart.named_parameters())
    trained = [name for name, parameter in together.named_parameters() if parameter.grad is not None]
    assert any("gate" in name for name in trained)
    assert any("core_local" in name for name in trained)
    assert not any("core_global" in name for name in trained)
    for name, parameter in together.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-5)


@given(st.integers(1, 12), st.integers(0, 2**62), st.integers(0, 8))
@settings(max_examples=30)
def test_drawn_bases_are_orthonormal_and_reproducible(rank: int, seed: int, extra: int) -> None:
    basis = draw_orthonormal(rank + extra, rank, seed)
    assert orthonormality_error(basis) < 1e-5
    assert torch.equal(basis, draw_orthonormal(rank + extra, rank, seed))
    assert not torch.equal(basis, draw_orthonormal(rank + extra, rank, seed + 1)) or rank + extra == 1


def test_bases_are_orthonormal_and_differ_between_modules_and_blocks() -> None:
    config = CoLoraConfig(r=RANK)
    places = [("q_proj", 0), ("k_proj", 0), ("q_proj", 1)]
    layers = [
        CoLoraLinear(nn.Linear(D_IN, D_IN), "default", config, Placement("n", module, block, block))
        for module, block in places
    ]
    bases = [
        tensor for layer in layers for tensor in (layer.colora_A["default"].T, layer.colora_B["default"])
    ]
    for i, first in enumerate(bases):
        assert orthonormality_error(first) < 1e-6
        for second in bases[i + 1 :]:
            assert not torch.allclose(first, second, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("active", [set(), {"local"}, {"global"}, {"personal"}, {"local", "personal"}])
def test_branches_left_out_have_no_effect_and_the_gate_acts_only_between_two(
    kind: Kind, active: set[str]
) -> None:
    layer, x = make(kind), inputs()
    layer.settings["default"].active = frozenset(active)
    expected = layer.linear(x).double() + sum(branch_output(layer, branch, x) for branch in sorted(active))
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_branches_left_out_are_not_computed(kind: Kind) -> None:
    layer, x = make(kind), inputs()
    layer.settings["default"].active = frozenset({"local"})
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "global" in name or "personal" in name or "gate" in name:
                parameter.fill_(float("nan"))
    layer(x).sum().backward()
    assert layer(x).isfinite().all()
    for name, parameter in layer.named_parameters():
        if "colora_" in name and "local" not in name:
            assert parameter.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_fixed_gate_does_not_read_the_gate_parameters(kind: Kind) -> None:
    layer, x = make(kind), inputs()
    layer.settings["default"].fixed_gate = 0.25
    with torch.no_grad():
        layer.colora_gate["default"].fill_(float("nan"))
    expected = layer.linear(x).double() + branch_output(layer, "personal", x)
    expected = expected + 0.75 * branch_output(layer, "local", x) + 0.25 * branch_output(layer, "global", x)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_merging_is_equivalent_and_unmerging_restores(kind: Kind, bias: bool) -> None:
    layer, x = make(kind, bias=bias), inputs()
    base = layer.linear.weight.clone(), None if layer.linear.bias is None else layer.linear.bias.clone()
    before = layer(x)
    layer.merge(safe_merge=True)
    torch.testing.assert_close(layer.linear(x), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # what was merged is taken out, not what the core has become
        for name, parameter in layer.named_parameters():
            if "colora_" in name:
                parameter.add_(1.0)
    layer.unmerge()
    torch.testing.assert_close(layer.linear.weight, base[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.linear.bias, base[1], rtol=1e-5, atol=1e-5)


def test_merging_something_broken_is_refused() -> None:
    layer = make()
    with torch.no_grad():
        core_of(layer).weight[0, 0] = float("inf")
    with pytest.raises(ModelError, match="not finite"):
        layer.merge(safe_merge=True)
    assert not layer.merged
    assert layer.linear.weight.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_base_keeps_the_adapter_and_its_gradients_in_float32(kind: Kind) -> None:
    layer, x = make(kind, dtype=torch.bfloat16), inputs().to(torch.bfloat16)
    adapter = {n: t for n, t in layer.state_dict().items() if "colora_" in n}
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    out = layer(x)
    assert out.dtype == torch.bfloat16
    delta = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    out.backward(delta)
    # The same tensors in float64 throughout: float32 arithmetic agrees to 1e-5, bfloat16 would to 1e-2.
    exact = make(kind, dtype=torch.float64).double()
    exact.load_state_dict({name: tensor.double() for name, tensor in layer.state_dict().items()})
    exact(x.double()).backward(delta.double())
    for (name, ours), (_, theirs) in zip(layer.named_parameters(), exact.named_parameters(), strict=True):
        if "colora_" in name and "global" not in name:
            assert ours.grad is not None
            assert theirs.grad is not None
            assert ours.grad.dtype == torch.float32, name
            scale = float(theirs.grad.abs().max())
            assert float((ours.grad.double() - theirs.grad).abs().max()) <= 1e-5 * scale, name


def test_autocast_does_not_lower_the_adapters_precision() -> None:
    layer, x = make(), inputs()
    layer.linear.weight.data.zero_()
    layer.linear.bias.data.zero_()
    exact = layer(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        cast = layer(x).detach()
    bfloat16_rounding = 2.0**-8
    assert float((cast.float() - exact).abs().max()) <= bfloat16_rounding * float(exact.abs().max())
    layer.zero_grad()
    layer(x).sum().backward()
    expected = core_of(layer).weight.grad
    assert expected is not None
    expected = expected.clone()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer(x).float().sum()
    loss.backward()  # outside, as PyTorch asks for
    torch.testing.assert_close(core_of(layer).weight.grad, expected, rtol=1e-5, atol=1e-5)


def test_other_modules_than_linear_are_refused() -> None:
    with pytest.raises(ModelError, match="not Conv1d"):
        CoLoraLinear(nn.Conv1d(4, 4, 1), "default", CoLoraConfig(r=2), Placement("n", "n", 0, 0))


BAD: list[tuple[str, object]] = [
    *(("r", value) for value in (0, True, 2.5)),
    *(("alpha", value) for value in (0.0, float("nan"), float("inf"))),
    ("blocks", -1),
    ("layer_rule", "deep"),
    ("other_layers", "all"),
    ("gate", "pooled"),
    ("gate_noise_std", 0.5),
    ("basis_seed", 0.5),
    ("target_modules", "q_proj"),
    ("shared_layers", [1]),
    ("active_branches", {"shared": ["lokal"]}),
    ("fixed_gate", {"shared": 1.5}),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_a_wrong_configuration_names_the_field(field: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=f"CoLoraConfig: {field} is"):
        CoLoraConfig(**{field: value})  # type: ignore[arg-type]  # the point
