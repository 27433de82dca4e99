"""Examples as tokens, and as padded batches.

The answer's tokens and the end of sequence after it, or the assistant's turns, are what the model is trained
on (labels elsewhere are ``IGNORED``). What is context and what is learned are tokenised apart and then
joined: a tokenizer may merge characters across a border, so that the tokens of the prompt would depend on the
answer, while a generated answer always starts from the prompt's own tokens.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from fedmosaic.client.data.records import Example as Example
from fedmosaic.client.data.records import Turn
from fedmosaic.client.data.records import read_examples as read_examples
from fedmosaic.client.data.records import read_public_examples as read_public_examples
from fedmosaic.protos.errors import ConfigurationError, ModelError

IGNORED: Final = -100
"""Label of positions that carry no loss (the value that PyTorch's cross entropy ignores)."""
_GENERATION: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PUBLIC_PROMPT: Final = "Does the parcel weigh nine grams?"
_TAKES_PARTS: Final[WeakKeyDictionary[PreTrainedTokenizerBase, tuple[str, bool]]] = WeakKeyDictionary()
"""By tokenizer: the chat template that was tried, and whether it wants content as a list of parts."""
Piece = tuple[list[int], bool]
"""Tokens, and whether they are learned."""


@dataclass(frozen=True, eq=False)
class EncodedExample:
    """One example as (T,) int64 tokens; labels are ``IGNORED`` outside the answer and its end of sequence."""

    id: str
    input_ids: torch.Tensor = field(repr=False)
    labels: torch.Tensor = field(repr=False)
    person: str = field(default="", repr=False)


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int, *,
    setting: str = "max_length",
) -> list[EncodedExample]:  # fmt: skip
    """Turn examples into tokens, prompt cut from the left so that the answer always survives.

    The tokenizer's chat template is used if it has one. An example has at most ``max_length`` tokens, answer
    and end of sequence included; `setting` is where that is set, for messages. ConfigurationError if there is
    no example, one has an empty prompt or answer, or an answer leaves no room for a prompt token; ModelError
    if the tokenizer has no end of sequence.
    """
    if not examples:
        raise ConfigurationError("there is no example to encode; give at least one")
    numbered = enumerate(examples, start=1)
    return [_encode(tokenizer, example, index, max_length, setting) for index, example in numbered]


def _encode(
    tokenizer: PreTrainedTokenizerBase, example: Example, index: int, max_length: int, setting: str
) -> EncodedExample:
    if not example.prompt.strip() or not example.answer.strip():
        raise ConfigurationError(f"example {index} has an empty prompt or answer; remove or complete it")
    if not isinstance(tokenizer.eos_token_id, int):
        raise ModelError("the tokenizer has no end-of-sequence token; set tokenizer.eos_token")
    *context, (supervised, _) = example_pieces(tokenizer, example, index)
    room = max_length - len(supervised)
    if room < 1:
        raise ConfigurationError(
            f"the answer of example {index} leaves no room within {setting} {max_length}: raise or shorten it"
        )
    ids = [token for tokens, _ in context for token in tokens]
    labels = [token if learned else IGNORED for tokens, learned in context for token in tokens]
    kept = cut_prompt(tokenizer, ids, room)
    return EncodedExample(
        example.id,
        torch.tensor([*kept, *supervised], dtype=torch.int64),
        torch.tensor([*_kept_labels(labels, context, len(kept)), *supervised], dtype=torch.int64),
        example.person,
    )


def _kept_labels(labels: list[int], context: Sequence[Piece], kept: int) -> list[int]:
    """Labels of the last tokens of a context: a turn that was cut through is not learned from its middle."""
    over = len(labels) - kept
    if over <= 0:
        return labels
    start = 0
    for tokens, _ in context:
        if start <= over < start + len(tokens):
            labels[start : start + len(tokens)] = [IGNORED] * len(tokens)
        start += len(tokens)
    # In the first place stands what begins a sequence, and nothing before it from which to predict it.
    return [IGNORED, *labels[over + 1 :]]


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Tokens after which the model is to answer: its chat template's, else a line break ends the prompt."""
    if tokenizer.chat_template:
        return answer_tokens(tokenizer, rendered_prompt(tokenizer, prompt))
    tokens = list(tokenizer(prompt + "\n")["input_ids"])
    if tokens and tokens[-1] == tokenizer.eos_token_id:
        tokens.pop()
    return tokens


def answer_tokens(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """Tokens of a text alone, without special tokens."""
    return list(tokenizer(answer, add_special_tokens=False)["input_ids"]) if answer else []


def rendered_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """A prompt in the tokenizer's chat template, up to where the answer begins.

    Templates of vision-language models go through content part by part and render nothing of a plain text.
    Which form a template wants is tried once, on a public sentence, so that it is the same for every prompt;
    a template that loses the sentence, or opens the model's turn before it, is a ModelError.
    """
    return _rendered(tokenizer, (Turn("user", prompt),), open_turn=True)


def _rendered(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], *, open_turn: bool = False,
    parts: bool | None = None,
) -> str:  # fmt: skip
    if not tokenizer.chat_template:
        raise ModelError(
            "the data hold conversations (messages), and the model's tokenizer has no chat template; choose "
            "an instruct model, put its chat_template.jinja into the folder, or give prompt and answer"
        )
    messages: Any = _messages(turns, _wants_parts(tokenizer) if parts is None else parts)
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=open_turn, tokenize=False))


def _messages(turns: Sequence[Turn], parts: bool) -> list[dict[str, Any]]:
    return [
        {"role": t.role, "content": [{"type": "text", "text": t.content}] if parts else t.content}
        for t in turns
    ]


