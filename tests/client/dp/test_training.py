"""DP-SGD on the shared branch: what is drawn, charged, divided by, and what reaches the release."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention

from fedmosaic.client.colora import adapted_layers, read_shared, set_active_branches, write_shared
from fedmosaic.client.colora.state import shared_modules
from fedmosaic.client.dp.engine import dimensions_of, example_gradient, only_shared_branch, private_parameters
from fedmosaic.client.dp.training import PrivateTrainingSettings, noisy_sum, private_steps
from fedmosaic.client.model.examples import IGNORED, EncodedExample
from fedmosaic.client.model.loss import Batch, example_losses
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.mechanism.gaussian import GRID, ClippedSum
from fedmosaic.privacy.mechanism.noise import SecureNoise, SeededTestNoise
from fedmosaic.protos.errors import ConfigurationError, PrivacyError
from tiny import random_texts, tiny_colora

pytestmark = pytest.mark.usefixtures("device")


def make_model() -> nn.Module:
    return tiny_colora(initializer_range=0.2)


TEXTS = random_texts([4, 11, 8, 5, 12])


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


def receive(model: nn.Module, bound: float) -> None:
    """Load a received branch of ± bound with random signs, which may be no finite number."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in shared_modules(model):
            for parameter in layer.core("default", "global").parameters():
                signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2.0 - 1.0
                parameter.copy_(signs * bound)


Texts = list[EncodedExample]
Settings = PrivateTrainingSettings
PLAN = {"steps": 2, "sampling_rate": 0.5, "expected_batch_size": 7, "max_grad_norm": 0.05}
SETTINGS = Settings(learning_rate=1.0, optimizer="sgd", noise_multiplier=1.5, **PLAN)


def change(settings: Settings = SETTINGS, **values: Any) -> Settings:
    return Settings(**(settings.model_dump() | values))


def train(
    model: nn.Module, texts: Texts, settings: Settings = SETTINGS, noise: Any = None, **options: Any
) -> ClippedSum:
    """Train beside a received branch; with `active` branches left in, no private tensor is declared."""
    active = options.pop("active", None)
    with only_shared_branch(model, global_weight=0.5) as cores:
        if active is not None:
            set_active_branches(model, active, layers="shared")
        options |= {"private_parameters": {} if active else private_parameters(model)}
        return private_steps(model, cores, texts, settings, randomness=noise or Script(), **options)()


def released(
    examples: Texts, settings: Settings = SETTINGS, *others: Any, **options: Any
) -> npt.NDArray[np.float32]:
    """What a fresh model releases."""
    model = make_model()
    train(model, examples, settings, *others, **options)
    return read_shared(model)


def test_a_step_is_the_clipped_sum_over_the_public_divisor() -> None:
    model = make_model()
    with only_shared_branch(model, global_weight=0.5) as cores:
        rows = torch.stack([example_gradient(model, cores, text) for text in TEXTS]).cpu().double()
    factors = (0.05 / rows.norm(dim=1)).clamp(max=1.0)
    assert 0 < int((factors < 1).sum())
    expected = -(factors @ rows) / 7
    train(model, TEXTS, change(steps=1), Script())
    moved = torch.from_numpy(read_shared(model)).double()
    assert float((moved - expected).norm() / expected.norm()) < 1e-5


def test_nothing_divides_by_the_size_of_the_sample_or_of_the_data() -> None:
    once, twice = (released(given, change(steps=1)) for given in (TEXTS, TEXTS + TEXTS))
    # Of the whole vector: a coordinate near zero has no digits to compare.
    assert np.linalg.norm(twice - 2.0 * once) < 1e-3 * np.linalg.norm(once)


def test_noise_is_drawn_once_per_step_over_all_coordinates() -> None:
    model, script = make_model(), Script()
    train(model, TEXTS, SETTINGS, script)
    with only_shared_branch(model) as cores:
        dimensions = dimensions_of(cores)
    assert script.log == 2 * [("words", 5, 0.0), ("gaussian", dimensions, 1.5 * GRID)]


def test_an_empty_sample_releases_noise_and_is_charged() -> None:
    model, script = make_model(), Script(everyone=False, level=1.0)
    counts = train(model, TEXTS, SETTINGS, script)
    # Every step moves every coordinate by −lr · σC / expected batch size: noise alone.
    assert np.allclose(read_shared(model), -2 * 1.0 * 1.5 * 0.05 / 7, rtol=1e-4)
    assert SETTINGS.event == GaussianEvent(1.5, 0.5, 2)
    assert counts.rows == 0
    full = Script(level=1.0)
    released(TEXTS, SETTINGS, full)
    assert script.log == full.log, "a full sample asks for the same randomness"


