"""Scoring of closed-set examples by the likelihood of their choices.

A choice is scored by its mean log-likelihood per token after the prompt. Where the choices of an
example already differ in their first token, that token decides and one forward pass over the prompt
scores them all; for choices of one token each both ways order the choices alike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedmosaic.client.model.acceptance import check_ids, context_length
from fedmosaic.client.model.examples import (
    IGNORED,
    EncodedExample,
    Example,
    answer_tokens,
    collate,
    cut_prompt,
    length_buckets,
    padding_token,
    question_tokens,
)
from fedmosaic.client.model.loss import logits_at, on_device_of, training_mode
from fedmosaic.protos.errors import ConfigurationError, ModelError

Scoring = Literal["auto", "likelihood"]


@dataclass(frozen=True)
class _Question:
    """Tokens of one example: its prompt and each of its choices."""

    prompt: list[int]
    choices: list[list[int]]

    @property
    def first_tokens_differ(self) -> bool:
        return len({choice[0] for choice in self.choices}) == len(self.choices)


def choice_accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int,
    *,
    max_length: int | None = None,
    scoring: Scoring = "auto",
) -> float:
    """Share of examples whose most likely choice is the answer.

    Args:
        model: Causal language model; its training mode is restored afterwards.
        tokenizer: Tokenizer of the model.
        examples: At least one example, each with at least two choices, its answer among them.
        batch_size: Sequences per forward pass; at least 1.
        max_length: Most tokens per sequence, prompt cut from the left; the model's context by default.
        scoring: See `choice_scores`.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ConfigurationError: There is no example, or one cannot be scored.
        ModelError: A score is not finite.
    """
    predictions = most_likely_choices(
        model, tokenizer, examples, batch_size, max_length=max_length, scoring=scoring
    )
    correct = sum(
        example.choices[predicted] == example.answer
        for example, predicted in zip(examples, predictions, strict=True)
    )
    return correct / len(examples)


def most_likely_choices(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int,
    *,
    max_length: int | None = None,
    scoring: Scoring = "auto",
) -> list[int]:
    """Index of the most likely choice of every example, the first of several; see `choice_scores`."""
    rows = choice_scores(model, tokenizer, examples, batch_size, max_length=max_length, scoring=scoring)
    return [max(range(len(row)), key=row.__getitem__) for row in rows]


def choice_scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int,
    *,
    max_length: int | None = None,
    scoring: Scoring = "auto",
) -> list[list[float]]:
    """Scores of every example's choices, log-likelihoods up to a constant of the example.

    Args:
        model: Causal language model; its training mode is restored afterwards.
        tokenizer: Tokenizer of the model.
        examples: At least one example, each with at least two choices, its answer among them.
        batch_size: Sequences per forward pass; at least 1.
        max_length: Most tokens per sequence, prompt cut from the left; the model's context by default.
        scoring: ``auto`` lets the first token decide where the choices differ there, ``likelihood``
            always takes the mean log-likelihood over all tokens of a choice.

    Returns:
        Per example one score for each of its ``choices``.

    Raises:
        ConfigurationError: There is no example, or one cannot be scored.
        ModelError: A score is not finite.
    """
    if not examples:
        raise ConfigurationError("there is no example to score; give at least one")
    room = _context_length(model) if max_length is None else max_length
    questions = [
        _question(tokenizer, example, index, room) for index, example in enumerate(examples, start=1)
    ]
    tokens = ([*question.prompt, *(t for c in question.choices for t in c)] for question in questions)
    check_ids(model, tokens, "the examples to score", "model.path")
    by_first_token = [scoring == "auto" and question.first_tokens_differ for question in questions]
    scores: dict[int, list[float]] = {}
    # Not inference mode: buffers that a model caches there could never be trained through again.
    with training_mode(model, False), torch.no_grad():
        for fast, score in ((True, _first_token_scores), (False, _likelihood_scores)):
            chosen = [index for index, is_fast in enumerate(by_first_token) if is_fast is fast]
            values = score(model, padding_token(tokenizer), [questions[i] for i in chosen], batch_size)
            scores.update(zip(chosen, values, strict=True))
    if not all(math.isfinite(score) for row in scores.values() for score in row):
        raise ModelError(
            "a choice's score is not finite; the weights are damaged or their dtype is too narrow"
        )
    return [row for _, row in sorted(scores.items())]


def _context_length(model: nn.Module) -> int:
    length = context_length(model)
    if length is None:
        raise ConfigurationError("the model does not state its context length; give max_length")
    return length


def _question(tokenizer: PreTrainedTokenizerBase, example: Example, index: int, room: int) -> _Question:
    if len(example.choices) < 2 or example.answer not in example.choices:
        raise ConfigurationError(
            f"example {index}, {example.id!r}, has {len(example.choices)} choices or an answer outside them; "
            "give two or more choices with the answer among them"
        )
    choices = [answer_tokens(tokenizer, choice) for choice in example.choices]
    if not all(choices):
        raise ConfigurationError(f"example {index} has a choice without tokens; remove or complete it")
    left = room - max(len(choice) for choice in choices)
    if left < 1:
        raise ConfigurationError(
            f"a choice of example {index} leaves no room for the prompt within max_length {room}; "
            "raise max_length or shorten the choice"
        )
    return _Question(cut_prompt(tokenizer, question_tokens(tokenizer, example), left), choices)


def _first_token_scores(
    model: nn.Module, pad_token_id: int, questions: Sequence[_Question], batch_size: int
) -> list[list[float]]:
    scores: list[list[float]] = [[] for _ in questions]
    for bucket in length_buckets([len(question.prompt) for question in questions], batch_size):
        prompts = [_sequence(questions[index].prompt, []) for index in bucket]
        ends_B = torch.tensor([len(prompt.input_ids) - 1 for prompt in prompts])
        positions_K, column_B = torch.unique(ends_B, return_inverse=True)
        logits_BKV = _logits(model, prompts, pad_token_id, positions_K)
        logits_BV = logits_BKV[torch.arange(len(prompts)), column_B]
        for row, index in enumerate(bucket):
            firsts = [choice[0] for choice in questions[index].choices]
            scores[index] = logits_BV[row, firsts].tolist()
    return scores


def _likelihood_scores(
    model: nn.Module, pad_token_id: int, questions: Sequence[_Question], batch_size: int
) -> list[list[float]]:
    scores: list[list[float]] = [[0.0] * len(question.choices) for question in questions]
    places = [(i, j) for i, question in enumerate(questions) for j in range(len(question.choices))]
    sequences = [_sequence(questions[i].prompt, questions[i].choices[j]) for i, j in places]
    for bucket in length_buckets([len(sequence.input_ids) for sequence in sequences], batch_size):
        rows = [sequences[index] for index in bucket]
        labels_BT = collate(rows, pad_token_id)["labels"][:, 1:]
        positions_K = (labels_BT != IGNORED).any(dim=0).nonzero().squeeze(1)
        targets_BK = labels_BT[:, positions_K]
        log_probabilities_BKV = _logits(model, rows, pad_token_id, positions_K).log_softmax(dim=-1)
        mask_BK = targets_BK != IGNORED
        picked_BK = log_probabilities_BKV.gather(2, targets_BK.clamp(min=0).unsqueeze(2)).squeeze(2)
        means_B = (picked_BK * mask_BK).sum(dim=1) / mask_BK.sum(dim=1)
        for index, mean in zip(bucket, means_B.tolist(), strict=True):
            i, j = places[index]
            scores[i][j] = mean
    return scores


def _sequence(prompt: list[int], choice: list[int]) -> EncodedExample:
    return EncodedExample(
        "", torch.tensor(prompt + choice), torch.tensor([IGNORED] * len(prompt) + choice, dtype=torch.int64)
    )


def _logits(
    model: nn.Module, rows: Sequence[EncodedExample], pad_token_id: int, positions: torch.Tensor
) -> torch.Tensor:
    batch = on_device_of(model, collate(rows, pad_token_id))
    return logits_at(model, batch, positions.to(batch["input_ids"].device)).float().cpu()
