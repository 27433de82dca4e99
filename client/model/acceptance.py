"""What a foreign model and its tokenizer must do before anything is trained, scored or probed with them.

Every model comes from somewhere else, so its properties are tried and not assumed, at load, on public tokens:
a refusal then says nothing about the data and costs neither a round nor budget. Two prompts stay two prompts;
no logit depends on a later token; every adapted module is called and its trained part has a gradient; what is
read and written fits the model's positions; every token has a row of the embedding.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedmosaic.client.colora.layer import CoLoraLayer
from fedmosaic.client.model.examples import IGNORED, answer_tokens, prompt_tokens
from fedmosaic.client.model.loss import (
    base_model,
    cut_at,
    example_losses,
    logits_at,
    on_device_of,
    training_mode,
)
from fedmosaic.protos.errors import ConfigurationError, ModelError

_TOKENS: Final = 24
"""Public tokens of one sequence; the first third is what later tokens must not change."""
_LEAK: Final = {"float32": 1e-4, "narrow": 0.05}
"""Most change of earlier logits by later tokens, relative to what those change at their own positions.

Measured on tiny random models: causal ones give 0, with experts up to 8e-7; ones that see later tokens 3e-3
at least. Narrow types round experts' products differently with the batch, so there the gradient has to
tell."""
_GRADIENT_LEAK: Final = 1e-6
"""Most gradient of earlier logits with respect to later tokens, relative to earlier ones: 0 if causal."""
_WORDS_TRIED: Final = 400
FOREIGN_ERRORS: Final = (
    RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError
)  # fmt: skip
"""What the code of a model raises when it is called in a way that it does not expect."""


def check_language_model(source: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """ModelError for a `source` that loses prompts, gives no finite logits on tokens, or sees later ones."""
    _check_prompts(source, tokenizer)
    first, second = _public_ids(model, tokenizer)
    # Equal in their first third and different after it.
    second[: max(1, len(first) // 3)] = first[: max(1, len(first) // 3)]
    kept = int((first == second).long().cumprod(0).sum())
    with training_mode(model, False), _refusing(source, "read public tokens"):
        with torch.no_grad():
            one, other = (_logits(model, ids, len(ids)).cpu() for ids in (first, second))
        reach = _gradient_reach(model, first, kept)
    if not bool(torch.isfinite(one).all() and torch.isfinite(other).all()):
        raise ModelError(
            f"the logits of {source!r} are not finite on public tokens: its weights are damaged, or its "
            "dtype is too narrow for it; try dtype 'float32'"
        )
    change = (one - other).abs().amax(dim=-1)
    leak, effect = float(change[:kept].max()), float(change[kept:].max())
    narrow = any(parameter.dtype.itemsize < 4 for parameter in model.parameters())
    if leak > _LEAK["narrow" if narrow else "float32"] * effect or reach > _GRADIENT_LEAK:
        raise ModelError(
            f"{source!r} ({type(model).__name__}) is not causal: its logits depend on later tokens (they "
            f"change by {leak / max(effect, 1e-30):.1g} of what those change at their own positions), so "
            "that it would be trained and scored on answers that it can read. Choose a decoder such as "
            "Llama, Qwen2 or Mistral"
        )


def check_adapter(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model with a fresh Co-LoRA adapter of which a part is never called or moved: ModelError."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, CoLoraLayer)}
    adapter = model.active_adapters[0]  # type: ignore[index]  # PEFT's, which nn.Module hides
    # What is zero in a fresh module has a gradient, P or LoRA's B, while LoRA's A waits for it.
    moved = {
        name: next(tensor for tensor in layer.branch_tensors(str(adapter), "local") if not tensor.any())
        for name, layer in layers.items()
    }
    ids = _public_ids(model, tokenizer)
    answers = torch.arange(ids.shape[1]) >= ids.shape[1] // 2
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.where(answers, IGNORED)}
    device = next(model.parameters()).device
    called: set[str] = set()
    hooks = [layer.register_forward_hook(lambda *_, n=name: called.add(n)) for name, layer in layers.items()]
    try:
        # As it is trained, since some models ask for more there; but this draws nothing that training draws.
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            training_mode(model, True),
            torch.enable_grad(),
            _refusing(type(base_model(model)).__name__, "be trained on public tokens"),
        ):
            loss = example_losses(model, on_device_of(model, batch)).sum()
            found = torch.autograd.grad(loss, list(moved.values()), allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    _check_all_used(set(layers) - called, "is never called: the model reads its weight elsewhere")
    gradients = dict(zip(moved, found, strict=True))
    still = {name for name, g in gradients.items() if g is None or not bool(g.any())}
    _check_all_used(still, "has no gradient, so training would not move it")
    if not all(bool(torch.isfinite(g).all()) for g in found if g is not None):
        raise ModelError(
            "the adapter's gradient is not finite on public tokens: the weights are damaged, or the dtype is "
            "too narrow for this model; try dtype 'float32'"
        )


def context_length(model: nn.Module) -> int | None:
    """Most tokens that a model has positions for, by its configuration; None if that names none."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = getattr(text, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def check_length(model: nn.Module, length: int, setting: str) -> None:
    """Refuse lengths, set in `setting`, that a model has no positions for: ConfigurationError.

    A table of positions ends there; rotary positions go on, into angles that the model never saw in training.
    """
    most = context_length(model)
    if most is not None and length > most:
        raise ConfigurationError(
            f"{setting} is {length}, {type(base_model(model)).__name__} has {most} positions; lower it"
        )


