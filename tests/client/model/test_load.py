"""Loading of base models."""

import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from waiting import at_once

from fedmosaic.client.colora import CoLoraConfig, find_decoder_layers, read_shared
from fedmosaic.client.model.load import adapt, load_base_model, save_adapter
from fedmosaic.protos.errors import ModelError
from tiny import tiny_decoder, tiny_llava, word_tokenizer

EOS = {"eos_token": "</s>"}


def save_tokenizer(folder: Path, special: dict[str, str] | None = None, *, tokens: int = 30) -> None:
    words = ["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(3, tokens))]
    word_tokenizer(words, **(special or {})).save_pretrained(folder)


def save_letters(folder: Path) -> None:
    """For models whose type gives them a byte-level tokenizer, whatever the file says that there is."""
    vocabulary = {"</s>": 0, **{letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz", 1)}}
    letters = Tokenizer(BPE(vocabulary, []))
    PreTrainedTokenizerFast(tokenizer_object=letters, **EOS).save_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_decoder(depth=4, pad_token_id=None).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, EOS)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, "bfloat16"])
def test_a_folder_is_loaded_as_it_was_saved(folder: Path, dtype: torch.dtype | str) -> None:
    model, tokenizer = load_base_model(folder, dtype)
    expected = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    saved = load_file(folder / "model.safetensors")
    assert {p.dtype for p in model.parameters()} == {expected}
    for name, tensor in saved.items():
        assert torch.equal(model.get_parameter(name), tensor.to(expected))
    assert not model.training
    assert tokenizer("w5 w6")["input_ids"] == [5, 6]


def test_models_are_loaded_one_after_the_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loading: list[Path] = []
    most: list[int] = []
    real = AutoModelForCausalLM.from_pretrained

    def watched(*arguments: Any, **options: Any) -> Any:
        loading.append(folder)
        most.append(len(loading))
        found = real(*arguments, **options)
        loading.pop()
        return found

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    at_once(load_base_model, [folder] * 3)
    assert max(most) == 1


