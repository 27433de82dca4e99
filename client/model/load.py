"""Loading of base models and tokenizers, from a local folder or a hub, whole or cut in depth."""

import copy
import importlib.util
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final, cast

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from peft import PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from fedmosaic.client.colora import CoLoraConfig, find_decoder_layers
from fedmosaic.client.colora.state import record_switches
from fedmosaic.client.model.acceptance import FOREIGN_ERRORS, check_language_model
from fedmosaic.client.model.hardware import choose_device, choose_dtype, exact_products
from fedmosaic.client.settings import ModelSettings
from fedmosaic.protos.errors import ModelError

_LOADING_ERRORS = (*FOREIGN_ERRORS, OSError, ImportError, SafetensorError)
"""What transformers and its readers raise for files that they cannot use."""
_LOADING: Final = threading.Lock()
"""transformers changes its classes while it loads a model; two at once would leave them changed."""
_CARD = """# Co-LoRA adapter of a client of fedmosaic

**Keep it inside.** It holds all branches, the personal one and the gate included, which were trained on
private data. `fedmosaic export` writes what can be handed on, with a card that says to whom.

## Loading this adapter

```python
import fedmosaic.client.colora  # registers the method with PEFT
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder", dtype="float32")
```

If the base model was cut in depth, load and cut it first, and give it to `PeftModel.from_pretrained`.
"""
LoadedModel = tuple[PreTrainedModel, PreTrainedTokenizerBase]
"""A base model and its tokenizer."""


def load_model(settings: ModelSettings) -> LoadedModel:
    """Load what the settings name, where and in which type they ask for; see `load_base_model` for errors."""
    device = choose_device(settings.device)
    return load_base_model(
        settings.path,
        choose_dtype(settings.dtype, device),
        gguf_file=settings.gguf_file,
        keep_layers=settings.keep_layers,
        device=device,
        quantization=settings.quantization,
    )


def empty_model(settings: ModelSettings) -> PreTrainedModel:
    """The model that the settings name, with shapes and types but no weights (on the device `meta`).

    Weights are in the type that `load_model` would give them, dense whatever the quantisation.
    """
    options = _options(settings.path, settings.gguf_file)
    try:
        config = AutoConfig.from_pretrained(settings.path, **options)
    except _LOADING_ERRORS as error:
        raise _cannot_load(settings.path, error) from error
    _cut_config(config, settings.keep_layers)
    dtype = choose_dtype(settings.dtype, choose_device(settings.device))
    build: Any = _model_class(config).from_config
    with torch.device("meta"):
        empty: PreTrainedModel = build(config, dtype=dtype)
    return empty


