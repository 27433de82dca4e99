"""Plain local training: groups of learning rate, order, determinism, loud failures."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention

from fedmosaic.client.colora import set_active_branches, set_trainable
from fedmosaic.client.model.examples import IGNORED, EncodedExample, collate
from fedmosaic.client.model.loss import Batch, example_losses
from fedmosaic.client.model.training import (
    EpochSampler,
    TrainingReport,
    TrainingSettings,
    train_local,
    trainable_by_role,
)
from fedmosaic.client.settings import CORE_RATE, GATE_RATE
from fedmosaic.protos.errors import ConfigurationError, ModelError, StateError
from tiny import random_texts, tiny_colora


def make_model() -> nn.Module:
    return tiny_colora(options={"personal_branch": False}, initializer_range=0.2)


def make_examples(count: int) -> list[EncodedExample]:
    """Texts that all end in the same answer."""
    examples = random_texts([4 + 7 * index % 10 for index in range(count)])
    for example in examples:
        example.input_ids[-2:] = example.labels[-2:] = torch.tensor([5, 6])
    return examples


def adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "colora_" in name}


def trained(model: nn.Module, count: int = 4, **options: Any) -> TrainingReport:
    return train_local(model, make_examples(count), TrainingSettings(**options), pad_token_id=0)


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def fill_cores(model: nn.Module, *others: str) -> None:
    """Else the gate has nothing to weigh."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("colora_core_", *others)):
                parameter.normal_(std=0.1)


def test_every_trainable_tensor_is_in_the_group_that_it_is() -> None:
    model = make_model()
    groups = trainable_by_role(model)
    names = {name for group in groups.values() for name in group}
    assert names == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(len(group) for group in groups.values()) == len(names)
    assert all("colora_gate" in name for name in groups["gate"])
    assert len(groups["gate"]) == 3 * 7
    assert all("colora_core_local" in name for name in groups["shared"])
    assert len(groups["shared"]) == 2 * 7 * 2
    assert all("colora_lora_" in name for name in groups["adapter"])
    # Co-LoRA on gate_proj is no gate: a group test by substring would say so.
    assert any("gate_proj" in name for name in groups["shared"])


@pytest.mark.parametrize(
    ("fast", "marker"),
    [
        ("learning_rate", "colora_lora_B"),
        ("shared_learning_rate", "colora_core_local"),
        ("gate_learning_rate", "colora_gate"),
    ],
)
def test_each_group_moves_at_its_own_rate(fast: str, marker: str) -> None:
    model = make_model()
    fill_cores(model, "colora_lora_B")
    before = adapter(model)
    rates = dict.fromkeys(("learning_rate", "shared_learning_rate", "gate_learning_rate"), 1e-9)
    trained(model, 8, steps=1, **(rates | {fast: 1e-2}))
    moved = {name: float((tensor - before[name]).abs().max()) for name, tensor in adapter(model).items()}
    # Adam's first step is the learning rate itself wherever the gradient is not zero.
    assert max(value for name, value in moved.items() if marker in name) == pytest.approx(1e-2, rel=0.01)
    same = (marker, "lora_A" if "lora_B" in marker else marker)
    assert max(value for name, value in moved.items() if not any(part in name for part in same)) < 1e-7


def test_rates_that_are_left_out_follow_the_learning_rate() -> None:
    """With one rate for all, P, Q and the gate hardly move in a short run, and federating costs accuracy."""
    left_out = TrainingSettings(learning_rate=2e-4)
    assert left_out.learning_rate_of("adapter") == 2e-4
    assert left_out.learning_rate_of("shared") == pytest.approx(CORE_RATE * 2e-4)
    assert left_out.learning_rate_of("gate") == pytest.approx(GATE_RATE * 2e-4)
    # Noise moves a core as far as the rate, whatever there is to learn.
    assert left_out.private_learning_rate == 2e-4
    given = TrainingSettings(learning_rate=2e-4, shared_learning_rate=3e-3, gate_learning_rate=5e-3)
    assert [given.learning_rate_of(role) for role in ("shared", "gate")] == [3e-3, 5e-3]
    assert given.private_learning_rate == 3e-3


