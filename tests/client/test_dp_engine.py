"""Per-example gradients of the cores: against autograd, against Opacus, and under attack."""

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedmosaic.client.colora import CoLoraConfig
from fedmosaic.client.dp_branch import only_shared_branch
from fedmosaic.client.dp_engine import (
    ClosedFormEngine,
    GradientEngine,
    OpacusEngine,
    check_cores,
    clip_and_sum,
    dimensions_of,
)
from fedmosaic.client.examples import IGNORED, EncodedExample, collate
from fedmosaic.client.loss import Batch, example_losses
from fedmosaic.privacy.mechanism import GRID
from fedmosaic.protos.errors import ModelError

ENGINES = [ClosedFormEngine, OpacusEngine]
VOCABULARY = 61


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A Llama with Co-LoRA whose cores are not at zero, so that gradients reach below the last one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = get_peft_model(
        LlamaForCausalLM(config).to(dtype),
        CoLoraConfig(r=4, alpha=8, blocks=2, personal_branch=True, task_type="CAUSAL_LM"),
    )
    with only_shared_branch(model) as cores, torch.no_grad():
        for core in cores.values():
            core.weight.normal_(std=0.3)
            core.bias.normal_(std=0.3)
    return model


def make_examples(lengths: list[int], seed: int = 1) -> list[EncodedExample]:
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index, length in enumerate(lengths):
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        labels[: max(1, length - 1 - index % 3)] = IGNORED
        examples.append(EncodedExample(str(index), ids, labels))
    return examples


def one_by_one(
    model: nn.Module, cores: Mapping[str, nn.Linear], examples: list[EncodedExample]
) -> torch.Tensor:
    """The oracle: autograd on one example at a time, without padding, no hooks."""
    rows = []
    for example in examples:
        loss = example_losses(model, collate([example], 0)).sum()
        parameters = [parameter for core in cores.values() for parameter in (core.weight, core.bias)]
        rows.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)]))
    return torch.stack(rows)


def release_hooks(engine: GradientEngine) -> None:
    if isinstance(engine, OpacusEngine):
        engine.close()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make_model()


@pytest.mark.parametrize("kind", ENGINES)
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(2, 20), min_size=1, max_size=6))
def test_rows_equal_autograd_one_example_at_a_time(
    model: nn.Module, kind: type[ClosedFormEngine], lengths: list[int]
) -> None:
    examples = make_examples(lengths)
    with only_shared_branch(model) as cores:
        engine = kind(model, cores)
        rows = engine.example_gradients(collate(examples, 0))
        release_hooks(engine)
        expected = one_by_one(model, cores, examples)
    assert rows.dtype == torch.float32
    assert rows.shape == (len(lengths), dimensions_of(cores))
    for row, oracle in zip(rows, expected, strict=True):
        assert relative(row, oracle) < 1e-5


def test_the_clipped_sum_equals_opacus_optimizer_and_a_loop(model: nn.Module) -> None:
    examples = make_examples([5, 9, 14, 3, 8, 11, 6])
    batch = collate(examples, 0)
    with only_shared_branch(model) as cores:
        oracle = one_by_one(model, cores, examples)
        # Half way between two lengths: a row as long as the bound is cut or not by the last bit of its norm.
        below, above = oracle.norm(dim=1).sort().values[3:5].tolist()
        assert above > 1.01 * below
        bound = (below + above) / 2
        loop = sum(row * min(1.0, bound / float(row.norm())) for row in oracle)
        by_engine = {}
        for kind in ENGINES:
            engine = kind(model, cores)
            total = clip_and_sum(engine.example_gradients(batch), bound)
            release_hooks(engine)
            by_engine[kind] = torch.from_numpy(total.units * (bound / GRID))
            assert (total.rows, total.clipped, total.rejected) == (7, 3, 0)
        wrapped = GradSampleModule(model, strict=False, loss_reduction="sum")
        parameters = [parameter for core in cores.values() for parameter in core.parameters()]
        optimizer = DPOptimizer(
            torch.optim.SGD(parameters, lr=1.0),
            noise_multiplier=0.0,
            max_grad_norm=bound,
            expected_batch_size=1,
            loss_reduction="sum",
        )
        example_losses(wrapped, batch).sum().backward()
        optimizer.clip_and_accumulate()
        by_opacus = torch.cat([parameter.summed_grad.flatten() for parameter in parameters])
        wrapped.to_standard_module()
        model.zero_grad(set_to_none=True)
    assert relative(by_engine[ClosedFormEngine], loop) < 1e-5
    assert relative(by_engine[OpacusEngine], by_engine[ClosedFormEngine]) < 1e-5
    assert relative(by_engine[ClosedFormEngine], by_opacus) < 1e-5


