"""Memory and time of a training step on a large model: as measured, and as the client says beforehand.

    python -m benchmarks.gpu [--layers 4 --width 256 --vocabulary 1000]

A model of 1.2 billion random weights (the shape of Llama-3.2-1B) in bfloat16, NF4 and float32, with and
without checkpointing, each in a process of its own: one that fails costs its own row. On an accelerator
memory is what PyTorch counts, on a processor what is resident. `make bench-gpu` runs `benchmarks.steps` and
the demo beside it.
"""

import platform
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import tyro
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.timing import in_own_process, random_examples, resident_mib
from fedmosaic.client.model.adapted import adapter_config
from fedmosaic.client.model.hardware import choose_device, choose_dtype, synchronise
from fedmosaic.client.model.load import adapt, load_model
from fedmosaic.client.model.training import TrainingSettings, train_local
from fedmosaic.client.preflight.memory import memory_need
from fedmosaic.client.settings import ClientSettings, DataSettings, ModelSettings
from fedmosaic.experiments.scenario.metrics import markdown_table
from fedmosaic.privacy.federation.terms import AdapterTerms

BATCH, TOKENS, ANSWER, STEPS = 4, 512, 64, 4
"""Of the step whose memory is measured."""
MIB = 2**20


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    work: Path = Path("runs/gpu")
    """Folder for the model."""
    device: str = "auto"
    layers: int = 16
    width: int = 2048
    vocabulary: int = 128_256
    batch: int = BATCH
    """Examples of a step."""


def write_random_model(arguments: Arguments) -> Path:
    """Write a model with random weights in bfloat16, and a tokenizer of some words; returns its folder."""
    folder = arguments.work / f"random-{arguments.layers}-{arguments.width}-{arguments.vocabulary}"
    if (folder / "tokenizer.json").exists():
        return folder
    heads = max(4, arguments.width // 64)
    config = LlamaConfig(
        hidden_size=arguments.width,
        num_hidden_layers=arguments.layers,
        vocab_size=arguments.vocabulary,
        intermediate_size=4 * arguments.width,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    with choose_device(arguments.device):
        model: Any = LlamaForCausalLM(config)
        model.to(torch.bfloat16).save_pretrained(folder)
    special = {"unk_token": "<unk>", "eos_token": "<end>"}
    names = (*special.values(), *(f"w{number}" for number in range(500)))
    words = {word: index for index, word in enumerate(names)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))  # noqa: S106  # a word
    tokenizer.pre_tokenizer = Whitespace()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def measure(
    arguments: Arguments, folder: Path, dtype: str, quantization: str | None, checkpoint: bool
) -> list[str]:
    """Train for a few steps: MiB said and measured, of weights, step and both, and ms of a step."""
    device = choose_device(arguments.device)
    settings = ModelSettings(path=str(folder), dtype=dtype, device=device.type, quantization=quantization)
    training = TrainingSettings(
        steps=STEPS,
        per_device_train_batch_size=arguments.batch,
        max_length=TOKENS,
        gradient_checkpointing=checkpoint,
    )
    # The probe on the processor: what is compared is the training step.
    client = ClientSettings(
        kit=folder,
        server="localhost:1",
        state_dir=folder,
        model=settings,
        probe=ModelSettings(path=str(folder), device="cpu"),
        data=DataSettings(train=folder),
        training=training,
    )
    need = memory_need(client, AdapterTerms(), supervised=ANSWER)
    on_card = device.type == "cuda"
    at_first = torch.cuda.memory_allocated() / MIB if on_card else resident_mib("VmRSS")
    model = adapt(load_model(settings)[0], adapter_config(settings, AdapterTerms()))
    loaded = (torch.cuda.memory_allocated() / MIB if on_card else resident_mib("VmRSS")) - at_first
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    times: list[float] = []

    def tick(*_: object) -> None:
        synchronise(device)
        times.append(time.perf_counter())

    examples = random_examples(min(1000, arguments.vocabulary), 2 * arguments.batch, TOKENS, ANSWER)
    train_local(model, examples, training, pad_token_id=0, progress=tick)
    peak = (torch.cuda.max_memory_allocated() / MIB if on_card else resident_mib("VmHWM")) - at_first
    weights, step = (need.weights + need.adapter) / MIB, need.training / MIB
    pairs = ((weights, loaded), (step, peak - loaded), (weights + step, peak))
    name = f"{quantization or dtype}{' checkpointed' if checkpoint else ''}"
    return [
        name,
        *(f"{said:,.0f} / {found:,.0f}" for said, found in pairs),
        f"{1e3 * (times[-1] - times[-2]):.0f}",
    ]


def main() -> None:
    """Say on what, and print a row for each format."""
    arguments = tyro.cli(Arguments, description=__doc__)
    device = choose_device(arguments.device)
    print(
        torch.cuda.get_device_name(device) if device.type == "cuda" else device, choose_dtype("auto", device)
    )
    print("python", platform.python_version())
    for package in ("torch", "transformers", "peft", "opacus", "bitsandbytes"):
        with suppress(PackageNotFoundError):
            print(package, version(package))
    folder, rows = in_own_process(write_random_model, arguments), list[list[str]]()
    for dtype, quantization in (("bfloat16", None), ("bfloat16", "nf4"), ("float32", None)):
        for checkpoint in (False, True):
            try:
                row = in_own_process(measure, arguments, folder, dtype, quantization, checkpoint)
            except Exception as error:  # one format that fails must not cost the others
                row = [f"{quantization or dtype}: {type(error).__name__}: {error}"[:300]]
            rows.append(row)
    print(
        "\n".join(markdown_table(["weights", "weights, MiB", "step, MiB", "peak, MiB", "ms per step"], rows))
    )


if __name__ == "__main__":
    main()
