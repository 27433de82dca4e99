"""Memory of a training step on a large model with random weights, measured and as the preflight says."""

import gc
import os
import threading
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.timing import random_examples
from fedmosaic.client.model.adapted import adapter_config
from fedmosaic.client.model.hardware import choose_device, synchronise
from fedmosaic.client.model.load import adapt, load_model
from fedmosaic.client.model.training import TrainingSettings, train_local
from fedmosaic.client.preflight.memory import memory_need
from fedmosaic.client.settings import ClientSettings, DataSettings, ModelSettings
from fedmosaic.privacy.federation.terms import AdapterTerms

BATCH, TOKENS, ANSWER, STEPS = 4, 512, 64, 4
MIB = 2**20


def write_random_model(folder: Path, *, tiny: bool = False) -> None:
    """Write a model of Llama-3.2-1B's shape with random weights in bfloat16, and a tokenizer of two words."""
    if (folder / "config.json").exists():
        return
    shape = {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "vocab_size": 128256}
    small = {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 256, "vocab_size": 2000}
    config = LlamaConfig(
        **(small if tiny else shape),
        num_attention_heads=8 if tiny else 32,
        num_key_value_heads=4 if tiny else 8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    with torch.device(choose_device("auto")):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    words = {word: index for index, word in enumerate(("<unk>", "<end>", "one", "two"))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))  # noqa: S106  # a word
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",  # noqa: S106  # a word
        eos_token="<end>",  # noqa: S106  # a word
    ).save_pretrained(folder)


def measure(
    folder: Path, dtype: str, quantization: str | None, checkpoint: bool, device_name: str
) -> dict[str, float | str]:
    """Load, adapt and train for a few steps: MiB as the preflight says and as measured, and ms of a step."""
    device = choose_device(device_name)
    path = str(folder)
    model_settings = ModelSettings(path=path, dtype=dtype, device=device_name, quantization=quantization)
    training = TrainingSettings(
        steps=STEPS, per_device_train_batch_size=BATCH, max_length=TOKENS, gradient_checkpointing=checkpoint
    )
    started = time.perf_counter()
    need = memory_need(_client(folder, model_settings, training), AdapterTerms(), supervised=ANSWER)
    preflight_s = time.perf_counter() - started
    _forget(device)
    at_first = _used(device)
    model = adapt(load_model(model_settings)[0], adapter_config(model_settings, AdapterTerms()))
    loaded = _used(device) - at_first
    with _Peak(device) as peak:
        seconds = _train(model, training, device)
    peaked = peak.highest - at_first
    del model
    _forget(device)
    return {
        "loaded_said": round((need.weights + need.adapter) / MIB),
        "loaded_MiB": round(loaded / MIB),
        "step_said": round(need.training / MIB),
        "step_MiB": round((peaked - loaded) / MIB),
        "peak_said": round((need.weights + need.adapter + need.training) / MIB),
        "peak_MiB": round(peaked / MIB),
        "step_ms": round(1e3 * seconds, 1),
        "preflight_s": round(preflight_s, 1),
    }


def _train(model: torch.nn.Module, training: TrainingSettings, device: torch.device) -> float:
    """Seconds of the last step."""
    examples = random_examples(1000, 2 * BATCH, TOKENS, ANSWER)
    times: list[float] = []

    def tick(*_: object) -> None:
        synchronise(device)
        times.append(time.perf_counter())

    train_local(model, examples, training, pad_token_id=0, progress=tick)
    return times[-1] - times[-2]


def _client(folder: Path, model: ModelSettings, training: TrainingSettings) -> ClientSettings:
    # The probe on the processor: what is compared is the training step.
    return ClientSettings(
        kit=folder,
        server="localhost:1",
        state_dir=folder,
        model=model,
        probe=ModelSettings(path=str(folder), device="cpu"),
        data=DataSettings(train=folder),
        training=training,
    )


class _Peak:
    """The most memory in use while the body runs: PyTorch's own count, or this process's on a processor."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stop = threading.Event()
        self.highest = 0

    def __enter__(self) -> "_Peak":
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.highest = max(self.highest, _used(self._device))

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.highest = torch.cuda.max_memory_allocated(self._device)
        else:
            self._stop.set()
            self._watcher.join()


def _used(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    return resident * os.sysconf("SC_PAGE_SIZE")


def _forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
