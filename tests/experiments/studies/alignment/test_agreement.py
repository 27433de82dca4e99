"""Agreements of two models: closed forms, derivatives, and a twin that agrees in everything."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from fedmosaic.alignment.__main__ import Arguments as AlignArguments
from fedmosaic.alignment.__main__ import run
from fedmosaic.alignment.evaluate import LoadedModel, find_manifest
from fedmosaic.alignment.moments import MomentSums
from fedmosaic.alignment.settings import AlignmentSettings
from fedmosaic.client.colora import write_shared
from fedmosaic.client.model.examples import read_examples
from fedmosaic.experiments.studies.alignment.agreement import (
    Arguments,
    answer_loss,
    choice_loss,
    compare_all,
    core_gradient,
    cosine,
    latent_agreement,
    print_table,
)
from fedmosaic.protos.errors import ConfigurationError


@pytest.fixture(scope="module")
def twins(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model aligned with itself, whole and cut to one layer less."""
    out = tmp_path_factory.mktemp("twins") / "aligned"
    arguments = AlignArguments(
        anchor=str(tiny_folder / "small"),
        model=(f"twin={tiny_folder / 'small'}",),
        out=out,
        data=tiny_folder / "public.jsonl",
        samples=40,
        settings=AlignmentSettings(rank=3, blocks=2, max_length=16, batch_size=8, output_method="cca"),
    )
    run(arguments, lambda _name: lambda _done, _total: None)
    return out


@pytest.fixture
def arguments(tiny_folder: Path, twins: Path, tmp_path: Path) -> Any:
    def make(**changes: Any) -> Arguments:
        chosen: dict[str, Any] = {
            "bases": (f"ours={twins}",),
            "task": f"words={tiny_folder / 'train-0.jsonl'},{tiny_folder / 'test-0.jsonl'}",
            "pair": ("small", "twin"),
            "examples": 16,
            "steps": 4,
            "learning_rate": 1e-2,
            "max_length": 16,
        }
        return Arguments(**(chosen | changes))

    return make


def test_a_twin_agrees_in_everything_and_random_bases_in_nothing(arguments: Any) -> None:
    (found,) = compare_all(arguments())
    assert found["inputs_random"] == pytest.approx(1.0, abs=0.02)
    assert found["inputs_core"] == pytest.approx(1.0, abs=0.02)
    assert found["size_ratio"] == pytest.approx(1.0, abs=0.02)
    assert min(found["loss_gradient"], found["choice_gradient"]) > 0.95
    assert max(abs(found["loss_unaligned"]), abs(found["choice_unaligned"])) < 0.6
    # A few small steps go down, in the model that took them and in its twin.
    assert found["core_loss"] > 0.2
    with (console := Console(width=100)).capture() as capture:
        print_table([found], console)
    assert "size, ratio" in capture.get()


def test_the_gradient_is_the_slope_of_the_loss(tiny_folder: Path, twins: Path) -> None:
    model = LoadedModel("twin", find_manifest(twins))
    examples = read_examples(tiny_folder / "train-0.jsonl")[:5]
    with model.mounted(twins / "twin") as adapted:
        for objective in (answer_loss, choice_loss):
            write_shared(adapted, np.zeros(2 * 7 * 12, np.float32), "local")
            gradient = core_gradient(model, adapted, examples, objective, 16).flatten()
            direction = (gradient / gradient.norm()).float().numpy()
            values = []
            for sign in (1.0, -1.0):
                write_shared(adapted, (sign * 2e-3 * direction).astype(np.float32), "local")
                with torch.no_grad():
                    values.append(float(objective(model, adapted, examples, 16)) / len(examples))
            assert (values[0] - values[1]) / 4e-3 == pytest.approx(float(gradient.norm()), rel=0.03)


def test_choosing_knows_nothing_of_what_all_choices_share(tiny_folder: Path, twins: Path) -> None:
    model = LoadedModel("twin", find_manifest(twins))
    (example,) = read_examples(tiny_folder / "train-0.jsonl")[:1]
    with model.mounted(twins / "twin") as adapted, torch.no_grad():
        one_loss = float(choice_loss(model, adapted, [example], 16))
        same = type(example)(example.id, example.prompt, "yes", ("yes", "yes"))
        assert float(choice_loss(model, adapted, [same], 16)) == pytest.approx(math.log(2), rel=1e-5)
        losses = {
            choice: float(
                answer_loss(model, adapted, [type(example)("x", example.prompt, choice, example.choices)], 16)
            )
            for choice in example.choices
        }
        total = sum(math.exp(-loss) for loss in losses.values())
        assert one_loss == pytest.approx(losses[example.answer] + math.log(total), rel=1e-4)


@pytest.mark.parametrize("scale", [0.25, 4.0])
def test_latents_of_a_rotated_model_agree_but_for_their_size(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0]
    source = torch.randn(200, 8, generator=generator)
    sums = MomentSums()
    sums.update(source, scale * source @ rotation.float())
    key = (0, "mlp")
    basis = torch.linalg.qr(torch.randn(8, 3, generator=generator, dtype=torch.float64))[0].T
    inputs, b = {key: sums.finish()}, torch.zeros(8, 3)
    core = torch.randn(1, 3, 3, generator=generator)
    correlation, size = latent_agreement(inputs, {key: (basis, b)}, {key: (basis @ rotation, b)}, core)
    assert (correlation, size) == (pytest.approx(1.0, rel=1e-4), pytest.approx(1 / scale, rel=1e-4))
    flipped, _ = latent_agreement(inputs, {key: (basis, b)}, {key: (-basis @ rotation, b)}, core)
    assert flipped == pytest.approx(-1.0, rel=1e-4)
    nothing, _ = latent_agreement(inputs, {key: (basis, b)}, {key: (basis @ rotation, b)}, 0 * core)
    assert nothing == 0.0


def test_cosine() -> None:
    left = torch.tensor([[3.0, 4.0]])
    assert cosine(left, 2 * left) == pytest.approx(1.0)
    assert cosine(left, torch.tensor([[-4.0, 3.0]])) == pytest.approx(0.0)
    assert cosine(left, 0 * left) == 0.0


def test_what_makes_no_sense_is_refused(arguments: Any, tmp_path: Path) -> None:
    for changes, message in (
        ({"examples": 0}, "examples is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"examples": 99}, "the task has 55 examples; give at least 198"),
        ({"bases": (f"x={tmp_path}",)}, "holds no alignment"),
        ({"pair": ("small", "deep")}, "no aligned model 'deep'"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            compare_all(arguments(**changes))


def test_a_file_keeps_figures_and_arguments(
    arguments: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedmosaic.experiments.studies.alignment import agreement as module

    given = arguments(out=tmp_path / "new" / "figures.json")
    monkeypatch.setattr(module.tyro, "cli", lambda *_a, **_k: given)
    assert module.main([]) == 0
    content = json.loads((tmp_path / "new" / "figures.json").read_text())
    assert content["arguments"]["pair"] == ["small", "twin"]
    assert content["agreements"][0]["basis"] == "ours"
