"""Examples on disk, as tokens, and as padded batches.

A supervised example is a prompt and an answer. The prompt is context only; the answer's tokens and
the end-of-sequence token after it are what the model is trained on (labels elsewhere are ``IGNORED``).

Prompt and answer are tokenised apart and then joined. A tokenizer may merge characters across a
border, so tokenising the joined text would let the tokens of the prompt depend on the answer; a
generated answer always starts from the prompt's own tokens, and training has to look the same.
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fedmosaic.privacy.configuration import decode_text, parse_json
from fedmosaic.protos.errors import ConfigurationError, ModelError

_KEYS: Final = ("id", "prompt", "answer", "choices")
_CUSTOMARY: Final = frozenset(
    "completion context input instruction label messages options output question response source target text "
    "title".split()
)
"""Fields that other programs' data sets have."""
IGNORED: Final = -100
"""Label of positions that carry no loss (the value that PyTorch's cross entropy ignores)."""

_PUBLIC_PROMPT: Final = "Does the parcel weigh nine grams?"
_TAKES_PARTS: Final[WeakKeyDictionary[PreTrainedTokenizerBase, tuple[str, bool]]] = WeakKeyDictionary()
"""By tokenizer: the chat template that was tried, and whether it wants content as a list of parts."""


@dataclass(frozen=True)
class Example:
    """One supervised example, as text.

    Attributes:
        id: Name of the example, unique within its data set.
        prompt: What the model reads; not empty.
        answer: What the model should reply; not empty.
        choices: The closed set of answers to choose from, ``answer`` among them; empty for open answers.
    """

    id: str
    prompt: str = field(repr=False)
    answer: str = field(repr=False)
    choices: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True, eq=False)
class EncodedExample:
    """One example as tokens.

    Attributes:
        id: Name of the example.
        input_ids: (T,) int64, prompt tokens, then answer tokens, then end of sequence.
        labels: (T,) int64, ``input_ids`` on the answer and the end of sequence, ``IGNORED`` on the prompt.
    """

    id: str
    input_ids: torch.Tensor = field(repr=False)
    labels: torch.Tensor = field(repr=False)


def read_examples(path: Path) -> tuple[Example, ...]:
    """Read JSON lines with the keys ``id``, ``prompt``, ``answer`` and, optionally, ``choices``.

    Args:
        path: UTF-8 file, one JSON object per line; blank lines and a byte order mark are skipped.

    Returns:
        The examples in file order.

    Raises:
        ConfigurationError: The file is missing or empty, a line is malformed, an id occurs twice, or an
            answer is not among its choices. The message names the line, never its contents.
    """
    return _read(path, named=True)


def read_public_examples(path: Path) -> tuple[Example, ...]:
    """Read public examples: as ``read_examples``, but an example without an ``id`` is named by its line.

    Private examples need ids of their own, because the ledger tells data sets apart by them.
    """
    return _read(path, named=False)


def _read(path: Path, *, named: bool) -> tuple[Example, ...]:
    try:
        lines = decode_text(path.read_bytes()).split("\n")
    except OSError as error:
        raise ConfigurationError(
            f"cannot read the examples in {path}: {error.strerror}; give a readable UTF-8 file of JSON lines"
        ) from None
    except ValueError as error:
        raise ConfigurationError(f"cannot read the examples in {path}: {error}") from None
    examples: list[Example] = []
    first: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        # Files of Windows that were laid end to end have a byte order mark in the middle, too.
        example = _parse(line.removeprefix("\ufeff"), path, number, named=named)
        earlier = first.setdefault(example.id, number)
        if earlier != number:
            raise ConfigurationError(
                f"{path}, line {number} has the id of line {earlier}; every example needs its own id"
            )
        examples.append(example)
    if not examples:
        raise ConfigurationError(f"{path} holds no example; give at least one JSON line")
    return tuple(examples)