def test_the_loss_falls_and_the_report_says_so() -> None:
    model = make_model()
    seen: list[tuple[int, int, float]] = []
    settings = TrainingSettings(steps=25, learning_rate=0.02, shared_learning_rate=0.02)

    def note(step: int, steps: int, loss: float) -> None:
        seen.append((step, steps, loss))

    report = train_local(model, make_examples(16), settings, pad_token_id=0, progress=note)
    assert report.last_loss < report.first_loss - 0.5
    assert [(step, steps) for step, steps, _ in seen] == [(step, 25) for step in range(1, 26)]
    assert report.first_loss == pytest.approx(sum(loss for *_, loss in seen[:10]) / 10)
    assert report.last_loss == pytest.approx(sum(loss for *_, loss in seen[-10:]) / 10)
    assert "loss" not in repr(report)
    assert not any("core" in name for name in report.weights_unmoved)


def test_only_trainable_tensors_move() -> None:
    model = make_model()
    set_trainable(model, {"gate"}, layers="shared")
    set_trainable(model, set(), layers="family")
    fill_cores(model)
    norm = model.eval().get_submodule("base_model.model.model.norm").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained(model, steps=2)
    moved = changed(model, before)
    assert moved
    assert all("colora_gate" in name for name in moved)
    assert [model.training, norm.training] == [False, True], "modes are kept"


def test_equal_seeds_give_equal_weights_and_leave_the_global_generator_alone() -> None:
    results: list[dict[str, torch.Tensor]] = []
    for seed in (3, 3, 4):
        model = make_model()
        attention = model.get_submodule("base_model.model.model.layers.0.self_attn")
        assert isinstance(attention, LlamaAttention)
        attention.attention_dropout = 0.5
        torch.manual_seed(100 + len(results))
        state = torch.get_rng_state()
        # Four of nine examples, so that the order matters.
        trained(model, 9, steps=2, seed=seed, per_device_train_batch_size=2)
        assert torch.equal(torch.get_rng_state(), state)
        results.append(adapter(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert not all(torch.equal(results[0][name], results[2][name]) for name in results[0])


def test_accumulation_equals_one_large_batch() -> None:
    results = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        model = make_model()
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        results.append((trained(model, 11, steps=3, **sizes), adapter(model)))
    (first, wide), (second, narrow) = results
    assert first.last_loss == pytest.approx(second.last_loss, abs=1e-5)
    for name in wide:
        assert torch.allclose(wide[name], narrow[name], atol=2e-5)


def test_warmup_starts_small() -> None:
    moved = []
    for warmup in (0, 10):
        model = make_model()
        before = adapter(model)
        trained(model, steps=1, warmup=warmup)
        moved.append(max(float((t - before[name]).abs().max()) for name, t in adapter(model).items()))
    assert moved[1] == pytest.approx(moved[0] / 10, rel=1e-3)


def test_rates_fall_linearly_over_the_rounds() -> None:
    settings = TrainingSettings(learning_rate=0.4, gate_learning_rate=0.8, lr_scheduler_type="linear")
    rounds = [settings.of_round(number, 4) for number in (1, 2, 3, 4)]
    assert [s.learning_rate for s in rounds] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert [s.learning_rate_of("shared") for s in rounds] == pytest.approx([1.2, 0.9, 0.6, 0.3])
    assert [s.private_learning_rate for s in rounds] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert [s.learning_rate_of("gate") for s in rounds] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert TrainingSettings(learning_rate=0.4).of_round(4, 4).learning_rate == 0.4


def test_bfloat16_keeps_the_adapter_in_float32_and_differs_little() -> None:
    results = []
    for bf16 in (False, True):
        model = make_model()
        results.append(trained(model, 8, steps=3, bf16=bf16).last_loss)
        assert all(tensor.dtype == torch.float32 for tensor in adapter(model).values())
    assert results[0] != results[1]
    assert results[0] == pytest.approx(results[1], rel=0.02)


def broken_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    return example_losses(model, batch) * math.nan


def infinite_gradient(model: nn.Module, batch: Batch) -> torch.Tensor:
    losses = example_losses(model, batch)
    return losses.detach() + (losses - losses.detach()).abs().sqrt()


@pytest.mark.parametrize("losses", [broken_losses, infinite_gradient])
def test_what_is_not_finite_stops_training_before_a_weight_changes(
    losses: Callable[[nn.Module, Batch], torch.Tensor],
) -> None:
    model = make_model()
    before = adapter(model)
    with pytest.raises(ModelError, match="step 1 is not finite"):
        train_local(model, make_examples(4), TrainingSettings(steps=1), pad_token_id=0, losses=losses)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter(model).items())


def test_training_that_changes_nothing_is_loud() -> None:
    model = make_model()
    set_active_branches(model, {"global"})
    head = model.get_parameter("base_model.model.lm_head.weight").requires_grad_(True)
    with torch.no_grad():
        head.zero_()
        model.get_parameter("base_model.model.model.norm.weight").zero_()
    with pytest.raises(ModelError, match="changed none of the"):
        trained(model, steps=2)


def test_nothing_trainable_and_no_example_are_refused() -> None:
    model = make_model()
    with pytest.raises(ConfigurationError, match="no example"):
        train_local(model, [], TrainingSettings(), pad_token_id=0)
    model.requires_grad_(False)
    with pytest.raises(ModelError, match="nothing in the model is trainable"):
        trained(model)
    for size, seed in ((0, 0), (3, -1)):
        with pytest.raises(ConfigurationError):
            EpochSampler(size, seed)


@pytest.mark.parametrize(
    "values", [{"steps": 0}, {"learning_rate": 0.0}, {"learning_rate": math.nan}, {"lr": 1.0}, {"seed": -1}]
)
def test_senseless_settings_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        TrainingSettings(**values)


@given(size=st.integers(1, 20), counts=st.lists(st.integers(0, 9), max_size=12), seed=st.integers(0, 5))
def test_the_sampler_takes_every_example_once_per_epoch(size: int, counts: list[int], seed: int) -> None:
    sampler = EpochSampler(size, seed)
    taken = [index for count in counts for index in sampler.take(count)]
    assert len(taken) == sum(counts)
    for start in range(0, len(taken), size):
        epoch = taken[start : start + size]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(size))


