"""Tiny random models and texts for unit tests."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from devices import CHOSEN, here
from fedmosaic.client.colora import CoLoraConfig
from fedmosaic.client.model.examples import IGNORED, EncodedExample

VOCABULARY = 61
LINEARS = (
    "mlp.down_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "self_attn.k_proj",
    "self_attn.o_proj",
    "self_attn.q_proj",
    "self_attn.v_proj",
)
"""Linear modules of a decoder layer, sorted."""
AnyModel = TypeVar("AnyModel", bound=nn.Module)


def copied(make: Callable[..., AnyModel]) -> Callable[..., AnyModel]:
    """Makes each model once, and hands out copies, which is three times as fast as making it again.

    The generator of random numbers goes on as it does after making it.
    """
    made: dict[str, tuple[AnyModel, torch.Tensor]] = {}

    def copy_of(*arguments: Any, **options: Any) -> AnyModel:
        key = repr((CHOSEN, arguments, options))
        if key not in made:
            made[key] = make(*arguments, **options), torch.get_rng_state()
        model, state = made[key]
        torch.set_rng_state(state)
        return copy.deepcopy(model)

    return copy_of


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    """A Llama of three layers with random weights, on the device under test."""
    torch.manual_seed(seed)
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return here(LlamaForCausalLM(LlamaConfig(**(fields | changes))), dtype)


def save_tiny_model(
    folder: Path,
    words: Sequence[str],
    special: Mapping[str, str],
    *,
    kind: tuple[Any, Any] = (LlamaForCausalLM, LlamaConfig),
    template: str | None = None,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Save a model of random weights and a tokenizer of whole words, the special ones first."""
    torch.manual_seed(seed)
    names = [*special.values(), *words]
    fields: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    fields |= {f"{name}_id": names.index(token) for name, token in special.items() if name != "unk_token"}
    kind[0](kind[1](vocab_size=len(names), **(fields | changes))).save_pretrained(folder)
    raw = Tokenizer(WordLevel({n: i for i, n in enumerate(names)}, unk_token=special["unk_token"]))
    raw.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def tiny_decoder(kind: str = "llama", hidden: int = 32, depth: int = 3, **changes: Any) -> PreTrainedModel:
    """A decoder of this architecture with random weights and 64 tokens."""
    torch.manual_seed(7)
    fields = {
        "vocab_size": 64,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        **changes,
    }
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))
    model.eval()
    return model


def tiny_llava(
    text: PreTrainedConfig, vision_depth: int = 3, **changes: Any
) -> LlavaForConditionalGeneration:
    """A vision-language model of images of four places, around this language part."""
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=vision_depth,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, **changes))


def word_tokenizer(words: Sequence[str], **special: str) -> PreTrainedTokenizerFast:
    """One token a word, in this order, `<unk>` among them."""
    unknown = {"unk_token": "<unk>"}
    raw = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, **unknown))
    raw.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, **unknown, **special)


@copied
def tiny_colora(
    dtype: torch.dtype = torch.float32, options: dict[str, Any] | None = None, **changes: Any
) -> PeftModel:
    """A `tiny_llama` with Co-LoRA of rank 4 in two blocks, and a personal branch."""
    model = tiny_llama(dtype=dtype, **changes)
    fields: dict[str, Any] = {"r": 4, "alpha": 8, "blocks": 2, "personal_branch": True}
    return get_peft_model(model, CoLoraConfig(**(fields | {"task_type": "CAUSAL_LM"} | (options or {}))))


def random_texts(lengths: Sequence[int], seed: int = 1, answer: int = 2) -> list[EncodedExample]:
    """Random tokens, the last `answer` of each text supervised."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index, length in enumerate(lengths):
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        labels[: max(1, length - answer)] = IGNORED
        examples.append(EncodedExample(str(index), ids, labels))
    return examples


class Colours(nn.Module):
    """An encoder of images that tells colours apart, which one with random weights hardly does."""

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        mixing = torch.randn(1280, 3, generator=torch.Generator().manual_seed(0))
        return torch.einsum("fc,bchw->bfhw", mixing, nn.functional.avg_pool2d(pixels_BCHW, 32))


def last_adapters(directory: Path) -> dict[str, np.ndarray]:
    """The last adapter of every client of a run in one process, as saved."""
    found = {}
    for place in sorted((directory / "federation" / "clients").iterdir()):
        (last,) = (place / "state" / "adapter").iterdir()
        tensors = load_file(last / "adapter_model.safetensors")
        found[place.name] = np.concatenate([tensors[name].reshape(-1) for name in sorted(tensors)])
    return found