@pytest.mark.parametrize("kind", ENGINES)
def test_a_bfloat16_model_has_float32_rows_that_equal_autograd(kind: type[ClosedFormEngine]) -> None:
    model = make_model(torch.bfloat16)
    examples = make_examples([9, 9, 9])
    batch = collate(examples, 0)
    with only_shared_branch(model) as cores:
        parameters = [parameter for core in cores.values() for parameter in (core.weight, core.bias)]
        gradients = torch.autograd.grad(example_losses(model, batch).sum(), parameters)
        engine = kind(model, cores)
        rows = engine.example_gradients(batch)
        release_hooks(engine)
    assert rows.dtype == torch.float32
    assert relative(rows.sum(0), torch.cat([part.flatten() for part in gradients])) < 1e-5


@pytest.mark.parametrize("kind", ENGINES)
def test_nothing_private_and_no_hook_is_left_behind(kind: type[ClosedFormEngine]) -> None:
    model = make_model()
    with only_shared_branch(model) as cores:
        before = {id(core): set(vars(core)) for core in cores.values()}
        engine = kind(model, cores)
        engine.example_gradients(collate(make_examples([4, 6]), 0))
        for core in cores.values():
            for parameter in core.parameters():
                assert parameter.grad is None
                assert getattr(parameter, "grad_sample", None) is None
        release_hooks(engine)
        for core in cores.values():
            assert not core._forward_hooks
            assert not core._backward_hooks
            assert set(vars(core)) == before[id(core)]
            assert not any(hasattr(parameter, "grad_sample") for parameter in core.parameters())


@pytest.mark.parametrize("kind", ENGINES)
def test_a_failed_call_does_not_reach_the_next_one(model: nn.Module, kind: type[ClosedFormEngine]) -> None:
    fail = True

    def losses(model: nn.Module, batch: Batch) -> torch.Tensor:
        result = example_losses(model, batch)
        if fail:
            raise RuntimeError("out of memory")
        return result

    examples = make_examples([5, 7])
    with only_shared_branch(model) as cores:
        engine = kind(model, cores, losses)
        with pytest.raises(RuntimeError, match="memory"):
            engine.example_gradients(collate(make_examples([9, 9, 9], seed=2), 0))
        fail = False
        rows = engine.example_gradients(collate(examples, 0))
        release_hooks(engine)
        assert relative(rows, one_by_one(model, cores, examples)) < 1e-5


def test_recomputed_activations_change_nothing() -> None:
    model = make_model()
    batch = collate(make_examples([6, 9, 4]), 0)
    with only_shared_branch(model) as cores:
        plain = ClosedFormEngine(model, cores).example_gradients(batch)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        model.train()
        recomputed = ClosedFormEngine(model, cores).example_gradients(batch)
    assert relative(recomputed, plain) < 1e-5


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_broken_example_spoils_neither_the_others_nor_the_sum(
    model: nn.Module, kind: type[ClosedFormEngine], value: float
) -> None:
    def losses(model: nn.Module, batch: Batch) -> torch.Tensor:
        scale = torch.ones(len(batch["input_ids"]))
        scale[1] = value
        return example_losses(model, batch) * scale

    examples = make_examples([5, 7, 6])
    with only_shared_branch(model) as cores:
        engine = kind(model, cores, losses)
        rows = engine.example_gradients(collate(examples, 0))
        release_hooks(engine)
        expected = one_by_one(model, cores, [examples[0], examples[2]])
    assert relative(rows[[0, 2]], expected) < 1e-5
    total = clip_and_sum(rows, 1.0)
    assert total.rejected == 1
    assert relative(torch.from_numpy(total.units * (1.0 / GRID)), expected.sum(0)) < 1e-3


