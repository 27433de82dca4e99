"""What a foreign model and its tokenizer must do before anything is trained, scored or probed with them.

Every model comes from somewhere else, so its properties are tried and not assumed, at load, on public tokens:
a refusal then says nothing about the data and costs neither a round nor budget.

    prompts    two prompts stay two prompts, as text through the chat template and as tokens
    causal     no logit depends on a later token, or the model reads the answer that it is to predict
    adapted    every adapted module is called, and its trained part has a gradient
    lengths    what is read and written fits the model's positions
    ids        every token has a row of the embedding
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedmosaic.client.colora import CoLoraLinear
from fedmosaic.client.colora.layer import CoLoraLayer
from fedmosaic.client.colora.linear import BranchedLoraLinear
from fedmosaic.client.model.examples import IGNORED, EncodedExample, answer_tokens, prompt_tokens
from fedmosaic.client.model.loss import example_losses, logits_at, on_device_of, training_mode
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

_FOREIGN_ERRORS: Final = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
)
"""What the code of a model raises when it is called in a way that it does not expect."""


def check_language_model(source: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model that cannot learn an answer from a prompt.

    Args:
        source: Folder or hub id, for messages.
        model: Language model, in evaluation mode.
        tokenizer: Its tokenizer.

    Raises:
        ModelError: Prompts are lost, the model cannot run on tokens alone, gives no finite logits, or sees
            the tokens that it is to predict.
    """
    _check_prompts(source, tokenizer)
    first, second = _public_sequences(model, tokenizer)
    kept = int((first == second).long().cumprod(0).sum())
    with training_mode(model, False), _refusing(source, "read public tokens"):
        with torch.no_grad():
            one, other = (_logits(model, ids) for ids in (first, second))
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
            "that it would "
            "be trained and scored on answers that it can read. Choose a decoder such as Llama, Qwen2 or "
            "Mistral"
        )


def check_adapter(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse an adapter of which a part is never called or never moves.

    Args:
        model: Model with a fresh Co-LoRA adapter.
        tokenizer: Its tokenizer.

    Raises:
        ModelError: A module is not called, or has no finite gradient other than zero; the message names it.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, CoLoraLayer)}
    adapter = model.active_adapters[0]  # type: ignore[index]  # PEFT's, which nn.Module hides
    moved = {name: _moved(layer, str(adapter)) for name, layer in layers.items()}
    batch = on_device_of(model, _public_batch(model, tokenizer))
    device = next(model.parameters()).device
    called: set[str] = set()
    hooks = [layer.register_forward_hook(lambda *_, n=name: called.add(n)) for name, layer in layers.items()]
    try:
        # As it is trained, since some models ask for more there; but this draws nothing that training draws.
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            training_mode(model, True),
            torch.enable_grad(),
            _refusing(_kind(model), "be trained on public tokens"),
        ):
            loss = example_losses(model, batch).sum()
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
    """Refuse lengths that a model has no positions for.

    A table of positions ends there; rotary positions go on, into angles that the model never saw in training.

    Args:
        model: Language model.
        length: Most tokens that it will be given.
        setting: Where the length is set, for the message.

    Raises:
        ConfigurationError: The model has fewer positions.
    """
    most = context_length(model)
    if most is not None and length > most:
        raise ConfigurationError(
            f"{setting} is {length}, the model {_kind(model)} has {most} positions; lower it to at "
            f"most {most}"
        )


def check_ids(
    model: nn.Module, tokens: Iterable[Sequence[int] | torch.Tensor], what: str, setting: str
) -> None:
    """Refuse tokens that the model's embedding has no row for, where they occur.

    A tokenizer may know more tokens than its model embeds, as long as no text uses them.

    Args:
        model: Language model. Where it reads images, their ids stand above the rows.
        tokens: Ids of each example in turn.
        what: The data, for the message.
        setting: Where the model is named, for the message.

    Raises:
        ModelError: An example, which is numbered, has such a token.
    """
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
    words = _own_words(tokenizer)
    for kind, encode in (("prompts", prompt_tokens), ("answers", answer_tokens)):
        first, second = (encode(tokenizer, word) for word in words)
        if first == second:
            raise ModelError(
                f"the tokenizer of {source!r} gives the same tokens for different {kind}, so the model could "
                "not tell them apart; give the tokenizer that belongs to the model"
            )


