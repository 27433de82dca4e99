"""Memory of a training step on a large model with random weights, measured and as the preflight says."""

import gc
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.timing import random_examples
from fedmosaic.client.model.adapted import adapter_config
from fedmosaic.client.model.load import adapt, load_model
from fedmosaic.client.model.training import TrainingSettings, train_local
from fedmosaic.client.preflight.memory import memory_need
from fedmosaic.client.settings import ClientSettings, DataSettings, ModelSettings
from fedmosaic.privacy.federation.terms import AdapterTerms

BATCH, TOKENS, ANSWER, STEPS = 4, 512, 64, 4
MIB = 2**20


def write_random_model(folder: Path) -> None:
    """Write a model of Llama-3.2-1B's shape with random weights in bfloat16, and a tokenizer of two words."""
    if (folder / "config.json").exists():
        return
    config = LlamaConfig(
        hidden_size=2048, num_hidden_layers=16, intermediate_size=8192, vocab_size=128256,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("cuda"):
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    special = {"unk_token": "<unk>", "eos_token": "<end>"}
    words = {word: index for index, word in enumerate((*special.values(), "one", "two"))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))  # noqa: S106  # a word
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def measure_memory(
    folder: Path, dtype: str, quantization: str | None, checkpoint: bool
) -> dict[str, float | str]:
    """Load, adapt and train for a few steps: MiB as the preflight says and as measured, and ms of a step."""
    settings = ModelSettings(path=str(folder), dtype=dtype, device="cuda", quantization=quantization)
    training = TrainingSettings(
        steps=STEPS, per_device_train_batch_size=BATCH, max_length=TOKENS, gradient_checkpointing=checkpoint
    )
    # The probe on the processor: what is compared is the training step.
    client = ClientSettings(
        kit=folder, server="localhost:1", state_dir=folder, model=settings,
        probe=ModelSettings(path=str(folder), device="cpu"), data=DataSettings(train=folder),
        training=training,
    )  # fmt: skip
    started = time.perf_counter()
    need = memory_need(client, AdapterTerms(), supervised=ANSWER)
    preflight_s = time.perf_counter() - started
    gc.collect()
    torch.cuda.empty_cache()
    at_first = torch.cuda.memory_allocated()
    model = adapt(load_model(settings)[0], adapter_config(settings, AdapterTerms()))
    loaded = torch.cuda.memory_allocated() - at_first
    torch.cuda.reset_peak_memory_stats()
    times: list[float] = []

    def tick(*_: object) -> None:
        torch.cuda.synchronize()
        times.append(time.perf_counter())

    examples = random_examples(1000, 2 * BATCH, TOKENS, ANSWER)
    train_local(model, examples, training, pad_token_id=0, progress=tick)
    peaked = torch.cuda.max_memory_allocated() - at_first
    return {
        "loaded_said": round((need.weights + need.adapter) / MIB),
        "loaded_MiB": round(loaded / MIB),
        "step_said": round(need.training / MIB),
        "step_MiB": round((peaked - loaded) / MIB),
        "peak_said": round((need.weights + need.adapter + need.training) / MIB),
        "peak_MiB": round(peaked / MIB),
        "step_ms": round(1e3 * (times[-1] - times[-2]), 1),
        "preflight_s": round(preflight_s, 1),
    }