def test_training_that_moves_nothing_is_told_and_ends_as_any_other(caplog: pytest.LogCaptureFixture) -> None:
    released(TEXTS, change(learning_rate=1e-45), Script(everyone=False, level=0.1))
    assert "moved no weight" in caplog.text


def test_before_the_steps_are_charged_nothing_is_drawn_and_everything_is_as_it_was() -> None:
    script, model = Script(), make_model()
    with only_shared_branch(model, global_weight=0.5) as cores:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        private = private_parameters(model)
        private_steps(model, cores, TEXTS, SETTINGS, private_parameters=private, randomness=script)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert script.log == []


def test_a_wrong_model_is_refused_before_its_steps_can_be_charged() -> None:
    model = make_model()
    with only_shared_branch(model) as cores:
        set_active_branches(model, {"local", "personal"}, layers="shared")
        private = private_parameters(model)
        with pytest.raises(PrivacyError):
            private_steps(model, cores, TEXTS, SETTINGS, private_parameters=private, randomness=Script())


def disturb_private_tensors(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in private_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def test_the_release_does_not_depend_on_any_private_tensor() -> None:
    settings = change(optimizer="adam", learning_rate=0.01)
    clean, disturbed = make_model(), make_model()
    disturb_private_tensors(disturbed)
    for model in (clean, disturbed):
        train(model, TEXTS, settings, SeededTestNoise(4))
    assert np.array_equal(read_shared(clean), read_shared(disturbed))
    assert np.abs(read_shared(clean)).min() > 0


@pytest.mark.parametrize("active", [{"local", "personal"}, {"local", "global", "personal"}])
def test_without_the_guard_a_personal_branch_would_reach_the_release(active: set[str]) -> None:
    """The negative of the test above: the same run with the branch left in, its tensors not declared."""
    clean, disturbed = make_model(), make_model()
    disturb_private_tensors(disturbed)
    for model in (clean, disturbed):
        train(model, TEXTS, SETTINGS, SeededTestNoise(4), active=active)
    assert not np.array_equal(read_shared(clean), read_shared(disturbed))


def test_only_the_cores_change_and_counts_are_told() -> None:
    model, seen = make_model().eval(), list[tuple[int, int]]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    told = {"progress": lambda step, steps: seen.append((step, steps))}
    counts = train(model, TEXTS, change(max_grad_norm=1e-3), SeededTestNoise(0), **told)
    assert counts.clipped == counts.rows > 0
    assert (counts.rejected, counts.units.size, repr(counts)) == (0, 0, "ClippedSum()"), "counts are private"
    assert seen == [(1, 2), (2, 2)]
    assert not any(module.training for module in model.modules())
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("colora_core_local" in name for name in changed)
    assert len(changed) == 2 * len(adapted_layers(model, "shared"))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_repeatable_by_seed_and_never_twice_alike_in_real_runs() -> None:
    noises = (SeededTestNoise(1), SeededTestNoise(1), SeededTestNoise(2), SecureNoise(), SecureNoise())
    found = [released(TEXTS, SETTINGS, noise).tobytes() for noise in noises]
    assert found[0] == found[1]
    assert len(set(found)) == 4


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_broken_example_moves_the_release_by_no_more_than_the_bound(value: float) -> None:
    broken = len(TEXTS[2].input_ids)

    def losses(model: nn.Module, batch: Batch) -> torch.Tensor:
        scale = torch.where(batch["attention_mask"].sum(1) == broken, value, 1.0)
        return example_losses(model, batch) * scale

    model = make_model()
    settings = change(steps=1, sampling_rate=1.0)
    report = train(model, TEXTS, settings, SeededTestNoise(5), losses=losses)
    without_it = released(TEXTS[:2] + TEXTS[3:], settings, SeededTestNoise(5), losses=losses)
    moved = np.linalg.norm(read_shared(model).astype(float) - without_it)
    assert np.isfinite(read_shared(model)).all()
    assert moved <= 0.05 / 7 * (1 + 1e-4)
    assert report.rejected == (0 if math.isfinite(value) else 1)


def test_bfloat16_products_release_float32_of_the_same_size() -> None:
    settings = change(noise_multiplier=1e-6, sampling_rate=1.0)
    wide, narrow = (
        released(TEXTS, change(settings, bf16=bf16), SeededTestNoise(0)) for bf16 in (False, True)
    )
    assert narrow.dtype == np.float32
    assert 0 < np.linalg.norm(wide - narrow) / np.linalg.norm(wide) < 0.1


def summed(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, examples: list[EncodedExample], **values: Any
) -> list[int]:
    """The sum of one step over all examples, before noise, in units of C / 2²⁴."""
    seen: list[ClippedSum] = []

    def watch(total: ClippedSum, *others: object) -> torch.Tensor:
        seen.append(total)
        return noisy_sum(total, *others)  # type: ignore[arg-type]  # as they come

    monkeypatch.setattr("fedmosaic.client.dp.training.noisy_sum", watch)
    train(model, examples, change(steps=1, sampling_rate=1.0, max_grad_norm=1e-2, **values), Script())
    (total,) = seen
    return [int(unit) for unit in total.units]


def neighbours(count: int) -> tuple[list[EncodedExample], EncodedExample]:
    """Copies of one text, and one longer text to add: in padded batches it would turn all the copies."""
    long = torch.arange(16)
    return [TEXTS[1]] * count, EncodedExample("long", long, torch.where(long < 14, IGNORED, long))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("bound", [0.3, 1.0, 4.0])
def test_one_example_moves_the_sum_by_no_more_than_the_clipping_norm(
    monkeypatch: pytest.MonkeyPatch, bf16: bool, bound: float
) -> None:
    """Exactly, on the integer grid, with a received branch up to the bound of what can be received."""
    copies, added = neighbours(7)
    sums = []
    for examples in ([*copies, added], copies, [added]):
        model = make_model()
        receive(model, bound)
        sums.append(summed(monkeypatch, model, examples, bf16=bf16))
    both, without, alone = sums
    moved = [one - other for one, other in zip(both, without, strict=True)]
    assert moved == alone
    assert 0 < sum(unit**2 for unit in moved) <= GRID**2


def test_dropout_does_not_act_and_nothing_is_drawn_from_the_generator_of_torch() -> None:
    """Its stream is one for all examples, so that one more would give all the others another mask."""
    quiet, noisy = make_model(), make_model()
    for module in noisy.modules():
        if isinstance(module, LlamaAttention):
            module.attention_dropout = 0.5
    noisy.train()
    state = torch.get_rng_state()
    for model in (quiet, noisy):
        train(model, TEXTS, SETTINGS, SeededTestNoise(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(read_shared(quiet), read_shared(noisy))
    assert noisy.training


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38, 4.0])
def test_what_was_received_cannot_end_the_training(value: float) -> None:
    model, script = make_model(), Script(level=0.1)
    receive(model, value)
    report = train(model, TEXTS, SETTINGS, script)
    honest = Script(level=0.1)
    released(TEXTS, SETTINGS, honest)
    assert script.log == honest.log
    assert np.isfinite(read_shared(model)).all()
    assert report.rejected == (0 if value == 4.0 else report.rows)


def test_settings_without_a_guarantee_and_no_example_are_refused() -> None:
    refused: dict[str, list[Any]] = {
        "noise_multiplier": [0.0, math.nan, math.inf],
        "sampling_rate": [0.0, 1.5],
        "max_grad_norm": [0.0, math.inf],
        "expected_batch_size": [0],
        "steps": [0],
        "batch_size": [8],
    }
    for name, values in refused.items():
        for value in values:
            with pytest.raises(ValidationError):
                change(**{name: value})
    with pytest.raises(ConfigurationError, match="no example"):
        train(make_model(), [])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_search_finds_no_received_branch_by_which_one_example_moves_the_others(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Hill climbing over what is received. In padded batches some of thirty candidates pass C."""
    copies, added = neighbours(31)
    model = make_model()
    generator = np.random.default_rng(seed)

    def sensitivity(received: np.ndarray) -> int:
        """The squared distance of the two sums, in units of the grid."""
        sums = []
        for examples in ([*copies, added], copies):
            write_shared(model, np.zeros_like(received), "local")
            write_shared(model, received, "global")
            sums.append(summed(monkeypatch, model, examples))
        return sum((one - other) ** 2 for one, other in zip(*sums, strict=True))

    best = (4.0 * generator.choice([-1.0, 1.0], read_shared(model).size)).astype(np.float32)
    highest = sensitivity(best)
    for _ in range(30):
        chosen = generator.random(best.size) < generator.choice([0.02, 0.1, 0.5])
        signs = generator.choice([-1.0, 1.0], best.size) * generator.choice([0.1, 0.5, 1.0, 2.0, 4.0])
        step = best + generator.standard_normal(best.size) if generator.random() < 0.5 else signs
        candidate = np.where(chosen, step, best).clip(-4.0, 4.0).astype(np.float32)
        if (found := sensitivity(candidate)) > highest:
            best, highest = candidate, found
        assert found <= GRID**2
    assert highest > 0