def load_base_model(
    path_or_hub_id: str | Path,
    dtype: torch.dtype | str = torch.float32,
    *,
    gguf_file: str | None = None,
    keep_layers: int | None = None,
    device: torch.device | str = "cpu",
    quantization: str | None = None,
) -> LoadedModel:
    """Load a causal language model, or a LLaVA-style vision-language model, and its tokenizer.

    A folder that exists is read without network. Weights are read from safetensors (or GGUF, dequantised)
    only, never from pickles, and code that comes with a model is never run. Weights go to memory once, in
    `dtype`, or with the quantization nf4 the decoder's in 4 bits, to be used in it; attention is PyTorch's
    fused one (SDPA) where the model has it. `keep_layers` keeps the first n decoder layers, the final norm
    and the head.

    Gives the model in evaluation mode, and the tokenizer with a padding token and right padding. ModelError
    if the model cannot be found or read, lacks weights, is of an unsupported kind, has a tokenizer without an
    end of text, or fails `acceptance.check_language_model`; if `keep_layers` or `dtype` make no sense, or
    bitsandbytes is not installed.
    """
    exact_products()
    source = str(path_or_hub_id)
    place = torch.device(device)
    precision = choose_dtype(dtype, place)
    options = _options(source, gguf_file)
    try:
        config = AutoConfig.from_pretrained(source, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        _cut_config(config, keep_layers)
        with _LOADING, _unused_weights_untold() if keep_layers is not None else nullcontext():
            loaded = _model_class(config).from_pretrained(
                source,
                config=config,
                dtype=precision,
                output_loading_info=True,
                **_weight_options(gguf_file, quantization, precision, place),
                **options,
            )
    except _LOADING_ERRORS as error:
        raise _cannot_load(source, error) from error
    # With output_loading_info a pair comes back, which the annotations of transformers leave out.
    model, report = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    # transformers fills missing weights with random numbers and only logs it.
    if lacking := sorted(report.get("missing_keys", ())):
        raise ModelError(
            f"{source!r} lacks {len(lacking)} weights of {type(model).__name__}, the first is {lacking[0]}. "
            "The files are incomplete or belong to another model."
        )
    find_decoder_layers(model)
    _set_padding(source, model, tokenizer)
    model.train(False)
    if quantization is None:
        cast(nn.Module, model).to(place)
    _keep_way_back(model)
    check_language_model(source, model, tokenizer)
    return model, tokenizer


def accept_model(model: Any, tokenizer: Any) -> LoadedModel:
    """Try a model and tokenizer that a caller in Python has loaded, as `load_base_model` tries what it loads.

    Of the model only the ids for padding are set, if they are not; the tokenizer that is given back is a
    copy.

    Raises:
        ModelError: as `load_base_model`; or the model carries adapters, or is none of transformers.
    """
    if not isinstance(model, PreTrainedModel) or not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(
            f"model is a {type(model).__name__} and tokenizer a {type(tokenizer).__name__}; hand over a "
            "model of transformers, bare, without PEFT around it, and its tokenizer"
        )
    source = model.name_or_path or type(model).__name__
    if getattr(model, "peft_config", None) or any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise ModelError(
            f"the model {source!r} carries adapters already, and training would go through them; load it "
            "anew, or merge_and_unload() them first. A model that took part carries its adapter"
        )
    exact_products()
    _model_class(model.config)
    find_decoder_layers(model)
    own = copy.deepcopy(tokenizer)
    _set_padding(source, model, own)
    _keep_way_back(model)
    check_language_model(source, model, own)
    return model, own


def load_tokenizer(path_or_hub_id: str | Path, *, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer alone, to look at texts before the model itself is loaded."""
    source = str(path_or_hub_id)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **_options(source, gguf_file))
    except _LOADING_ERRORS as error:
        raise _cannot_load(source, error) from error
    _check_end(source, tokenizer)
    return cast(PreTrainedTokenizerBase, tokenizer)


def adapt(model: PreTrainedModel, config: CoLoraConfig) -> PeftModel:
    """Put a fresh Co-LoRA adapter on a base model, which is changed in place, and freeze the rest."""
    if config.task_type is None:
        config.task_type = TaskType.CAUSAL_LM
    with without_rename_notice():
        return get_peft_model(model, config)


@contextmanager
def without_rename_notice() -> Iterator[None]:
    """Keep from users that PEFT reads a property of transformers by its old name.

    They can do nothing about it: 0.21.2 is PEFT's newest version, and every log would begin with the notice.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """Save the adapter and what of it is in the forward pass, in PEFT's form; the folder is made if absent.

    The files hold every branch and the gate: treat them as private unless all was trained privately.
    """
    record_switches(model)
    model.save_pretrained(str(folder))
    # PEFT's own card is empty but for the place of the base model on this machine.
    (Path(folder) / "README.md").write_text(_CARD, encoding="utf-8")


def _options(source: str, gguf_file: str | None) -> dict[str, Any]:
    is_folder = Path(source).is_dir()
    options: dict[str, Any] = {"local_files_only": is_folder, "trust_remote_code": False}
    if gguf_file is not None:
        options["gguf_file"] = gguf_file
        if is_folder and not (Path(source) / gguf_file).is_file():
            raise ModelError(f"There is no file {gguf_file} in {source}.")
    return options


def _weight_options(
    gguf_file: str | None, quantization: str | None, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    if gguf_file is not None:
        # Packed weights would save memory, but a merged adapter needs dense ones.
        return {"quantization_config": GgufConfig(dequantize=True)}
    if quantization is None:
        # Weights go straight to an accelerator, so that the processor's memory never holds them all.
        return {"use_safetensors": True} | ({} if device.type == "cpu" else {"device_map": {"": device}})
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"quantization is {quantization!r}, which needs bitsandbytes; install fedmosaic[quantization], "
            "or leave quantization out"
        )
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"use_safetensors": True, "device_map": {"": device}, "quantization_config": four_bits}


@contextmanager
def _unused_weights_untold() -> Iterator[None]:
    """After a cut the report of unused weights lists every layer that was cut away."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _model_class(config: PretrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """The class to load a configuration's model with; ModelError if it is of an unsupported kind."""
    # Some vision-language configurations are registered as causal language models too, without vision.
    if config.model_type in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return AutoModelForImageTextToText
    if config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForCausalLM
    raise ModelError(
        f"Models of type {config.model_type!r} are neither causal language models nor vision-language "
        "models. Choose one such as Llama, Qwen2, Mistral or LLaVA."
    )


def _cut_config(config: PretrainedConfig, keep_layers: int | None) -> None:
    if keep_layers is None:
        return
    text_config = config.get_text_config()
    depth = text_config.num_hidden_layers
    if not 1 <= keep_layers <= depth:
        raise ModelError(f"keep_layers is {keep_layers}; the model has {depth} layers, choose 1 to {depth}.")
    kinds = getattr(text_config, "layer_types", None)
    text_config.num_hidden_layers = keep_layers
    # Where the kinds follow from the depth and cannot be set, they have followed already.
    if kinds and len(text_config.layer_types) != keep_layers:
        text_config.layer_types = kinds[:keep_layers]


def _cannot_load(source: str, error: Exception) -> ModelError:
    found = ""
    if not Path(source).is_dir():
        try:
            validate_repo_id(source)
        except HFValidationError:
            # A hub answers a path with its rules for names.
            return ModelError(f"There is no folder {source!r}. Give the model's folder, or its id on a hub.")
        found = f" There is no folder of that name in {Path.cwd()}."
    return ModelError(
        f"The model {source!r} cannot be loaded: {type(error).__name__}: {error}.{found} Give a folder with "
        "config.json, safetensors weights and a tokenizer, or a hub id that can be reached from here."
    )


def _check_end(source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if not isinstance(tokenizer.eos_token_id, int):
        raise ModelError(
            f"The tokenizer of {source!r} has no end-of-text token, with which every answer ends; set "
            "eos_token in its tokenizer_config.json, or choose a model that was trained to end its texts."
        )


def _keep_way_back(model: nn.Module) -> None:
    """Let gradients through weights in 4 bits on a processor.

    There bitsandbytes repacks weights when they are first evaluated, for products that have no way back:
    training afterwards would lose, without a word, all gradients through these layers.
    """
    linear: Any
    for linear in model.modules():
        if hasattr(linear, "support_avx512bf16_for_cpu"):
            linear.support_avx512bf16_for_cpu = False


def _set_padding(source: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Have examples padded on the right, with a token that the model embeds; ModelError without an end."""
    _check_end(source, tokenizer)
    rows = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if tokenizer.eos_token_id >= rows:
        raise ModelError(
            f"The end-of-text token of the tokenizer of {source!r} is number {tokenizer.eos_token_id}, the "
            f"model embeds {rows} tokens. Use the tokenizer that belongs to the model."
        )
    # Padding positions are masked in attention and loss, so any token that the model embeds serves.
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
