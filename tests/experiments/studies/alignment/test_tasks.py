"""The alignment's data: balanced, disjoint from public text, the same on every run."""

import json
from pathlib import Path

import pytest
import torch

from fedmosaic.client.colora import find_decoder_layers
from fedmosaic.client.model.examples import read_examples
from fedmosaic.client.model.load import load_base_model
from fedmosaic.experiments.studies.alignment.tasks import (
    Arguments,
    write_shallow_model,
    write_story_model,
    write_tasks,
)
from fedmosaic.protos.errors import ConfigurationError

DATA = Path(__file__).parents[4].parent / "shared" / "data"


def test_tasks_are_balanced_and_share_nothing_with_the_public_text(tmp_path: Path) -> None:
    if not DATA.is_dir():
        pytest.skip("needs the data sets beside the repository")
    for out in (tmp_path / "a", tmp_path / "b"):
        write_tasks(Arguments(DATA, out, train_rows=40, test_rows=16, public_rows=300))
    public = {
        json.loads(line)["prompt"] for line in (tmp_path / "a" / "public.jsonl").read_text().splitlines()
    }
    assert len(public) > 250
    plain = [json.loads(line) for line in (tmp_path / "a" / "plain.jsonl").read_text().splitlines()]
    assert all(list(row) == ["text"] for row in plain)
    assert {row["text"].rpartition("\n")[0] for row in plain} == public
    for name in ("sst2", "agnews", "clinc"):
        train, valid, test = (
            read_examples(tmp_path / "a" / f"{name}.{part}.jsonl") for part in ("train", "valid", "test")
        )
        assert (tmp_path / "a" / f"{name}.test.jsonl").read_bytes() == (
            tmp_path / "b" / f"{name}.test.jsonl"
        ).read_bytes()
        for examples, rows in ((train, 40), (valid, 16), (test, 16)):
            answers = [example.answer for example in examples]
            assert len(answers) == rows
            assert {answers.count(choice) for choice in examples[0].choices} == {
                rows // len(examples[0].choices)
            }
        prompts = [{example.prompt for example in examples} for examples in (train, valid, test)]
        assert sum(map(len, prompts)) == len(set.union(*prompts))
        assert not set.union(*prompts) & public


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="missing"):
        write_tasks(Arguments(tmp_path, tmp_path / "out"))


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
