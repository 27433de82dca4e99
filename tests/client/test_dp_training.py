"""DP-SGD on the shared branch: what is drawn, charged, divided by, and what reaches the release."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from peft import get_peft_model
from pydantic import ValidationError
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedmosaic.client.colora import CoLoraConfig, adapted_layers, read_shared, set_active_branches
from fedmosaic.client.dp_branch import only_shared_branch, private_parameters
from fedmosaic.client.dp_engine import ClosedFormEngine, dimensions_of
from fedmosaic.client.dp_training import (
    PrivateTrainingReport,
    PrivateTrainingSettings,
    noisy_sum,
    train_private,
)
from fedmosaic.client.examples import IGNORED, EncodedExample, collate
from fedmosaic.client.loss import Batch, ExampleLosses, example_losses
from fedmosaic.privacy.events import GaussianEvent
from fedmosaic.privacy.mechanism import GRID, ClippedSum
from fedmosaic.privacy.noise import SecureNoise, SeededTestNoise
from fedmosaic.protos.errors import BudgetExceededError, ConfigurationError, ModelError, PrivacyError

VOCABULARY = 61


def make_model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return get_peft_model(
        LlamaForCausalLM(config),
        CoLoraConfig(r=4, alpha=8, blocks=2, personal_branch=True, task_type="CAUSAL_LM"),
    )


def make_examples(count: int) -> list[EncodedExample]:
    generator = torch.Generator().manual_seed(1)
    examples = []
    for index in range(count):
        length = int(torch.randint(4, 14, (1,), generator=generator))
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        labels[: length - 2] = IGNORED
        examples.append(EncodedExample(str(index), ids, labels))
    return examples


class Script:
    """Randomness that takes all examples or none, adds no noise, and writes down what was asked of it."""

    is_test = True

    def __init__(self, everyone: bool = True, level: float = 0.0) -> None:
        self.word = np.uint64(0 if everyone else 2**64 - 1)
        self.level = level
        self.log: list[tuple[str, int, float]] = []

    def words(self, size: int) -> npt.NDArray[np.uint64]:
        self.log.append(("words", size, 0.0))
        return np.full(size, self.word)

    def gaussian(self, size: int, standard_deviation: float) -> npt.NDArray[np.float64]:
        self.log.append(("gaussian", size, standard_deviation))
        return np.full(size, self.level * standard_deviation)


SETTINGS = PrivateTrainingSettings(
    learning_rate=1.0,
    optimizer="sgd",
    steps=3,
    sampling_rate=0.5,
    expected_batch_size=7,
    max_grad_norm=0.05,
    noise_multiplier=1.5,
    physical_batch_size=4,
)


def change(settings: PrivateTrainingSettings = SETTINGS, **values: object) -> PrivateTrainingSettings:
    return PrivateTrainingSettings(**(settings.model_dump() | values))


def train(
    model: nn.Module,
    examples: list[EncodedExample],
    settings: PrivateTrainingSettings,
    randomness: Script | SeededTestNoise | SecureNoise | None,
    losses: ExampleLosses = example_losses,
    charged: list[GaussianEvent] | None = None,
) -> PrivateTrainingReport:
    with only_shared_branch(model, global_weight=0.5) as cores:
        return train_private(
            model,
            cores,
            examples,
            settings,
            pad_token_id=0,
            charge=([] if charged is None else charged).append,
            private_parameters=private_parameters(model),
            randomness=randomness,
            losses=losses,
        )


def test_a_step_is_the_clipped_sum_over_the_public_divisor() -> None:
    examples = make_examples(9)
    model = make_model()
    with only_shared_branch(model, global_weight=0.5) as cores:
        rows = ClosedFormEngine(model, cores).example_gradients(collate(examples, 0)).double()
    factors = (0.05 / rows.norm(dim=1)).clamp(max=1.0)
    assert 0 < int((factors < 1).sum())
    expected = -(factors @ rows) / 7
    train(model, examples, change(steps=1), Script())
    moved = torch.from_numpy(read_shared(model)).double()
    assert float((moved - expected).norm() / expected.norm()) < 1e-5


def test_nothing_divides_by_the_size_of_the_sample_or_of_the_data() -> None:
    examples = make_examples(5)
    once, twice = make_model(), make_model()
    train(once, examples, change(steps=1), Script())
    train(twice, examples + examples, change(steps=1), Script())
    # Of the whole vector: a coordinate near zero has no digits to compare.
    left = read_shared(twice) - 2.0 * read_shared(once)
    assert np.linalg.norm(left) < 1e-3 * np.linalg.norm(read_shared(once))


def test_noise_is_drawn_once_per_step_over_all_coordinates() -> None:
    model, script = make_model(), Script()
    train(model, make_examples(9), SETTINGS, script)
    with only_shared_branch(model) as cores:
        dimensions = dimensions_of(cores)
    assert script.log == 3 * [("words", 9, 0.0), ("gaussian", dimensions, 1.5 * GRID)]


def test_an_empty_sample_releases_noise_and_is_charged() -> None:
    model, script = make_model(), Script(everyone=False, level=1.0)
    charged: list[GaussianEvent] = []
    report = train(model, make_examples(9), SETTINGS, script, charged=charged)
    # Every step moves every coordinate by −lr · σC / expected batch size: noise alone.
    assert np.allclose(read_shared(model), -3 * 1.0 * 1.5 * 0.05 / 7, rtol=1e-4)
    assert charged == [GaussianEvent(1.5, 0.5, 3)]
    assert report.events == (GaussianEvent(1.5, 0.5, 3),)
    assert report.clipped_share is None


def test_empty_and_full_samples_ask_for_the_same_randomness() -> None:
    empty, full = Script(everyone=False, level=0.1), Script(level=0.1)
    train(make_model(), make_examples(9), SETTINGS, full)
    train(make_model(), make_examples(9), SETTINGS, empty)
    assert empty.log == full.log


def test_a_first_step_that_moves_nothing_is_refused() -> None:
    with pytest.raises(ModelError, match="moved no weight"):
        train(make_model(), make_examples(9), change(learning_rate=1e-45), Script(everyone=False, level=0.1))


def test_noisy_sum_has_the_stated_distribution() -> None:
    total = ClippedSum(np.full(40_000, 3 * GRID, dtype=np.int64), 0, 0, 5)
    draws = noisy_sum(total, 0.5, 2.0, SecureNoise()).numpy() / 0.5
    # Six standard deviations are passed by chance in two of a billion runs.
    assert abs(draws.mean() - 3.0) < 6 * 2.0 / math.sqrt(40_000)
    assert abs(draws.std() / 2.0 - 1.0) < 6 / math.sqrt(2 * 40_000)
    # On the grid: the low bits are those of an integer, whatever the data.
    assert np.array_equal(draws * GRID, np.rint(draws * GRID))


def test_charged_in_full_before_anything_is_drawn() -> None:
    script = Script()
    model = make_model()
    seen: list[tuple[GaussianEvent, int]] = []
    with only_shared_branch(model) as cores:
        train_private(
            model,
            cores,
            make_examples(9),
            SETTINGS,
            pad_token_id=0,
            charge=lambda event: seen.append((event, len(script.log))),
            private_parameters={},
            randomness=script,
        )
    assert seen == [(GaussianEvent(1.5, 0.5, 3), 0)]


def test_a_refused_charge_draws_nothing_and_leaves_everything_as_it_was() -> None:
    script, model = Script(), make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def refuse(_: GaussianEvent) -> None:
        raise BudgetExceededError("the budget is spent")

    with only_shared_branch(model) as cores, pytest.raises(BudgetExceededError):
        train_private(
            model,
            cores,
            make_examples(9),
            SETTINGS,
            pad_token_id=0,
            charge=refuse,
            private_parameters={},
            randomness=script,
        )
    assert script.log == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_wrong_model_is_refused_before_it_is_charged() -> None:
    model = make_model()
    charged: list[GaussianEvent] = []
    with only_shared_branch(model) as cores:
        set_active_branches(model, {"local", "personal"}, layers="shared")
        with pytest.raises(PrivacyError):
            train_private(
                model,
                cores,
                make_examples(9),
                SETTINGS,
                pad_token_id=0,
                charge=charged.append,
                private_parameters=private_parameters(model),
                randomness=Script(),
            )
    assert charged == []


def disturb_private_tensors(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in private_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("engine", ["closed_form", "opacus"])
def test_the_release_does_not_depend_on_any_private_tensor(engine: str) -> None:
    examples = make_examples(12)
    settings = change(optimizer="adam", learning_rate=0.01, engine=engine)
    clean, disturbed = make_model(), make_model()
    disturb_private_tensors(disturbed)
    train(clean, examples, settings, SeededTestNoise(4))
    train(disturbed, examples, settings, SeededTestNoise(4))
    assert np.array_equal(read_shared(clean), read_shared(disturbed))
    assert np.abs(read_shared(clean)).min() > 0


@pytest.mark.parametrize("active", [{"local", "personal"}, {"local", "global", "personal"}])
def test_without_the_guard_a_personal_branch_would_reach_the_release(active: set[str]) -> None:
    """The negative of the test above: the same run with the branch left in, its tensors not declared."""
    released = []
    for disturb in (False, True):
        model = make_model()
        if disturb:
            disturb_private_tensors(model)
        with only_shared_branch(model, global_weight=0.5) as cores:
            set_active_branches(model, active, layers="shared")
            train_private(
                model,
                cores,
                make_examples(12),
                SETTINGS,
                pad_token_id=0,
                charge=lambda _: None,
                private_parameters={},
                randomness=SeededTestNoise(4),
            )
        released.append(read_shared(model))
    assert not np.array_equal(*released)


def test_only_the_cores_change() -> None:
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, make_examples(9), SETTINGS, SeededTestNoise(0))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("colora_core_local" in name for name in changed)
    assert len(changed) == 2 * len(adapted_layers(model, "shared"))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_repeatable_by_seed_and_marked_as_a_test() -> None:
    first, second, other = make_model(), make_model(), make_model()
    report = train(first, make_examples(9), SETTINGS, SeededTestNoise(1))
    train(second, make_examples(9), SETTINGS, SeededTestNoise(1))
    train(other, make_examples(9), SETTINGS, SeededTestNoise(2))
    assert np.array_equal(read_shared(first), read_shared(second))
    assert not np.array_equal(read_shared(first), read_shared(other))
    assert report.is_test


def test_real_runs_draw_securely_and_never_twice_alike() -> None:
    first, second = make_model(), make_model()
    report = train(first, make_examples(9), SETTINGS, None)
    train(second, make_examples(9), SETTINGS, None)
    assert not report.is_test
    assert not np.array_equal(read_shared(first), read_shared(second))


def test_engines_and_physical_batch_sizes_agree() -> None:
    released = []
    for values in (
        {"physical_batch_size": 100},
        {"physical_batch_size": 1},
        {"engine": "opacus", "physical_batch_size": 5},
    ):
        model = make_model()
        train(model, make_examples(12), change(noise_multiplier=1e-6, **values), SeededTestNoise(3))
        released.append(read_shared(model))
    for other in released[1:]:
        assert np.linalg.norm(other - released[0]) < 1e-5 * np.linalg.norm(released[0])


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_broken_example_moves_the_release_by_no_more_than_the_bound(value: float) -> None:
    examples = make_examples(6)
    broken = len(examples[2].input_ids)
    examples = [example for example in examples if len(example.input_ids) != broken or example is examples[2]]

    def losses(model: nn.Module, batch: Batch) -> torch.Tensor:
        scale = torch.where(batch["attention_mask"].sum(1) == broken, value, 1.0)
        return example_losses(model, batch) * scale

    with_it, without_it = make_model(), make_model()
    settings = change(steps=1, sampling_rate=1.0)
    report = train(with_it, examples, settings, SeededTestNoise(5), losses)
    rest = [example for example in examples if len(example.input_ids) != broken]
    train(without_it, rest, settings, SeededTestNoise(5), losses)
    moved = np.linalg.norm(read_shared(with_it).astype(float) - read_shared(without_it))
    assert np.isfinite(read_shared(with_it)).all()
    assert moved <= 0.05 / 7 * (1 + 1e-4)
    assert report.rejected == (0 if math.isfinite(value) else 1)


def test_reports_keep_private_counts_out_of_sight() -> None:
    report = train(make_model(), make_examples(12), change(max_grad_norm=1e-3), SeededTestNoise(1))
    assert report.clipped_share == 1.0
    assert report.rejected == 0
    assert "clipped" not in repr(report)
    assert "rejected" not in repr(report)
    assert not any("batch" in name or "loss" in name for name in PrivateTrainingReport.__dataclass_fields__)


def test_it_learns_when_the_noise_is_small() -> None:
    examples = make_examples(12)
    for example in examples:
        example.input_ids[-2:] = torch.tensor([5, 6])
        example.labels[-2:] = torch.tensor([5, 6])
    model = make_model()
    settings = change(
        optimizer="adam",
        learning_rate=0.1,
        steps=40,
        sampling_rate=1.0,
        expected_batch_size=12,
        max_grad_norm=1.0,
        noise_multiplier=0.05,
    )
    with only_shared_branch(model, global_weight=0.5):
        before = float(example_losses(model, collate(examples, 0)).mean().detach())
    train(model, examples, settings, SeededTestNoise(0))
    with only_shared_branch(model, global_weight=0.5):
        after = float(example_losses(model, collate(examples, 0)).mean().detach())
    assert after < before - 0.3


def test_bfloat16_products_release_float32_of_the_same_size() -> None:
    wide, narrow = make_model(), make_model()
    settings = change(noise_multiplier=1e-6, sampling_rate=1.0)
    train(wide, make_examples(8), settings, SeededTestNoise(0))
    train(narrow, make_examples(8), change(settings, bf16=True), SeededTestNoise(0))
    assert read_shared(narrow).dtype == np.float32
    difference = np.linalg.norm(read_shared(wide) - read_shared(narrow)) / np.linalg.norm(read_shared(wide))
    assert 0 < difference < 0.1


def _one_step(examples: list[EncodedExample], **values: object) -> np.ndarray:
    """The clipped sum of all examples over C, from one step of gradient descent without noise."""
    model = make_model()
    with only_shared_branch(model) as cores:
        for core in cores.values():
            nn.init.normal_(core.weight, std=0.3, generator=torch.Generator().manual_seed(3))
        start = read_shared(model)
    settings = change(steps=1, max_grad_norm=1e-2, learning_rate=0.1, expected_batch_size=1, **values)
    train(model, examples, settings, Script())
    return (start - read_shared(model)) / (0.1 * 1e-2)


def _sensitivity(**values: object) -> float:
    """How far one long example moves the sum over many copies of a shorter one, in units of C."""
    copies = [make_examples(2)[1]] * 31
    long = torch.arange(16)
    added = EncodedExample("long", long, torch.where(long < 14, IGNORED, long))
    both, without = _one_step([*copies, added], **values), _one_step(copies, **values)
    return float(np.linalg.norm(both.astype(np.float64) - without))


@pytest.mark.parametrize("bf16", [False, True])
def test_one_example_moves_the_sum_by_no_more_than_the_clipping_norm(bf16: bool) -> None:
    assert _sensitivity(bf16=bf16, physical_batch_size=32) < 1.0 + 1e-4


def test_in_bfloat16_examples_together_would_pass_the_clipping_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    # Why a narrow model gets one example at a time: the same sum, batched, is not bounded by C.
    monkeypatch.setattr("fedmosaic.client.dp_training.is_narrow", lambda model, autocast: False)
    monkeypatch.setattr("fedmosaic.client.dp_training.check_engine", lambda *args, **named: None)
    assert _sensitivity(bf16=True, physical_batch_size=32) > 1.01


def test_mode_and_progress() -> None:
    model = make_model().eval()
    seen: list[tuple[int, int]] = []
    with only_shared_branch(model) as cores:
        train_private(
            model,
            cores,
            make_examples(4),
            SETTINGS,
            pad_token_id=0,
            charge=lambda _: None,
            private_parameters={},
            randomness=SeededTestNoise(0),
            progress=lambda step, steps: seen.append((step, steps)),
        )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert not any(module.training for module in model.modules())


def test_no_example_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no example"):
        train(make_model(), [], SETTINGS, None)


@pytest.mark.parametrize(
    "values",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": math.inf},
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.5},
        {"max_grad_norm": math.inf},
        {"max_grad_norm": 0.0},
        {"expected_batch_size": 0},
        {"steps": 0},
        {"engine": "functorch"},
        {"batch_size": 8},
    ],
)
def test_settings_without_a_guarantee_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        change(**values)
