"""Tiny random models and texts for unit tests."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from devices import here
from fedmosaic.client.colora import CoLoraConfig
from fedmosaic.client.model.examples import IGNORED, EncodedExample

VOCABULARY = 61


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
    return here(LlamaForCausalLM(LlamaConfig(**(fields | changes))).to(dtype))


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
    raw = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token=special["unk_token"]))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def tiny_colora(
    dtype: torch.dtype = torch.float32, options: dict[str, Any] | None = None, **changes: Any
) -> nn.Module:
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