def encode_examples(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_length: int,
    *,
    setting: str = "max_length",
) -> list[EncodedExample]:
    """Turn examples into tokens, prompt cut from the left so that the answer always survives.

    Args:
        tokenizer: Tokenizer with an end-of-sequence token; its chat template is used if it has one.
        examples: At least one example.
        max_length: Most tokens per example, answer and end of sequence included; at least 3.
        setting: Name of the setting that `max_length` comes from, for messages.

    Returns:
        One encoded example per example, in order, each of at most ``max_length`` tokens.

    Raises:
        ConfigurationError: There is no example, one has an empty prompt or answer, or an answer leaves no
            room for a prompt token within ``max_length``.
        ModelError: The tokenizer has no end-of-sequence token.
    """
    if not examples:
        raise ConfigurationError("there is no example to encode; give at least one")
    return [
        _encode(tokenizer, example, index, max_length, setting)
        for index, example in enumerate(examples, start=1)
    ]


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Tokens after which the model is to answer.

    Args:
        tokenizer: Tokenizer; its chat template is used if it has one, else a line break ends the prompt.
        prompt: Text of the prompt.

    Returns:
        Token ids, without an end-of-sequence token at the end.

    Raises:
        ModelError: The chat template loses prompts; see `rendered_prompt`.
    """
    if tokenizer.chat_template:
        text = rendered_prompt(tokenizer, prompt)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    tokens = list(tokenizer(prompt + "\n")["input_ids"])
    if tokens and tokens[-1] == tokenizer.eos_token_id:
        tokens.pop()
    return tokens


def rendered_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """A prompt in the tokenizer's chat template, up to where the answer begins.

    Templates of vision-language models go through content part by part and render nothing of a plain text.
    Which form a template wants is tried once, on a public sentence, so that it is the same for every prompt.

    Args:
        tokenizer: Tokenizer with a chat template.
        prompt: Text of the prompt.

    Raises:
        ModelError: Neither form survives the template, or the turn that it opens stands before the prompt.
    """
    template = str(tokenizer.chat_template)
    tried = _TAKES_PARTS.get(tokenizer)
    if tried is None or tried[0] != template:
        tried = (template, _takes_parts(tokenizer))
        _TAKES_PARTS[tokenizer] = tried
    return _render(tokenizer, prompt, parts=tried[1])


def _takes_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    problems: list[str] = []
    for parts in (False, True):
        try:
            opened = _render(tokenizer, _PUBLIC_PROMPT, parts=parts)
            closed = _render(tokenizer, _PUBLIC_PROMPT, parts=parts, turn=False)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            problems.append(f"{type(error).__name__}: {error}")
            continue
        place = opened.find(_PUBLIC_PROMPT)
        # What both have in common ends where the model's turn begins.
        end = place + len(_PUBLIC_PROMPT)
        if place >= 0 and opened[:end] == closed[:end]:
            return parts
        problems.append("the text is lost" if place < 0 else "the model's turn stands before it")
    raise ModelError(
        f"the tokenizer's chat template does not render a prompt: as text, {problems[0]}; as a list of "
        f"parts, {problems[1]}. Every question would look the same to the model: mend chat_template.jinja in "
        "the model's folder, or remove it to give prompts as they are"
    )


def _render(tokenizer: PreTrainedTokenizerBase, prompt: str, *, parts: bool, turn: bool = True) -> str:
    content = [{"type": "text", "text": prompt}] if parts else prompt
    messages: Any = [{"role": "user", "content": content}]
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=turn, tokenize=False))


def answer_tokens(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """Tokens of an answer alone, without special tokens."""
    return list(tokenizer(answer, add_special_tokens=False)["input_ids"])


def cut_prompt(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], room: int) -> list[int]:
    """Cut a prompt from the left to ``room`` tokens, but keeps a begin-of-sequence token.

    Args:
        tokenizer: Tokenizer that made the tokens.
        tokens: Tokens of the prompt.
        room: Most tokens to keep; at least 1.

    Returns:
        The last tokens of the prompt; with at least two tokens of room also a leading begin-of-sequence.
    """
    if len(tokens) <= room:
        return list(tokens)
    if room > 1 and tokens[0] == tokenizer.bos_token_id:
        return [tokens[0], *tokens[-(room - 1) :]]
    return list(tokens[-room:])


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with: the tokenizer's own, or its end of sequence (masked anyway).

    Raises:
        ModelError: The tokenizer has neither.
    """
    token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if not isinstance(token, int):
        raise ModelError("the tokenizer has neither a padding nor an end-of-sequence token; set one of them")
    return token