def test_a_missing_padding_token_is_set_and_padding_is_on_the_right(folder: Path) -> None:
    model, tokenizer = load_base_model(folder)
    assert tokenizer.pad_token == "</s>"  # noqa: S105  # a token of text
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 1
    batch = tokenizer(["w5 w6 w7", "w5"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_an_existing_padding_token_is_kept(folder: Path) -> None:
    save_tokenizer(folder, {**EOS, "pad_token": "<s>"})
    model, tokenizer = load_base_model(folder)
    assert (tokenizer.pad_token, model.config.pad_token_id) == ("<s>", 0)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("keep", [1, 3, 4])
def test_keep_layers_keeps_the_first_and_is_usable(tmp_path: Path, kind: str, keep: int) -> None:
    whole = tiny_decoder(kind, depth=4)
    whole.save_pretrained(tmp_path)
    if kind == "llama":
        save_tokenizer(tmp_path, EOS)
    else:
        save_letters(tmp_path)
    model, _ = load_base_model(tmp_path, keep_layers=keep)
    assert len(find_decoder_layers(model)[1]) == model.config.num_hidden_layers == keep
    whole.model.layers = whole.model.layers[:keep]
    ids = torch.arange(6)[None]
    torch.testing.assert_close(model(ids).logits, whole(ids, use_cache=False).logits)
    written = model.generate(ids, max_new_tokens=2, do_sample=False)  # type: ignore[operator]  # a mixin's
    assert written.shape == (1, 8)


def test_cutting_layers_does_not_report_the_cut_ones(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    transformers_logger = logging.getLogger("transformers")
    before = transformers_logger.level
    transformers_logger.addHandler(caplog.handler)
    try:
        load_base_model(folder, keep_layers=2)
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert "UNEXPECTED" not in caplog.text
    assert transformers_logger.level == before


@pytest.mark.parametrize("keep", [0, -1, 5])
def test_keep_layers_outside_the_model_is_refused(folder: Path, keep: int) -> None:
    with pytest.raises(ModelError, match="choose 1 to 4"):
        load_base_model(folder, keep_layers=keep)


def test_a_llava_model_is_loaded_with_its_vision_tower_and_cut_in_its_language_part(tmp_path: Path) -> None:
    tiny_llava(tiny_decoder(depth=4).config, 2, image_token_index=31).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, EOS)
    model, _ = load_base_model(tmp_path, keep_layers=2)
    assert isinstance(model, LlavaForConditionalGeneration)
    name, layers = find_decoder_layers(model)
    assert ("language_model" in name, len(layers)) == (True, 2)
    adapted = adapt(model, CoLoraConfig(r=2, blocks=2))
    assert read_shared(adapted).shape == (2 * 7 * 6,)


def remove_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def damage_the_weights(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def make_it_an_encoder(folder: Path) -> None:
    BertModel(
        BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "vit"
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("message", "damage"),
    [
        (r"lacks 1 weights.*layers\.2\.mlp\.up_proj", remove_a_weight),
        ("cannot be loaded", damage_the_weights),
        ("safetensors", lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin")),
        ("neither causal language models", make_it_an_encoder),
        ("cannot be loaded", lambda f: [file.unlink() for file in f.glob("tokenizer*")]),
        ("no end-of-text token", save_tokenizer),
        ("no end-of-text token", lambda f: save_tokenizer(f, {"pad_token": "<s>"})),
        ("is number 69, the model embeds 64", lambda f: save_tokenizer(f, {"eos_token": "w69"}, tokens=70)),
        ("cannot be loaded", lambda f: (f / "config.json").write_text("{")),
    ],
)
def test_a_broken_model_is_refused(folder: Path, message: str, damage: Callable[[Path], object]) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=message):
        load_base_model(folder)


def test_what_cannot_be_found_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"'no/such-model' cannot be loaded"):
        load_base_model("no/such-model")
    for mistyped in ("./no-such-model", "models/of/mine", str(folder / "typo")):
        with pytest.raises(ModelError, match=f"There is no folder '{mistyped}'"):
            load_base_model(mistyped)
    with pytest.raises(ModelError, match=r"no file model\.gguf"):
        load_base_model(folder, gguf_file="model.gguf")
    with pytest.raises(ModelError, match="choose one of float32, bfloat16, float16 or auto"):
        load_base_model(folder, "int8")
    with pytest.raises(ModelError, match="choose one of float32, bfloat16, float16 or auto"):
        load_base_model(folder, torch.int32)


def test_adapt_freezes_the_base_and_fills_in_the_task_without_a_warning(folder: Path) -> None:
    model, _ = load_base_model(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted = adapt(model, CoLoraConfig(r=2, blocks=2))
    assert all("colora_" in name for name, p in adapted.named_parameters() if p.requires_grad)
    assert adapted.peft_config["default"].task_type == "CAUSAL_LM"


def test_a_saved_adapter_says_once_how_to_load_it(folder: Path, tmp_path: Path) -> None:
    adapted = adapt(load_base_model(folder)[0], CoLoraConfig(r=2, blocks=2))
    for _ in range(2):
        save_adapter(adapted, tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert card.count("## Loading this adapter") == 1
    assert "import fedmosaic.client.colora" in card


@pytest.mark.slow
def test_the_recipe_of_the_card_works_in_a_fresh_process(folder: Path, tmp_path: Path) -> None:
    save_adapter(adapt(load_base_model(folder)[0], CoLoraConfig(r=2, blocks=2)), tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    recipe = card.split("## Loading this adapter")[1].split("```python")[1].split("```")[0]
    recipe = recipe.replace("path/to/this/folder", str(tmp_path / "adapter"))
    run = subprocess.run([sys.executable, "-c", recipe], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
