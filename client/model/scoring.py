"""Scoring of a test set: the most likely choice where an example has choices, what is written where not.

A written answer counts as right if it has the words of the right one, without regard to case and punctuation.
Both measures are shares of right examples; which of them a score is stands beside it.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedmosaic.client.model.acceptance import check_ids, context_length
from fedmosaic.client.model.evaluation import most_likely_choices
from fedmosaic.client.model.examples import Example, answer_tokens, cut_prompt, padding_token, question_tokens
from fedmosaic.client.model.loss import training_mode
from fedmosaic.protos.errors import ConfigurationError, ModelError

_WORD: Final = re.compile(r"\w+(?:['’.,]\w+)*")

_SPARE_TOKENS: Final = 8
"""Room to write beyond the longest right answer, so that one which goes on is not taken for it."""

BY_CHOICE: Final = "most likely choice"
BY_WRITING: Final = "written answer, same words"


@dataclass(frozen=True)
class Score:
    """How much of a test set is right.

    Attributes:
        right: Whether each example is, in order. Private.
        measure: What counts as right.
        commonest: Share of examples that the commonest answer alone gets right; None without choices.
    """

    right: tuple[bool, ...] = field(repr=False)
    measure: str
    commonest: float | None

    @property
    def value(self) -> float:
        """Share of right examples, in [0, 1]."""
        return sum(self.right) / len(self.right)


def score_examples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int,
    *,
    max_length: int,
) -> Score:
    """Score each example by its choices, or by what the model writes if it has none.

    Args:
        model: Causal language model; its training mode is restored.
        tokenizer: Of the model.
        examples: At least one.
        batch_size: Sequences per forward pass.
        max_length: Most tokens of a prompt and its answer, prompts cut from the left.

    Raises:
        ConfigurationError: There is no example, or one cannot be scored.
        ModelError: A score is not finite, or the model cannot write.
    """
    if not examples:
        raise ConfigurationError("there is no example to score; give at least one")
    opened = [example for example in examples if not example.choices]
    longest = max((len(answer_tokens(tokenizer, example.answer)) for example in opened), default=0)
    given = answers(
        model,
        tokenizer,
        examples,
        batch_size,
        max_length=max_length,
        max_new_tokens=longest + _SPARE_TOKENS,
    )
    right = tuple(
        answer == e.answer if e.choices else same_words(answer, e.answer)
        for answer, e in zip(given, examples, strict=True)
    )
    closed = len(examples) - len(opened)
    measure = BY_CHOICE if not opened else BY_WRITING
    if closed and opened:
        measure = f"{BY_CHOICE} for {closed} examples, {BY_WRITING} for {len(opened)}"
    count = Counter(example.answer for example in examples).most_common(1)[0][1]
    return Score(right, measure, None if opened else count / len(examples))


def answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int,
    *,
    max_length: int,
    max_new_tokens: int,
) -> list[str]:
    """The most likely choice of every example that has some, and what the model writes for the others.

    Args:
        model: Causal language model; its training mode is restored.
        tokenizer: Of the model.
        examples: In any order; each is answered as if it were alone.
        batch_size: Sequences per forward pass.
        max_length: Most tokens of a prompt and a choice, or of a prompt, cut from the left.
        max_new_tokens: Most tokens to write.
    """
    found: list[str] = [""] * len(examples)
    closed = [index for index, example in enumerate(examples) if example.choices]
    opened = [index for index, example in enumerate(examples) if not example.choices]
    if closed:
        asked = [examples[index] for index in closed]
        chosen = most_likely_choices(model, tokenizer, asked, batch_size, max_length=max_length)
        for index, choice in zip(closed, chosen, strict=True):
            found[index] = examples[index].choices[choice]
    if opened:
        asked = [examples[index] for index in opened]
        written = written_answers(
            model, tokenizer, asked, batch_size, max_length=max_length, max_new_tokens=max_new_tokens
        )
        for index, text in zip(opened, written, strict=True):
            found[index] = text
    return found


def check_scorable(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_length: int,
    what: str,
) -> None:
    """Refuse what `score_examples` could not score, without scoring it.

    Args:
        model: Causal language model.
        tokenizer: Of the model.
        examples: At least one.
        max_length: As for `score_examples`.
        what: The examples, for messages.

    Raises:
        ConfigurationError: An answer is too long for the model's positions.
        ModelError: A token has no row in the embedding, or the model cannot write and would have to.
    """
    texts = (
        [*question_tokens(tokenizer, e), *(t for c in e.choices for t in answer_tokens(tokenizer, c))]
        for e in examples
    )
    check_ids(model, texts, what, "model.path")
    opened = [example for example in examples if not example.choices]
    if not opened:
        return
    longest = max(len(answer_tokens(tokenizer, example.answer)) for example in opened) + _SPARE_TOKENS
    _room_to_write(model, max_length, longest)
    # Three tokens, since the second and third are the first to read what the model has kept.
    public = [Example("public", "Does the parcel weigh nine grams?", "no")]
    written_answers(model, tokenizer, public, 1, max_length=max_length, max_new_tokens=min(3, longest))


def words(text: str) -> list[str]:
    """Words of a text, without case and punctuation; "don't" and "3.5" are one word each."""
    return _WORD.findall(text.casefold())


def same_words(written: str, answer: str) -> bool:
    """Whether a written answer has the words of the right one, in order; signs alone must be the same."""
    if not words(answer):
        return written.strip() == answer.strip()
    return words(written) == words(answer)


def written_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int,
    *,
    max_length: int,
    max_new_tokens: int = 16,
    streamer: Any = None,
) -> list[str]:
    """Let the model answer, greedily.

    Args:
        model: Causal language model; its training mode is restored afterwards.
        tokenizer: Of the model.
        examples: At least one.
        batch_size: Prompts per batch.
        max_length: Most tokens of a prompt, cut from the left; fewer where the model's positions end before
            the answer would.
        max_new_tokens: Most tokens of an answer.
        streamer: Of transformers, told of every token; for batches of one prompt.

    Raises:
        ConfigurationError: There is no example, or the positions leave no room for a prompt.
        ModelError: A prompt has a token that the model does not embed, or the model cannot write.
    """
    if not examples:
        raise ConfigurationError("there is no example to answer; give at least one")
    room = _room_to_write(model, max_length, max_new_tokens)
    pad = padding_token(tokenizer)
    prompts = [cut_prompt(tokenizer, question_tokens(tokenizer, e), room) for e in examples]
    check_ids(model, prompts, "the examples to answer", "model.path")
    answers: list[str] = []
    with training_mode(model, False), torch.no_grad():
        for start in range(0, len(prompts), batch_size):
            out, longest = _generate(
                model, prompts[start : start + batch_size], pad, tokenizer, max_new_tokens, streamer
            )
            answers += tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    return answers


def _room_to_write(model: nn.Module, max_length: int, max_new_tokens: int) -> int:
    """Most tokens of a prompt that leave room for an answer."""
    most = context_length(model)
    room = max_length if most is None else min(max_length, most - max_new_tokens)
    if room < 1:
        raise ConfigurationError(
            f"an answer of {max_new_tokens} tokens leaves no room for a prompt within the model's {most} "
            "positions; shorten the longest answer, or choose a model with more positions"
        )
    return room


def _generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    pad: int,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    streamer: Any,
) -> tuple[torch.Tensor, int]:
    """Prompts and what follows them, and how long the prompts are with their padding."""
    longest = max(map(len, prompts))
    device = next(model.parameters()).device
    # Left padding, so that every answer begins right after its prompt.
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    try:
        out: torch.Tensor = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
            streamer=streamer,
        )
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot write answers: {type(error).__name__}: {error}; give the test "
            "set's examples choices, or choose a model that generates text"
        ) from error
    return out, longest