def collate(batch: Sequence[EncodedExample], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad examples on the right to one length.

    Args:
        batch: B ≥ 1 encoded examples of lengths T_i.
        pad_token_id: Token to fill with; such positions are masked and carry no loss.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each (B, max T_i) int64.

    Raises:
        ModelError: The batch is empty.
    """
    if not batch:
        raise ModelError("an empty batch cannot be padded; give at least one example")
    shape = (len(batch), max(len(example.input_ids) for example in batch))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for row, example in enumerate(batch):
        length = len(example.input_ids)
        input_ids[row, :length] = example.input_ids
        attention_mask[row, :length] = 1
        labels[row, :length] = example.labels
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def length_buckets(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Group indices of similar length, so that batches carry little padding.

    Args:
        lengths: Length of each item.
        batch_size: Most items per group; at least 1.

    Yields:
        Lists of indices into ``lengths``, longest items first, each index in exactly one list.

    Raises:
        ConfigurationError: ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ConfigurationError(f"batch_size is {batch_size}; give at least 1")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _parse(line: str, path: Path, number: int, *, named: bool) -> Example:
    where = f"{path}, line {number}"
    try:
        record = parse_json(line)
    except ValueError as error:
        raise ConfigurationError(f"{where} is not JSON ({error}); write one JSON object per line") from None
    if not isinstance(record, dict):
        raise ConfigurationError(f"{where} is a {type(record).__name__}; write a JSON object")
    _check_keys(record, where)
    if not named:
        record.setdefault("id", f"line-{number}")
    for key in ("id", "prompt", "answer"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            raise ConfigurationError(f"{where}: {key!r} must be a text that is not empty")
    choices = record.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise ConfigurationError(f"{where}: 'choices' must be a list of texts that are not empty")
    if choices and (record["answer"] not in choices or len(set(choices)) != len(choices)):
        raise ConfigurationError(f"{where}: 'choices' must differ from each other and contain the answer")
    return Example(record["id"], record["prompt"], record["answer"], tuple(choices))


def _check_keys(record: dict[str, object], where: str) -> None:
    for position, key in enumerate(record, 1):
        if key in _KEYS:
            continue
        near = difflib.get_close_matches(key.lower(), _KEYS, n=1)
        # A key may be a piece of somebody's text: only a customary name is shown, any other by its place.
        shown = f"key {key!r}" if near or key.lower() in _CUSTOMARY else f"key number {position}"
        hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(_KEYS)} only"
        raise ConfigurationError(f"{where} has the unknown {shown}; {hint}")


def _encode(
    tokenizer: PreTrainedTokenizerBase, example: Example, index: int, max_length: int, setting: str
) -> EncodedExample:
    if not example.prompt.strip() or not example.answer.strip():
        raise ConfigurationError(f"example {index} has an empty prompt or answer; remove or complete it")
    if not isinstance(tokenizer.eos_token_id, int):
        raise ModelError("the tokenizer has no end-of-sequence token; set tokenizer.eos_token")
    supervised = [*answer_tokens(tokenizer, example.answer), tokenizer.eos_token_id]
    room = max_length - len(supervised)
    if room < 1:
        raise ConfigurationError(
            f"the answer of example {index} leaves no room for its prompt within {setting} {max_length}; "
            f"raise {setting} or shorten the answer"
        )
    context = cut_prompt(tokenizer, prompt_tokens(tokenizer, example.prompt), room)
    return EncodedExample(
        example.id,
        torch.tensor([*context, *supervised], dtype=torch.int64),
        torch.tensor([IGNORED] * len(context) + supervised, dtype=torch.int64),
    )
