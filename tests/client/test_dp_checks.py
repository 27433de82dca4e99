"""The checks before private training, each broken on purpose."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedmosaic.client.colora import CoLoraConfig, adapted_layers, fix_gate, set_active_branches, set_trainable
from fedmosaic.client.dp_branch import only_shared_branch, private_parameters, shared_cores
from fedmosaic.client.dp_checks import assert_only_shared_branch, check_engine, is_narrow, public_batch
from fedmosaic.client.dp_engine import ClosedFormEngine, OpacusEngine
from fedmosaic.client.examples import IGNORED
from fedmosaic.client.loss import Batch, example_losses
from fedmosaic.protos.errors import ModelError, PrivacyError


def make_model(dtype: torch.dtype = torch.float32, gate: str = "scalar", **options: str) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return get_peft_model(
        LlamaForCausalLM(config).to(dtype),
        CoLoraConfig(
            r=4, alpha=8, blocks=2, personal_branch=True, gate=gate, task_type="CAUSAL_LM", **options
        ),
    )


@pytest.fixture
def model() -> nn.Module:
    return make_model()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("global_weight", [None, 0.0, 0.5])
def test_a_shared_branch_alone_passes(dtype: torch.dtype, global_weight: float | None) -> None:
    model = make_model(dtype)
    with only_shared_branch(model, global_weight=global_weight) as cores:
        assert_only_shared_branch(model, cores, private_parameters(model))
        check_engine(ClosedFormEngine(model, cores), model)
        with OpacusEngine(model, cores) as engine:
            check_engine(engine, model)


def personal_branch_on(model: nn.Module) -> None:
    set_active_branches(model, {"local", "personal"}, layers="shared")


def family_branch_on(model: nn.Module) -> None:
    set_active_branches(model, {"local"}, layers="family")


def received_family_branch_on(model: nn.Module) -> None:
    set_active_branches(model, {"global"}, layers="family")


def gate_learnt(model: nn.Module) -> None:
    set_active_branches(model, {"local", "global"}, layers="shared")
    fix_gate(model, None)


def personal_branch_times_zero(model: nn.Module) -> None:
    personal_branch_on(model)
    with torch.no_grad():
        for layer in adapted_layers(model, "shared"):
            layer.core("default", "personal").weight.zero_()


@pytest.mark.parametrize(
    "leak",
    [
        personal_branch_on,
        family_branch_on,
        received_family_branch_on,
        gate_learnt,
        personal_branch_times_zero,
    ],
)
@pytest.mark.parametrize("gate", ["scalar", "pooled"])
def test_a_frozen_private_tensor_in_the_forward_pass_is_found(
    leak: Callable[[nn.Module], None], gate: str
) -> None:
    model = make_model(gate=gate)
    with only_shared_branch(model) as cores:
        leak(model)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        with pytest.raises(PrivacyError, match="take part in the forward pass"):
            assert_only_shared_branch(model, cores, private_parameters(model))
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable


@pytest.mark.parametrize("group", ["gate", "personal", "global"])
def test_another_trainable_tensor_is_found(model: nn.Module, group: str) -> None:
    with only_shared_branch(model) as cores:
        set_trainable(model, {"local", group}, layers="shared")
        with pytest.raises(PrivacyError, match="outside the shared branch"):
            assert_only_shared_branch(model, cores, private_parameters(model))


def test_a_trainable_base_weight_is_found(model: nn.Module) -> None:
    with only_shared_branch(model) as cores:
        model.get_base_model().lm_head.weight.requires_grad_(True)
        with pytest.raises(PrivacyError, match="outside the shared branch"):
            assert_only_shared_branch(model, cores, {})


def test_everything_but_releases_counts_as_private(model: nn.Module) -> None:
    found = {id(parameter) for parameter in private_parameters(model).values()}
    released = set()
    for layer in adapted_layers(model, "shared"):
        for branch in ("local", "global"):
            released |= {id(parameter) for parameter in layer.core("default", branch).parameters()}
    adapter = {id(p) for name, p in model.named_parameters() if "colora_" in name}
    assert found == adapter - released
    assert len(private_parameters(model)) == len(found)


def test_the_tensors_of_another_adapter_count_as_private() -> None:
    model = make_model(other_layers="none")
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
        assert list(cores) == list(shared_cores(model))
        assert {id(p) for p in model.parameters() if p.requires_grad} == {
            id(p) for core in cores.values() for p in core.parameters()
        }
        assert switches() != before
    assert switches() == before
    with pytest.raises(ZeroDivisionError), only_shared_branch(model):
        1 / 0  # noqa: B018  # the failure itself is the point
    assert switches() == before


def token_mean(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The usual loss: its mean runs over the batch's tokens, so examples share a denominator."""
    tokens = (batch["labels"][:, 1:] != IGNORED).sum(1)
    return example_losses(model, batch) * tokens / tokens.sum()


