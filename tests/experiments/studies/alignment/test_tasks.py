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
    write_shallow_models,
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
    public = (tmp_path / "a" / "general.txt").read_text().splitlines()
    assert len(public) == 300
    for name in ("clinc", "intents", "actions", "agnews", "sst2", "dbpedia", "things", "banking"):
        parts = [read_examples(tmp_path / "a" / f"{name}.{part}.jsonl") for part in ("train", "test")]
        second = (tmp_path / "b" / f"{name}.test.jsonl").read_bytes()
        assert (tmp_path / "a" / f"{name}.test.jsonl").read_bytes() == second
        for examples, rows in zip(parts, (40, 16), strict=True):
            answers = [example.answer for example in examples]
            each = rows // len(examples[0].choices)
            assert [answers.count(choice) for choice in examples[0].choices] == [each] * (rows // each)
        prompts = {example.prompt for examples in parts for example in examples}
        assert len(prompts) == 56
        assert not any(text in prompt for prompt in prompts for text in public if len(text) > 20)
        # The same task, with letters that mean nothing before training.
        letters = read_examples(tmp_path / "a" / f"{name}-letters.test.jsonl")
        spoken = {
            e.choices[e.choices.index(e.answer)]: o.answer for e, o in zip(parts[1], letters, strict=True)
        }
        assert sorted(spoken.values()) == list("ABCD"[: len(spoken)])


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


def test_shallow_copies_keep_the_first_layers_and_load(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "general.txt").write_text("yes no yes no yes no yes no yes\nno yes no yes no yes no yes no\n")
    large = tmp_path / "large"
    write_shallow_models(tiny_folder / "large", (1, 2), tmp_path / "general.txt", large, turned=True)
    whole, _ = load_base_model(tiny_folder / "large")
    for depth in (1, 2):
        shallow, tokenizer = load_base_model(tmp_path / f"large-{depth}")
        layers = find_decoder_layers(shallow)[1]
        assert len(layers) == depth
        for left, right in zip(layers, find_decoder_layers(whole)[1], strict=False):
            for name, tensor in left.state_dict().items():
                torch.testing.assert_close(tensor, right.state_dict()[name])
        assert tokenizer.eos_token == "</s>"  # noqa: S105  # no password
        # The same function in coordinates that have nothing in common with the first.
        turned, _ = load_base_model(tmp_path / f"large-{depth}-turned")
        tokens = torch.arange(3, 11)[None]
        with torch.no_grad():
            one, other = (m(tokens, output_hidden_states=True) for m in (shallow, turned))
        torch.testing.assert_close(other.logits, one.logits, rtol=1e-3, atol=1e-4)
        for left, right in zip(one.hidden_states[:-1], other.hidden_states[:-1], strict=True):
            assert float((left - right).norm()) > 0.5 * float(left.norm())
