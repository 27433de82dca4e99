"""The checks before private training, each broken on purpose."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention

from devices import here
from fedmosaic.client.colora import CoLoraConfig, adapted_layers, fix_gate, set_active_branches, set_trainable
from fedmosaic.client.colora.state import shared_modules
from fedmosaic.client.dp.checks import assert_only_shared_branch, check_engine, refuse_state
from fedmosaic.client.dp.engine import only_shared_branch, private_parameters, public_branches
from fedmosaic.client.model.loss import in_bfloat16
from fedmosaic.protos.errors import ModelError, PrivacyError
from tiny import tiny_colora

pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture
def model(device: torch.device) -> nn.Module:
    return tiny_colora()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("global_weight", [None, 0.0, 0.5])
def test_a_shared_branch_alone_passes(dtype: torch.dtype, global_weight: float | None) -> None:
    model = tiny_colora(dtype)
    with only_shared_branch(model, global_weight=global_weight) as cores:
        assert_only_shared_branch(model, cores, private_parameters(model))
        check_engine(model, cores, clip=4.0)
        check_engine(model, cores, clip=4.0, losses=in_bfloat16())


def personal_branch_times_zero(model: nn.Module) -> None:
    set_active_branches(model, {"local", "personal"}, layers="shared")
    with torch.no_grad():
        for layer in shared_modules(model):
            layer.core("default", "personal").weight.zero_()


def gate_learnt(model: nn.Module) -> None:
    set_active_branches(model, {"local", "global"}, layers="shared")
    fix_gate(model, None)


LEAKS: dict[str, Callable[[nn.Module], None]] = {
    "personal branch": lambda model: set_active_branches(model, {"local", "personal"}, layers="shared"),
    "personal branch times zero": personal_branch_times_zero,
    "family branch": lambda model: set_active_branches(model, {"local"}, layers="family"),
    "received family branch": lambda model: set_active_branches(model, {"global"}, layers="family"),
    "learnt gate": gate_learnt,
}


@pytest.mark.parametrize("leak", LEAKS.values(), ids=LEAKS)
def test_a_frozen_private_tensor_in_the_forward_pass_is_found(
    model: nn.Module, leak: Callable[[nn.Module], None]
) -> None:
    with only_shared_branch(model) as cores:
        leak(model)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        with pytest.raises(PrivacyError, match="take part in the forward pass"):
            assert_only_shared_branch(model, cores, private_parameters(model))
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable


@pytest.mark.parametrize("group", ["gate", "personal", "global", "base"])
def test_another_trainable_tensor_is_found(model: nn.Module, group: str) -> None:
    with only_shared_branch(model) as cores:
        if group == "base":
            model.get_parameter("base_model.model.lm_head.weight").requires_grad_(True)
        else:
            set_trainable(model, {"local", group}, layers="shared")
        with pytest.raises(PrivacyError, match="outside the shared branch"):
            assert_only_shared_branch(model, cores, {} if group == "base" else private_parameters(model))


def test_everything_but_releases_counts_as_private(model: nn.Module) -> None:
    found = {id(parameter) for parameter in private_parameters(model).values()}
    released = set()
    for layer in shared_modules(model):
        for branch in ("local", "global"):
            released |= {id(parameter) for parameter in layer.core("default", branch).parameters()}
    adapter = {id(p) for name, p in model.named_parameters() if "colora_" in name}
    assert found == adapter - released
    assert len(private_parameters(model)) == len(found)


def test_the_tensors_of_another_adapter_count_as_private() -> None:
    model = tiny_colora(options={"other_layers": "none"})
    before = set(private_parameters(model))
    model.add_adapter("second", CoLoraConfig(r=4, alpha=8, blocks=2, task_type="CAUSAL_LM"))
    model.set_adapter("default")
    second = {name for name, _ in model.named_parameters() if ".second." in f"{name}." and "colora_" in name}
    assert set(private_parameters(model)) - before == second
    assert any("colora_core_local" in name for name in second)
    # Also on the layers that the first adapter leaves alone.
    assert any("colora_lora_B" in name for name in second)


def test_switches_are_given_back_even_after_a_failure(model: nn.Module) -> None:
    set_active_branches(model, {"local", "global", "personal"})
    set_trainable(model, {"personal", "gate"}, layers="shared")
    fix_gate(model, 0.25, layers="shared")

    def switches() -> list[object]:
        settings = [layer.settings["default"] for layer in adapted_layers(model)]
        flags = [parameter.requires_grad for parameter in model.parameters()]
        return [flags, *((one.active, one.trainable, one.fixed_gate) for one in settings)]

    before = switches()
    with only_shared_branch(model, global_weight=0.5) as cores:
        assert {id(p) for p in model.parameters() if p.requires_grad} == {
            id(p) for core in cores.values() for p in core.parameters()
        }
        assert switches() != before
    assert switches() == before
    with pytest.raises(ZeroDivisionError), only_shared_branch(model):
        1 / 0  # noqa: B018  # the failure itself is the point
    assert switches() == before


@contextmanager
def hooked(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _module, _arguments, output: change(output))
    yield
    handle.remove()


class Remembers:
    """What layers do that keep a running mean, or scale by the longest text so far."""

    def __init__(self, strength: float) -> None:
        self.strength, self.longest = strength, 0

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        self.longest = max(self.longest, output.shape[1])
        return output * (1.0 + self.strength * self.longest)


@pytest.mark.parametrize("strength", [0.1, 1e-4])
def test_a_layer_that_remembers_the_longest_text_is_found(model: nn.Module, strength: float) -> None:
    layer = model.get_submodule("base_model.model.model.layers.0")
    with only_shared_branch(model, global_weight=0.5) as cores, hooked(layer, Remembers(strength)):
        with pytest.raises(ModelError, match="keeps something of earlier examples"):
            check_engine(model, cores, clip=4.0)


def test_a_received_branch_at_the_bound_finds_what_zeros_hide(model: nn.Module) -> None:
    """A layer that keeps something only where its inputs are large, as any received branch can make them."""
    layer, longest = model.get_submodule("base_model.model.model.layers.1"), Remembers(1e-2)

    def change(output: torch.Tensor) -> torch.Tensor:
        return longest(output) if float(output.detach().abs().max()) > 1.0 else output

    with only_shared_branch(model, global_weight=0.5) as cores, hooked(layer, change):
        check_engine(model, cores, clip=0.0)
        with pytest.raises(ModelError, match="keeps something of earlier examples"):
            check_engine(model, cores, clip=4.0)


def test_rotary_positions_that_follow_the_longest_text_are_refused() -> None:
    model = tiny_colora(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with only_shared_branch(model) as cores, pytest.raises(ModelError, match="rope_type default"):
        check_engine(model, cores, clip=4.0)


def test_a_compiled_model_is_refused(model: nn.Module) -> None:
    model.get_submodule("base_model.model.model.layers.1").compile(backend="eager")
    with pytest.raises(ModelError, match="is compiled"):
        refuse_state(model)
    compiled = torch.compile(nn.Linear(2, 2), backend="eager")
    assert isinstance(compiled, nn.Module)
    with pytest.raises(ModelError, match="is compiled"):
        refuse_state(compiled)


def test_dropout_that_stays_on_is_refused(model: nn.Module) -> None:
    layer = model.get_submodule("base_model.model.model.layers.0")
    with (
        only_shared_branch(model) as cores,
        hooked(layer, lambda output: nn.functional.dropout(output, 1e-6)),
    ):
        with pytest.raises(ModelError, match="draws random numbers"):
            check_engine(model, cores, clip=4.0)


def test_a_core_outside_the_loss_is_refused(model: nn.Module) -> None:
    spare = here(nn.Linear(4, 4))
    with only_shared_branch(model) as cores:
        with pytest.raises(ModelError, match=r"1 core\(s\) take no part in the loss \(first: spare\)"):
            check_engine(model, {**cores, "spare": spare}, clip=4.0)


def test_public_values_stand_in_for_what_was_received_and_give_it_back(model: nn.Module) -> None:
    values = {}
    with torch.no_grad():
        for layer in shared_modules(model):
            for branch in ("local", "global", "personal"):
                for name, parameter in layer.core("default", branch).named_parameters():
                    parameter.normal_()
                    values[id(parameter)] = (branch, name, parameter, parameter.detach().clone())
    with public_branches(model, 4.0):
        for branch, _, parameter, before in values.values():
            if branch == "local":
                assert not parameter.any()
            elif branch == "global":
                assert torch.equal(parameter.abs(), torch.full_like(parameter, 4.0))
            else:
                assert torch.equal(parameter, before)
    assert all(torch.equal(parameter, before) for _, _, parameter, before in values.values())


@pytest.mark.parametrize("value", [float("nan"), 4.0])
def test_no_check_reads_what_was_received(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for layer in shared_modules(model):
            layer.core("default", "global").weight.fill_(value)
    with only_shared_branch(model, global_weight=0.5) as cores:
        assert_only_shared_branch(model, cores, private_parameters(model))
        check_engine(model, cores, clip=4.0)


def test_a_gradient_of_zero_is_refused(model: nn.Module) -> None:
    with only_shared_branch(model) as cores:
        with torch.no_grad():
            for layer in shared_modules(model):
                layer.colora_B["default"].zero_()
        with pytest.raises(ModelError, match="would move nothing"):
            check_engine(model, cores, clip=4.0)


def test_the_check_works_in_training_mode_with_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, LlamaAttention):
            module.attention_dropout = 0.5
    model.train()
    with only_shared_branch(model) as cores:
        check_engine(model, cores, clip=4.0)
    assert model.training
