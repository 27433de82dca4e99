"""The comparison of the anchor's bases on a tiny model: what is tuned, what is kept, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fedmosaic.client.colora import find_decoder_layers
from fedmosaic.client.model.load import load_base_model
from fedmosaic.experiments.studies.alignment.basis import Arguments, Run, Study, rows
from fedmosaic.experiments.studies.alignment.tasks import write_shallow_model, write_story_model
from fedmosaic.protos.errors import ConfigurationError


@pytest.fixture
def arguments(tiny_folder: Path, tmp_path: Path) -> Any:
    """Two learning rates and bases on the small model; validation and test are two clients' data."""
    for part, source in (("train", "train-0"), ("valid", "test-0"), ("test", "test-1")):
        (tmp_path / f"words.{part}.jsonl").write_text((tiny_folder / f"{source}.jsonl").read_text())

    def make(**changes: Any) -> Arguments:
        chosen: dict[str, Any] = {
            "model": str(tiny_folder / "small"),
            "public": tiny_folder / "public.jsonl",
            "task": (f"words={tmp_path / 'words'}",),
            "out": tmp_path / "runs.json",
            "bases": ("random", "gradients"),
            "learning_rates": (1e-6, 1e-1),
            "seeds": 2,
            "steps": 8,
            "max_length": 16,
            "rank": 2,
            "blocks": 2,
        }
        return Arguments(**(chosen | changes))

    return make


def test_the_rate_is_chosen_on_the_validation_part_and_work_is_kept(
    arguments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(arguments())
    chosen = study.run(Console(quiet=True))
    # Two rates with the first seed, and the second seed at the better one, for each basis.
    assert len(study.runs) == 2 * 3
    for basis in ("random", "gradients"):
        of_basis = [run for run in study.runs if run.basis == basis]
        best = min((run for run in of_basis if run.seed == 0), key=lambda run: run.valid[0])
        assert {run.learning_rate for run in chosen if run.basis == basis} == {best.learning_rate}
        idle = next(run for run in of_basis if run.learning_rate == 1e-6)
        assert idle.valid[0] > best.valid[0]
    table = list(rows(chosen))
    assert [(row[0], row[1], row[3]) for row in table] == [("words", "random", 2), ("words", "gradients", 2)]
    # At a rate of nearly nothing both bases leave the same model.
    idle_runs = [run for run in study.runs if run.learning_rate == 1e-6]
    assert idle_runs[0].valid[0] == pytest.approx(idle_runs[1].valid[0], rel=1e-3)

    def fail(*_given: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(Study, "_trained", fail)
    assert Study(arguments()).run(Console(quiet=True)) == chosen


def test_runs_of_other_sizes_are_not_mixed(arguments: Any, tmp_path: Path) -> None:
    given = arguments()
    run = Run(task="words", basis="random", learning_rate=0.1, seed=0, valid=(1.0, 0.5), test=(1.0, 0.5))
    content = {
        "arguments": {**given.__dict__, "steps": 9},
        "runs": [run.model_dump(mode="json")],
    }
    (tmp_path / "runs.json").write_text(json.dumps(content, default=str))
    with pytest.raises(ConfigurationError, match="holds runs with steps 9"):
        Study(given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bases": ("odd",)}, "random, weights"),
        ({"learning_rates": ()}, "learning rates"),
        ({"seeds": 0}, "seeds is 0"),
        ({"task": ("words",)}, "NAME=PREFIX"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Study(arguments(**changes))


def test_a_copy_of_a_model_ends_texts_as_it_begins_them(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    write_story_model(model, tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == b"weights"
    settings = json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())
    assert settings == {"bos_token": "<s>", "eos_token": "<s>"}
    assert "</s>" in (model / "tokenizer_config.json").read_text()
    (model / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="begins texts"):
        write_story_model(model, tmp_path / "copy")


def test_a_shallow_copy_keeps_the_first_layers_and_loads(tiny_folder: Path, tmp_path: Path) -> None:
    write_shallow_model(tiny_folder / "large", 2, tiny_folder / "public.jsonl", tmp_path / "first2")
    whole, _ = load_base_model(tiny_folder / "large")
    shallow, tokenizer = load_base_model(tmp_path / "first2")
    layers = find_decoder_layers(shallow)[1]
    assert len(layers) == 2
    for left, right in zip(layers, find_decoder_layers(whole)[1], strict=False):
        for name, tensor in left.state_dict().items():
            torch.testing.assert_close(tensor, right.state_dict()[name])
    assert tokenizer.eos_token == "</s>"  # noqa: S105  # no password