rows_of_floats = st.lists(
    st.lists(
        st.one_of(
            st.floats(width=32, allow_nan=True, allow_infinity=True),
            st.floats(-1.0, 1.0, width=32),
        ),
        min_size=3,
        max_size=3,
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None)
@given(values=rows_of_floats, bound=st.floats(1e-3, 1e3))
def test_removing_any_example_moves_the_sum_by_at_most_the_bound(
    values: list[list[float]], bound: float
) -> None:
    rows = torch.tensor(values, dtype=torch.float32)
    whole = clip_and_sum(rows, bound).units
    for index in range(len(rows)):
        rest = clip_and_sum(torch.cat([rows[:index], rows[index + 1 :]]), bound).units
        difference = [int(part) for part in whole - rest]
        assert sum(part * part for part in difference) <= GRID**2


@settings(deadline=None)
@given(values=rows_of_floats, cut=st.integers(0, 6))
def test_the_split_into_physical_batches_changes_no_bit(values: list[list[float]], cut: int) -> None:
    rows = torch.tensor(values, dtype=torch.float32)
    parts = clip_and_sum(rows[:cut], 1.0) + clip_and_sum(rows[cut:], 1.0)
    whole = clip_and_sum(rows.flip(0), 1.0)
    assert np.array_equal(parts.units, whole.units)
    assert (parts.rows, parts.clipped, parts.rejected) == (whole.rows, whole.clipped, whole.rejected)


def test_wide_rows_are_clipped_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    whole = clip_and_sum(rows, 1.0)
    monkeypatch.setattr("fedmosaic.client.dp_engine._CLIPPED_AT_ONCE", 10)
    parts = clip_and_sum(rows, 1.0)
    assert np.array_equal(parts.units, whole.units)
    assert (parts.rows, parts.clipped) == (whole.rows, whole.clipped)


class Toy(nn.Module):
    """Cores outside Co-LoRA, with one way of calling them per name."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 4)
        self.core = nn.Linear(4, 4)
        self.way = way
        self.embedding.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        if self.way == "twice":
            return self.core(torch.tanh(self.core(hidden))).square().mean((1, 2))
        if self.way == "flattened":
            return self.core(hidden.flatten(0, 1)).view_as(hidden).square().mean((1, 2))
        if self.way == "by weight":
            return nn.functional.linear(hidden, self.core.weight, self.core.bias).square().mean((1, 2))
        if self.way == "result unused":
            return (hidden + 0.0 * self.core.weight.sum() + self.core(hidden).detach()).square().mean((1, 2))
        if self.way == "pooled":
            return self.core(hidden.mean(1)).square().mean(1)
        return self.core(hidden).square().mean()


def toy_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    losses: torch.Tensor = model(batch["input_ids"])
    return losses


TOY_BATCH = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("way", ["twice", "pooled"])
def test_cores_outside_colora(kind: type[ClosedFormEngine], way: str) -> None:
    toy = Toy(way)
    engine = kind(toy, {"core": toy.core}, toy_losses)
    rows = engine.example_gradients(TOY_BATCH)
    release_hooks(engine)
    for index, row in enumerate(rows):
        alone = torch.autograd.grad(
            toy(TOY_BATCH["input_ids"][index : index + 1]).sum(), toy.core.parameters()
        )
        assert relative(row, torch.cat([part.flatten() for part in alone])) < 1e-5


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("flattened", "first axis"),
        ("by weight", "no part in the loss"),
        ("result unused", "no part in the loss"),
        ("mean over the batch", "one loss per example"),
    ],
)
def test_cores_that_cannot_be_separated_are_refused(
    kind: type[ClosedFormEngine], way: str, message: str
) -> None:
    toy = Toy(way)
    engine = kind(toy, {"core": toy.core}, toy_losses)
    with pytest.raises(ModelError, match=message):
        engine.example_gradients(TOY_BATCH)
    release_hooks(engine)


def test_unfit_cores_are_refused() -> None:
    core = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="no core"):
        check_cores({})
    with pytest.raises(ModelError, match="with a bias"):
        check_cores({"a": nn.Linear(2, 2, bias=False)})
    with pytest.raises(ModelError, match="bfloat16"):
        check_cores({"a": nn.Linear(2, 2).to(torch.bfloat16)})
    with pytest.raises(ModelError, match="frozen"):
        check_cores({"a": nn.Linear(2, 2).requires_grad_(False)})
    with pytest.raises(ModelError, match="two names"):
        check_cores({"a": core, "b": core})
    with pytest.raises(ModelError, match="lower the rank"):
        check_cores({"a": nn.Linear(1025, 1025)})