def _wants_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    template = str(tokenizer.chat_template)
    tried = _TAKES_PARTS.get(tokenizer)
    if tried is None or tried[0] != template:
        tried = (template, _takes_parts(tokenizer))
        _TAKES_PARTS[tokenizer] = tried
    return tried[1]


def _takes_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    problems: list[str] = []
    for parts in (False, True):
        try:
            opened, closed = (
                _rendered(tokenizer, (Turn("user", _PUBLIC_PROMPT),), open_turn=turn, parts=parts)
                for turn in (True, False)
            )
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


def cut_prompt(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], room: int) -> list[int]:
    """The last ``room`` ≥ 1 tokens of a prompt; from two on, a leading begin-of-sequence is kept."""
    if len(tokens) <= room:
        return list(tokens)
    if room > 1 and tokens[0] == tokenizer.bos_token_id:
        return [tokens[0], *tokens[-(room - 1) :]]
    return list(tokens[-room:])


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with, masked anyway: the tokenizer's own, or its end of sequence; or a ModelError."""
    token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if not isinstance(token, int):
        raise ModelError("the tokenizer has neither a padding nor an end-of-sequence token; set one of them")
    return token


def collate(batch: Sequence[EncodedExample], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad B ≥ 1 examples on the right: ``input_ids``, ``attention_mask``, ``labels``, each (B, T) int64."""
    if not batch:
        raise ModelError("an empty batch cannot be padded; give at least one example")

    def padded(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
        return pad_sequence([row.to(torch.int64) for row in rows], batch_first=True, padding_value=value)

    return {
        "input_ids": padded([example.input_ids for example in batch], pad_token_id),
        "attention_mask": padded([torch.ones_like(example.input_ids) for example in batch], 0),
        "labels": padded([example.labels for example in batch], IGNORED),
    }


def length_buckets(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Group indices of similar length, longest first, so that batches carry little padding."""
    if batch_size < 1:
        raise ConfigurationError(f"batch_size is {batch_size}; give at least 1")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def question_tokens(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[int]:
    """Tokens after which the model is to give an example's answer; see `example_pieces` for the errors."""
    if not example.turns:
        return prompt_tokens(tokenizer, example.prompt)
    *context, _ = example_pieces(tokenizer, example)
    return [token for tokens, _ in context for token in tokens]


def example_pieces(tokenizer: PreTrainedTokenizerBase, example: Example, index: int = 1) -> list[Piece]:
    """An example as uncut tokens: context and what is learned, the answer last; numbered in errors."""
    end = int(tokenizer.eos_token_id)
    if not example.turns:
        answer = [*answer_tokens(tokenizer, example.answer), end]
        return [(prompt_tokens(tokenizer, example.prompt), False), (answer, True)]
    try:
        parts = _conversation(tokenizer, example.turns)
    except TemplateError as error:
        raise ConfigurationError(
            f"example {index}: the model's chat template refuses this conversation ({str(error)[:200]}); "
            "see which roles it takes, and in which order"
        ) from None
    pieces: list[Piece] = []
    for text, learned in parts:
        tokens = answer_tokens(tokenizer, text)
        last = max((i for i, token in enumerate(tokens) if token == end), default=len(tokens) - 1) + 1
        # After its end of text nothing of a turn is learned: there the model has stopped.
        split = last if learned else len(tokens)
        pieces += [(tokens[:split], learned), (tokens[split:], False)]
    pieces = [piece for piece in pieces if piece[0]]
    while pieces and not pieces[-1][1]:
        pieces.pop()
    if not pieces:
        raise ModelError(f"example {index}: the model's chat template leaves out what the assistant says")
    answer, _ = pieces.pop()
    return [*pieces, (answer if answer[-1] == end else [*answer, end], True)]


def _conversation(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> list[tuple[str, bool]]:
    """A conversation in the tokenizer's chat template, cut where the assistant begins and ends."""
    whole = _rendered(tokenizer, turns)
    spans = _marked_spans(tokenizer, turns) or _spans_by_prefix(tokenizer, turns, whole)
    parts, done = [], 0
    for start, end in spans:
        parts += [(whole[done:start], False), (whole[start:end], True)]
        done = end
    return [*parts, (whole[done:], False)]


def _marked_spans(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> list[tuple[int, int]]:
    """Where the template itself marks what the assistant says, `{% generation %}`; none if it does not."""
    template = str(tokenizer.chat_template or "")
    if _GENERATION.search(template) is None:
        return []
    render: Any = render_jinja_template
    rendered = render(
        conversations=[_messages(turns, _wants_parts(tokenizer))], chat_template=template,
        return_assistant_tokens_mask=True, **tokenizer.special_tokens_map,
    )  # fmt: skip
    return [(int(start), int(end)) for start, end in rendered[1][0]]


def _spans_by_prefix(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], whole: str
) -> list[tuple[int, int]]:
    """From where each of the assistant's turns is asked for to where it is over, a prefix of the whole."""
    spans = []
    for number, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        before = _rendered(tokenizer, turns[:number], open_turn=True)
        after = _rendered(tokenizer, turns[: number + 1])
        if not (whole.startswith(after) and after.startswith(before)):
            raise ModelError(
                "the model's chat template renders earlier turns of a conversation in another way once later "
                "ones follow, so it cannot be told what the assistant says; mark that with "
                "{% generation %} in chat_template.jinja, or give prompts and answers instead of messages"
            )
        spans.append((len(before), len(after)))
    return spans