def check_ids(
    model: nn.Module, tokens: Iterable[Sequence[int] | torch.Tensor], what: str, setting: str
) -> None:
    """ModelError for tokens of `what` without a row, where they occur: a tokenizer may know unused ones."""
    find_table: Any = getattr(model, "get_input_embeddings", None)
    table = None if find_table is None else find_table()
    if table is None or getattr(table, "images_above_rows", False):
        return  # a tokenizer of images has looked already: above the rows stand their ids
    for number, ids in enumerate(tokens, start=1):
        if len(ids) and int(torch.as_tensor(ids).max()) >= table.num_embeddings:
            raise ModelError(
                f"{what}, example {number}: its text has a token above the {table.num_embeddings} that the "
                f"model embeds. Its tokenizer knows more tokens than that: name a model and tokenizer that "
                f"belong together in {setting}, or take the text of that token out of the example"
            )


def _check_prompts(source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Two prompts and two answers of the tokenizer's own words must differ as tokens."""
    special = set(tokenizer.all_special_ids)
    ordinary = [i for i in range(len(tokenizer)) if i not in special]
    # Its own: fixed words may be outside a small vocabulary. From the far end: control tokens stand first.
    texts = (str(tokenizer.decode([index])).strip() for index in ordinary[: -_WORDS_TRIED - 1 : -1])
    own = list(dict.fromkeys(text for text in texts if text.isalnum()))
    words = own[:2] if len(own) > 1 else ["parcel", "window"]
    for kind, encode in (("prompts", prompt_tokens), ("answers", answer_tokens)):
        first, second = (encode(tokenizer, word) for word in words)
        if first == second:
            raise ModelError(
                f"the tokenizer of {source!r} gives the same tokens for different {kind}, so the model could "
                "not tell them apart; give the tokenizer that belongs to the model"
            )


def _public_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """(2, T) ordinary tokens of a fixed seed: no special ones, which may stand for images or end a text."""
    table: Any = model.get_input_embeddings()  # type: ignore[operator]  # nn.Module hides it
    config: Any = getattr(model, "config", None)
    fields = vars(config) if config is not None else {}
    # Ids that a vision-language model's configuration keeps for images, sound and video.
    kept = {name for name in fields if name.endswith(("_token_id", "_token_index"))}
    special = set(tokenizer.all_special_ids) | {fields[n] for n in kept if isinstance(fields[n], int)}
    rows = min(int(table.num_embeddings), max(1, len(tokenizer)))
    ordinary = torch.tensor([i for i in range(rows) if i not in special] or list(range(rows)))
    shape = (2, min(_TOKENS, context_length(model) or _TOKENS))
    return ordinary[torch.randint(0, len(ordinary), shape, generator=torch.Generator().manual_seed(0))]


def _logits(model: nn.Module, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Float32 logits (K, V) of the first positions of ids (T,), through the call that training makes."""
    batch = on_device_of(model, {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]})
    positions = torch.arange(count, device=batch["input_ids"].device)
    return logits_at(model, batch, positions)[0].float()


def _gradient_reach(model: nn.Module, ids: torch.Tensor, kept: int) -> float:
    """Largest gradient of `kept` logits by a later token over that by an earlier one; 0 if causal."""
    table: nn.Module = model.get_input_embeddings()  # type: ignore[operator]  # nn.Module hides it
    with cut_at(table) as seen, torch.enable_grad():
        total = _logits(model, ids, kept).logsumexp(dim=-1).sum()
        if not seen or not total.requires_grad:
            return 0.0
        (gradient,) = torch.autograd.grad(total, seen[:1], allow_unused=True)
    if gradient is None:
        return 0.0
    sizes = gradient.float().abs().flatten(0, -2).amax(dim=-1)
    return float(sizes[kept:].max() / sizes[:kept].max().clamp(min=torch.finfo(torch.float32).tiny))


def _check_all_used(unused: set[str], why: str) -> None:
    if unused:
        modules = sorted({name.split(".layers.")[-1].split(".", 1)[-1] for name in unused})
        raise ModelError(
            f"{len(unused)} adapted module(s) of this model take no part, {', '.join(modules[:4])} for one: "
            f"each {why}. They would be shared as if trained; leave them out of adapter.target_modules in "
            "the federation's terms, or choose another model"
        )


@contextmanager
def _refusing(source: str, task: str) -> Iterator[None]:
    """Turn whatever a model's code raises on public tokens into one error that names the model."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except FOREIGN_ERRORS as error:
        raise ModelError(
            f"{source} cannot {task}: {type(error).__name__}: {str(error)[:300]}. Choose a causal language "
            "model, or a vision-language model that also reads text alone"
        ) from error