def _own_words(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Two texts that the tokenizer itself can write: any fixed ones may be outside a small vocabulary."""
    special = set(tokenizer.all_special_ids)
    found: list[str] = []
    ordinary = [i for i in range(len(tokenizer)) if i not in special]
    # From the far end: first in a vocabulary stand bytes and control tokens.
    for index in ordinary[: -_WORDS_TRIED - 1 : -1]:
        text = str(tokenizer.decode([index])).strip()
        if text.isalnum() and text not in found:
            found.append(text)
        if len(found) == 2:
            return found[0], found[1]
    return "parcel", "window"


def _kind(model: nn.Module) -> str:
    """Name of a model's class, without the wrapper of its adapter."""
    base: Any = getattr(model, "get_base_model", None)
    return type(model if base is None else base()).__name__


def _public_sequences(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sequences (T,) of ordinary tokens, equal in their first third and different after it."""
    length = min(_TOKENS, context_length(model) or _TOKENS)
    first, second = _public_ids(model, tokenizer, (2, length))
    second[: max(1, length // 3)] = first[: max(1, length // 3)]
    return first, second


def _public_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase, shape: tuple[int, int]) -> torch.Tensor:
    """Ordinary tokens of a fixed seed: no special ones, which may stand for images or end a text."""
    table: Any = model.get_input_embeddings()  # type: ignore[operator]  # nn.Module hides it
    special = set(tokenizer.all_special_ids) | set(_placeholders(getattr(model, "config", None)))
    rows = min(int(table.num_embeddings), max(1, len(tokenizer)))
    ordinary = torch.tensor([i for i in range(rows) if i not in special] or list(range(rows)))
    drawn = torch.randint(0, len(ordinary), shape, generator=torch.Generator().manual_seed(0))
    return ordinary[drawn]


def _placeholders(config: Any) -> list[int]:
    """Ids that a vision-language model's configuration keeps for images, sound and video."""
    values = vars(config) if config is not None else {}
    names = [name for name in values if name.endswith(("_token_id", "_token_index"))]
    return [values[name] for name in names if isinstance(values[name], int)]


def _public_batch(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """Two public sequences, the second half of each as the answer."""
    length = min(_TOKENS, context_length(model) or _TOKENS)
    ids = _public_ids(model, tokenizer, (2, length))
    labels = ids.clone()
    labels[:, : length // 2] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(T, V) float32 logits of one sequence (T,), through the call that training makes."""
    batch = on_device_of(model, {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]})
    positions = torch.arange(len(ids), device=batch["input_ids"].device)
    return logits_at(model, batch, positions)[0].float().cpu()


def _gradient_reach(model: nn.Module, ids: torch.Tensor, kept: int) -> float:
    """Largest gradient of the first `kept` positions' logits with respect to a later token's embedding.

    Relative to the largest with respect to an earlier one; exactly 0 for a causal model in any dtype. 0 also
    where the embedding is not called as a module.
    """
    seen: list[torch.Tensor] = []

    def cut_graph(_module: nn.Module, _arguments: object, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    table: nn.Module = model.get_input_embeddings()  # type: ignore[operator]  # nn.Module hides it
    hook = table.register_forward_hook(cut_graph)
    try:
        with torch.enable_grad():
            batch = on_device_of(
                model, {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
            )
            positions = torch.arange(kept, device=batch["input_ids"].device)
            total = logits_at(model, batch, positions).float().logsumexp(dim=-1).sum()
            if not seen or not total.requires_grad:
                return 0.0
            (gradient,) = torch.autograd.grad(total, seen[:1], allow_unused=True)
    finally:
        hook.remove()
    if gradient is None:
        return 0.0
    sizes = gradient.float().abs().flatten(0, -2).amax(dim=-1)
    return float(sizes[kept:].max() / sizes[:kept].max().clamp(min=torch.finfo(torch.float32).tiny))


def _moved(layer: CoLoraLayer, adapter: str) -> torch.Tensor:
    """The tensor of a fresh module that has a gradient: P, or LoRA's B, while A waits for it."""
    if isinstance(layer, CoLoraLinear):
        return layer.core(adapter, "local").weight
    if isinstance(layer, BranchedLoraLinear):
        return layer.pair(adapter, "local")[1].weight
    raise ModelError(f"{type(layer).__name__} is no kind of adapted module that is known here")


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
    except _FOREIGN_ERRORS as error:
        raise ModelError(
            f"{source} cannot {task}: {type(error).__name__}: {str(error)[:300]}. Choose a causal language "
            "model, or a vision-language model that also reads text alone"
        ) from error


def encoded_ids(examples: Iterable[EncodedExample]) -> Iterator[torch.Tensor]:
    """The ids of encoded examples, for `check_ids`."""
    return (example.input_ids for example in examples)