@given(size=st.integers(1, 20), first=st.integers(0, 45), second=st.integers(0, 45))
def test_a_resumed_sampler_goes_on_as_if_never_stopped(size: int, first: int, second: int) -> None:
    whole = EpochSampler(size, 1).take(first + second)
    stopped = EpochSampler(size, 1)
    before = stopped.take(first)
    state = stopped.state_dict()
    assert all(type(value) is int for value in state.values())
    resumed = EpochSampler(size, 99)
    resumed.load_state_dict(state)
    assert before + resumed.take(second) == whole


def test_epochs_have_different_orders() -> None:
    sampler = EpochSampler(30, 0)
    assert sampler.take(30) != sampler.take(30) != EpochSampler(30, 1).take(30)


def test_a_damaged_state_is_refused() -> None:
    sampler = EpochSampler(5, 0)
    refused: dict[str, list[Any]] = {
        "size": [0], "position": [5, -1], "epoch": [-1, 0.5], "seed": [-1, "1"]
    }  # fmt: skip
    for name, values in refused.items():
        for value in values:
            with pytest.raises(StateError):
                sampler.load_state_dict(sampler.state_dict() | {name: value})
    damaged: list[Any] = [{"size": 5}, {}, [], None]  # as a damaged file may hold it
    for state in damaged:
        with pytest.raises(StateError, match="must hold size, seed, epoch, position"):
            sampler.load_state_dict(state)
    assert sampler.take(5) == EpochSampler(5, 0).take(5)


def test_other_data_begin_the_next_epoch() -> None:
    stopped = EpochSampler(5, 3)
    stopped.take(7)
    grown = EpochSampler(6, 0)
    grown.load_state_dict(stopped.state_dict())
    fresh = EpochSampler(6, 3)
    fresh.take(12)
    assert grown.take(6) == fresh.take(6)


@settings(max_examples=10)
@given(order=st.permutations(range(4)))
def test_the_loss_of_an_example_does_not_depend_on_its_batch(order: list[int]) -> None:
    model = make_model().eval()
    examples = make_examples(4)
    with torch.no_grad():
        alone = torch.stack([example_losses(model, collate([example], 0))[0] for example in examples])
        together = example_losses(model, collate([examples[index] for index in order], 0))
    assert torch.allclose(together, alone[list(order)], atol=1e-5)


def test_the_loss_is_the_mean_over_the_answer_tokens() -> None:
    model = make_model().eval()
    (example,) = make_examples(1)
    with torch.no_grad():
        logits = model(example.input_ids.unsqueeze(0)).logits[0].log_softmax(-1)
        expected = -(logits[-3, 5] + logits[-2, 6]) / 2
        assert float(example_losses(model, collate([example], 0))) == pytest.approx(float(expected), rel=1e-5)


def test_an_example_without_answer_is_refused() -> None:
    example = EncodedExample("1", torch.tensor([1, 2]), torch.tensor([IGNORED, IGNORED]))
    with pytest.raises(ModelError, match="no answer token"):
        example_losses(make_model(), collate([example, *make_examples(1)], 0))
