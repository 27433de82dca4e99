"""What a run will need is worked out without loading anything, and follows what is really held."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from fedmosaic.client.model.adapted import adapter_config
from fedmosaic.client.model.examples import IGNORED, EncodedExample
from fedmosaic.client.model.load import adapt
from fedmosaic.client.model.training import TrainingSettings, train_local
from fedmosaic.client.preflight import memory
from fedmosaic.client.preflight.memory import MemoryNeed, memory_need
from fedmosaic.client.settings import ClientSettings, DataSettings, ModelSettings
from fedmosaic.privacy.federation.terms import AdapterTerms
from tiny import tiny_decoder

CONFIG = tiny_decoder("llama", 64, 3, vocab_size=300, tie_word_embeddings=True).config
TERMS = AdapterTerms(blocks=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's configuration alone: there are no weights that could be loaded."""
    place = tmp_path_factory.mktemp("model")
    CONFIG.save_pretrained(place)
    (place / "config.json").write_text(
        (place / "config.json").read_text().replace("{", '{"architectures": ["LlamaForCausalLM"],', 1)
    )
    return place


def settings_for(
    folder: Path, *, quantization: str | None = None, dtype: str = "float32", **training: object
) -> ClientSettings:
    probe = ModelSettings(path=str(folder), device="cpu")
    parts = {
        "model": probe.model_copy(update={"dtype": dtype, "quantization": quantization}),
        "data": DataSettings(train=folder),
        "training": TrainingSettings(**{"max_length": 64, "per_device_train_batch_size": 4} | training),
    }
    return ClientSettings(kit=folder, server="localhost:1", state_dir=folder, probe=probe, **parts)


@functools.cache
def need(folder: Path, **changes: Any) -> MemoryNeed:
    return memory_need(settings_for(folder, **changes), TERMS, supervised=8)


def adapted(folder: Path) -> PeftModel:
    config = adapter_config(ModelSettings(path=str(folder)), TERMS)
    assert isinstance(CONFIG, LlamaConfig)
    return adapt(LlamaForCausalLM(CONFIG), config)


def test_weights_and_adapter_are_counted_to_the_byte(folder: Path) -> None:
    model = adapted(folder)
    tensors = {id(t): (name, t) for name, t in [*model.named_parameters(), *model.named_buffers()]}.values()
    found = need(folder)
    assert found.weights == sum(t.nbytes for name, t in tensors if "colora_" not in name)
    assert found.adapter == sum(t.nbytes for name, t in tensors if "colora_" in name)


def test_a_step_is_what_a_real_one_holds(folder: Path) -> None:
    """The same count over a real step of `train_local`, whose batches and gradients are there in truth."""
    model = adapted(folder)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 300, (8, 64), generator=generator)
    labels = torch.where(torch.arange(64) < 56, IGNORED, ids)
    examples = [EncodedExample(str(i), *pair) for i, pair in enumerate(zip(ids, labels, strict=True))]
    settings = TrainingSettings(steps=2, per_device_train_batch_size=4, max_length=64)
    with memory._Meter() as meter:
        train_local(model, examples, settings, pad_token_id=0)
    assert need(folder).training == pytest.approx(meter.peak, rel=0.15)


@pytest.mark.parametrize("changes", [{"max_length": 8}, {"dtype": "bfloat16"}])
def test_what_is_counted_in_a_moment_is_more(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Where twice that is free, nothing else is worked out."""
    monkeypatch.setattr(memory, "_CUDA_CONTEXT", 0)
    settings = settings_for(folder, **changes)
    most = memory.most_bytes(settings, TERMS.rank, settings.training.max_length)
    assert need(folder, **changes).needed < most
    monkeypatch.setattr(memory, "free_memory", lambda _: (2 * most + 1, 2 * most + 1))
    words, fits = memory.check_memory(settings, TERMS)
    assert fits
    assert "below" in words


def test_what_is_said_to_help_does(folder: Path) -> None:
    plain = need(folder)
    assert need(folder, gradient_checkpointing=True).training < 0.7 * plain.training
    assert need(folder, per_device_train_batch_size=1).training < 0.6 * plain.training
    assert need(folder, max_length=32).training < plain.training
    half = need(folder, dtype="bfloat16")
    assert half.weights < 0.6 * plain.weights
    assert need(folder, dtype="bfloat16", quantization="nf4").weights < 0.6 * half.weights


def test_what_does_not_fit_is_said_with_a_remedy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert need(folder).fits
    assert "change" not in need(folder).words()
    monkeypatch.setattr(memory, "free_memory", lambda _: (1 << 16, 1 << 20))
    found = memory_need(settings_for(folder, max_length=8), TERMS)
    assert not found.fits
    for remedy in ("model.dtype = 'bfloat16'", "quantization = 'nf4'", "gradient_checkpointing = true"):
        assert remedy in found.words()
    taken = replace(need(folder, gradient_checkpointing=True), free=0)
    assert "gradient_checkpointing = true" not in taken.words()
