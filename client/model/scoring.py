"""Scoring of a test set: the most likely choice where an example has choices, what is written where not.

A choice is scored by its mean log-likelihood per token after the prompt. Where the choices of an example
already differ in their first token, that token decides and one forward pass over the prompt scores them all;
for choices of one token each both ways order the choices alike. A written answer counts as right if it has
the words of the right one, without regard to case and punctuation. Both measures are shares of right
examples; which of them a score is stands beside it.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

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


@dataclass(frozen=True)
class Examiner:
    """Asks a model for answers, `batch_size` examples at once.

    A prompt and its answer have at most `max_length` tokens, prompts cut from the left.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    max_length: int

    def score(self, examples: Sequence[Example]) -> Score:
        """Score each example by its choices, or by what the model writes if it has none.

        ConfigurationError if there is no example, or one cannot be scored; ModelError if a score is not
        finite, or the model cannot write.
        """
        if not examples:
            raise ConfigurationError("there is no example to score; give at least one")
        opened = [example for example in examples if not example.choices]
        given = self.answers(examples, _longest_answer(self.tokenizer, opened) + _SPARE_TOKENS)
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

    def answers(self, examples: Sequence[Example], max_new_tokens: int) -> list[str]:
        """The most likely choice of every example that has some, and what the model writes for the others."""
        chosen = iter(self.most_likely_choices([example for example in examples if example.choices]))
        written = iter(self.written([e for e in examples if not e.choices], max_new_tokens))
        return [e.choices[next(chosen)] if e.choices else next(written) for e in examples]

    def check(self, examples: Sequence[Example], what: str) -> None:
        """Refuse what `score` could not score, without scoring it; `what` names it in messages.

        Raises:
            ConfigurationError: An answer is too long for the model's positions.
            ModelError: A token has no row in the embedding, or the model cannot write and would have to.
        """
        texts = (
            [
                *question_tokens(self.tokenizer, e),
                *(token for choice in e.choices for token in answer_tokens(self.tokenizer, choice)),
            ]
            for e in examples
        )
        check_ids(self.model, texts, what, "model.path")
        opened = [example for example in examples if not example.choices]
        if not opened:
            return
        longest = _longest_answer(self.tokenizer, opened) + _SPARE_TOKENS
        self._room_to_write(longest)
        # Three tokens, since the second and third are the first to read what the model has kept.
        self.written([Example("public", "Does the parcel weigh nine grams?", "no")], min(3, longest))

    def most_likely_choices(self, examples: Sequence[Example]) -> list[int]:
        """Index of the most likely choice of every example, the first of several; see `choice_scores`."""
        return [max(range(len(row)), key=row.__getitem__) for row in self.choice_scores(examples)]

    def choice_scores(self, examples: Sequence[Example]) -> list[list[float]]:
        """Scores of every example's choices: log-likelihoods up to a constant of the example.

        Raises:
            ConfigurationError: An example cannot be scored: fewer than two choices, or its answer not among
                them.
            ModelError: A score is not finite.
        """
        model, pad = self.model, padding_token(self.tokenizer)
        questions = [
            _question(self.tokenizer, e, n, self.max_length) for n, e in enumerate(examples, start=1)
        ]
        tokens = ([*question.prompt, *(t for c in question.choices for t in c)] for question in questions)
        check_ids(model, tokens, "the examples to score", "model.path")
        first_decides = [len({choice[0] for choice in q.choices}) == len(q.choices) for q in questions]
        scores: dict[int, list[float]] = {}
        # Not inference mode: buffers that a model caches there could never be trained through again.
        with training_mode(model, False), torch.no_grad():
            for fast, score in ((True, _first_token_scores), (False, _likelihood_scores)):
                chosen = [index for index, is_fast in enumerate(first_decides) if is_fast is fast]
                values = score(model, pad, [questions[i] for i in chosen], self.batch_size)
                scores.update(zip(chosen, values, strict=True))
        if not all(math.isfinite(score) for row in scores.values() for score in row):
            raise ModelError(
                "a choice's score is not finite; the weights are damaged or their dtype is too narrow"
            )
        return [row for _, row in sorted(scores.items())]

    def written(
        self, examples: Sequence[Example], max_new_tokens: int = 16, streamer: Any = None
    ) -> list[str]:
        """Let the model answer, greedily, with at most `max_new_tokens`, without regard to choices.

        Prompts are cut further where the model's positions end before the answer would. A `streamer` of
        transformers is told of every token, in batches of one prompt. ConfigurationError if the positions
        leave no room for a prompt; ModelError if a token has no row, or the model cannot write.
        """
        if not examples:
            return []
        tokenizer, room = self.tokenizer, self._room_to_write(max_new_tokens)
        pad = padding_token(tokenizer)
        prompts = [cut_prompt(tokenizer, question_tokens(tokenizer, e), room) for e in examples]
        check_ids(self.model, prompts, "the examples to answer", "model.path")
        device = next(self.model.parameters()).device
        generator: Any = self.model
        found: list[str] = []
        with training_mode(self.model, False), torch.no_grad():
            for start in range(0, len(prompts), self.batch_size):
                batch = prompts[start : start + self.batch_size]
                longest = max(map(len, batch))
                # Left padding, so that every answer begins right after its prompt.
                ids = torch.tensor([[pad] * (longest - len(p)) + p for p in batch], device=device)
                mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch], device=device)
                try:
                    out: torch.Tensor = generator.generate(
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
                        f"{type(self.model).__name__} cannot write answers: {type(error).__name__}: {error}; "
                        "give the test set's examples choices, or choose a model that generates text"
                    ) from error
                found += tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
        return found

    def _room_to_write(self, max_new_tokens: int) -> int:
        """Most tokens of a prompt that leave room for an answer."""
        most = context_length(self.model)
        room = self.max_length if most is None else min(self.max_length, most - max_new_tokens)
        if room < 1:
            raise ConfigurationError(
                f"an answer of {max_new_tokens} tokens leaves no room for a prompt within the model's {most} "
                "positions; shorten the longest answer, or choose a model with more positions"
            )
        return room


def _longest_answer(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> int:
    return max((len(answer_tokens(tokenizer, example.answer)) for example in examples), default=0)


class _Question(NamedTuple):
    """Tokens of one example: its prompt and each of its choices."""

    prompt: list[int]
    choices: list[list[int]]


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
        logits_BKV = _logits(model, collate(prompts, pad_token_id), positions_K)
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
        batch = collate([sequences[index] for index in bucket], pad_token_id)
        labels_BT = batch["labels"][:, 1:]
        positions_K = (labels_BT != IGNORED).any(dim=0).nonzero().squeeze(1)
        targets_BK = labels_BT[:, positions_K]
        log_probabilities_BKV = _logits(model, batch, positions_K).log_softmax(dim=-1)
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


def _logits(model: nn.Module, batch: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    there = on_device_of(model, batch)
    return logits_at(model, there, positions.to(there["input_ids"].device)).float().cpu()


def words(text: str) -> list[str]:
    """Words of a text, without case and punctuation; "don't" and "3.5" are one word each."""
    return _WORD.findall(text.casefold())


def same_words(written: str, answer: str) -> bool:
    """Whether a written answer has the words of the right one, in order; signs alone must be the same."""
    if not words(answer):
        return written.strip() == answer.strip()
    return words(written) == words(answer)
