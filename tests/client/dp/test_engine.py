"""One example's gradient of the cores: against Opacus, in any company, and under attack."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from peft import PeftModel
from torch import nn

from fedmosaic.client.colora import read_shared
from fedmosaic.client.dp.engine import (
    check_cores,
    clip_and_sum,
    core_parameters,
    dimensions_of,
    example_gradient,
    only_shared_branch,
    public_branches,
)
from fedmosaic.client.model.examples import IGNORED, EncodedExample, collate
from fedmosaic.client.model.loss import example_losses, on_device_of
from fedmosaic.privacy.mechanism.gaussian import GRID
from fedmosaic.protos.errors import ModelError
from tiny import random_texts, tiny_colora

Cores = Mapping[str, nn.Linear]
pytestmark = pytest.mark.usefixtures("device")


def make_model(dtype: torch.dtype = torch.float32) -> PeftModel:
    """Cores that are not at zero, so that gradients reach below the last one."""
    model = tiny_colora(dtype)
    with only_shared_branch(model) as cores, torch.no_grad():
        for core in cores.values():
            core.weight.normal_(std=0.3)
            core.bias.normal_(std=0.3)
    return model


def rows_of(model: nn.Module, cores: Cores, examples: Sequence[EncodedExample]) -> torch.Tensor:
    return torch.stack([example_gradient(model, cores, example) for example in examples])


def rows_of_opacus(model: PeftModel, cores: Cores, examples: Sequence[EncodedExample]) -> torch.Tensor:
    """The oracle: Opacus's hooks on one padded batch, an independent implementation of the same rows."""
    wrapped = GradSampleModule(nn.ModuleList(cores.values()), loss_reduction="sum")
    model.enable_input_require_grads()  # Opacus's hooks want a gradient of every core's input
    try:
        wrapped.train()
        example_losses(model, on_device_of(model, collate(examples, 0))).sum().backward()
        return torch.cat([vars(p)["grad_sample"].flatten(1) for p in core_parameters(cores)], dim=1)
    finally:
        wrapped.zero_grad(set_to_none=True)
        wrapped.to_standard_module()
        model.disable_input_require_grads()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.cpu().double(), expected.cpu().double()
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def model(device: torch.device) -> PeftModel:
    return make_model()


@settings(max_examples=15)
@given(lengths=st.lists(st.integers(2, 20), min_size=1, max_size=6))
def test_rows_equal_those_of_opacus(model: PeftModel, lengths: list[int]) -> None:
    examples = random_texts(lengths)
    for example in examples[::2]:  # What is learned of a conversation stands in several places.
        example.labels.copy_(
            torch.where(torch.arange(len(example.labels)) % 3 == 1, example.input_ids, IGNORED)
        )
    with only_shared_branch(model) as cores:
        rows = rows_of(model, cores, examples)
        oracle = rows_of_opacus(model, cores, examples)
        assert rows.shape == (len(lengths), dimensions_of(cores))
    assert rows.dtype == torch.float32
    assert not rows.requires_grad
    for row, expected in zip(rows, oracle, strict=True):
        assert relative(row, expected) < 1e-5


def test_the_clipped_sum_equals_that_of_opacus_optimizer(model: PeftModel) -> None:
    examples = random_texts([5, 9, 14, 3, 8, 11, 6])
    with only_shared_branch(model) as cores:
        rows = rows_of(model, cores, examples)
        norms = sorted(float(row.norm()) for row in rows)
        # Half-way between two norms, so that no last bit decides what is clipped.
        assert norms[4] > 1.01 * norms[3]
        bound = (norms[3] + norms[4]) / 2
        total = clip_and_sum(rows, bound)
        wrapped = GradSampleModule(model, strict=False, loss_reduction="sum")
        parameters = core_parameters(cores)
        sgd = torch.optim.SGD(parameters, lr=1.0)
        clipped = {"max_grad_norm": bound, "noise_multiplier": 0.0, "expected_batch_size": 1}
        optimizer = DPOptimizer(sgd, loss_reduction="sum", **clipped)
        model.enable_input_require_grads()
        example_losses(wrapped, on_device_of(model, collate(examples, 0))).sum().backward()
        model.disable_input_require_grads()
        optimizer.clip_and_accumulate()
        np.testing.assert_array_equal(read_shared(wrapped), read_shared(model))
        by_opacus = torch.cat([vars(parameter)["summed_grad"].flatten() for parameter in parameters])
        wrapped.to_standard_module()
        model.zero_grad(set_to_none=True)
    assert (total.rows, total.clipped, total.rejected) == (7, 3, 0)
    assert relative(torch.from_numpy(total.units * (bound / GRID)), by_opacus) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bound", [0.0, 4.0])
def test_a_row_has_the_same_bits_in_any_company_and_order(dtype: torch.dtype, bound: float) -> None:
    """Also with a received branch at the bound of what can be received, which amplifies every last bit."""
    model = make_model(dtype)
    examples = random_texts([5, 17, 4, 9, 17, 30, 3])
    with only_shared_branch(model, global_weight=0.5) as cores, public_branches(model, bound):
        together = rows_of(model, cores, examples)
        backwards = rows_of(model, cores, examples[::-1]).flip(0)
        fewer = rows_of(model, cores, examples[1::2])
    assert together.dtype == torch.float32
    assert torch.equal(together, backwards)
    assert torch.equal(together[1::2], fewer)


def test_a_core_without_part_has_a_row_of_zeros_and_a_loss_is_one_number(model: nn.Module) -> None:
    (example,) = random_texts([5])
    assert not example_gradient(model, {"spare": nn.Linear(4, 4)}, example).any()
    with only_shared_branch(model) as cores, pytest.raises(ModelError, match="one loss per example"):
        example_gradient(model, cores, example, lambda m, batch: example_losses(m, batch).mean())


def test_unfit_cores_are_refused() -> None:
    core = nn.Linear(2, 2)
    unfit: dict[str, dict[str, nn.Linear]] = {
        "no core": {},
        "with a bias": {"a": nn.Linear(2, 2, bias=False)},
        "bfloat16": {"a": nn.Linear(2, 2).to(torch.bfloat16)},
        "frozen": {"a": nn.Linear(2, 2).requires_grad_(False)},
        "two names": {"a": core, "b": core},
        "lower the rank": {"a": nn.Linear(1025, 1025)},
    }
    for words, cores in unfit.items():
        with pytest.raises(ModelError, match=words):
            check_cores(cores)