def test_a_mean_over_the_tokens_of_the_batch_is_refused(model: nn.Module) -> None:
    with only_shared_branch(model) as cores:
        engine = ClosedFormEngine(model, cores, token_mean)
        with pytest.raises(ModelError, match="mixes examples"):
            check_engine(engine, model, losses=token_mean)


@contextmanager
def centred(model: nn.Module) -> Iterator[None]:
    """A layer that subtracts the batch's mean, as batch normalisation does."""
    norm = model.get_base_model().model.norm
    handle = norm.register_forward_hook(lambda _, __, output: output - output.mean(0, keepdim=True))
    yield
    handle.remove()


def test_a_layer_that_mixes_examples_is_refused(model: nn.Module) -> None:
    with only_shared_branch(model) as cores, centred(model):
        with pytest.raises(ModelError, match="mixes examples"):
            check_engine(ClosedFormEngine(model, cores), model)


class Wrong(ClosedFormEngine):
    def example_gradients(self, batch: Batch) -> torch.Tensor:
        rows = super().example_gradients(batch)
        return torch.cat([rows[:, :-1], 0.0 * rows[:, -1:]], dim=1)


def test_rows_that_do_not_add_up_are_refused(model: nn.Module) -> None:
    with only_shared_branch(model) as cores:
        with pytest.raises(ModelError, match="do not add up"):
            check_engine(Wrong(model, cores), model)


def test_a_gradient_of_zero_is_refused(model: nn.Module) -> None:
    with only_shared_branch(model) as cores:
        with torch.no_grad():
            for layer in adapted_layers(model, "shared"):
                layer.colora_B["default"].zero_()
        with pytest.raises(ModelError, match="would move nothing"):
            check_engine(ClosedFormEngine(model, cores), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_computes_in_less_than_float32_is_narrow(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    assert is_narrow(model, autocast=False) == (dtype != torch.float32)
    assert is_narrow(model, autocast=True)


def test_float32_products_of_lower_precision_are_narrow(model: nn.Module) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert is_narrow(model, autocast=False)
    finally:
        torch.set_float32_matmul_precision(before)
    assert not is_narrow(model, autocast=False)


def test_batch_normalisation_is_refused(model: nn.Module) -> None:
    # In evaluation mode, in which the engine is tried, such a layer mixes nothing; while training it does.
    model.get_base_model().model.norm = nn.Sequential(nn.BatchNorm1d(7))
    with only_shared_branch(model) as cores, pytest.raises(ModelError, match="batch normalisation"):
        check_engine(ClosedFormEngine(model, cores), model)


def test_the_check_works_in_training_mode_with_dropout(model: nn.Module) -> None:
    model.get_base_model().config.attention_dropout = 0.5
    model.train()
    with only_shared_branch(model) as cores:
        check_engine(ClosedFormEngine(model, cores), model)
    assert model.training


def test_public_tokens_are_the_same_every_time(model: nn.Module) -> None:
    first, second = public_batch(model), public_batch(model)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["attention_mask"].sum(1).tolist() == [7, 4]
    assert ((first["labels"] != IGNORED).sum(1) == 2).all()
    assert (first["labels"][first["attention_mask"] == 0] == IGNORED).all()
