"""Test sets with and without choices: what is scored how, and that the measure is told."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from fedmosaic.client.model.examples import (
    Example,
    answer_tokens,
    encode_examples,
    padding_token,
    prompt_tokens,
)
from fedmosaic.client.model.scoring import BY_CHOICE, BY_WRITING, Examiner, same_words
from fedmosaic.client.model.training import TrainingSettings, train_local
from fedmosaic.protos.errors import ConfigurationError, ModelError
from tiny import tiny_llama, word_tokenizer

WORDS = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
TOKENS = word_tokenizer(WORDS, eos_token="</s>", pad_token="<pad>")  # noqa: S106  # tokens of text
LEARNT = [Example("1", "a b", "C d."), Example("2", "b a e", "f")]


def fresh(rows: int = len(WORDS), positions: int = 32) -> LlamaForCausalLM:
    special: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    sizes: dict[str, Any] = {"vocab_size": rows, "hidden_size": 32, "max_position_embeddings": positions}
    model = tiny_llama(initializer_range=0.3, num_hidden_layers=2, **sizes, **special)
    model.eval()
    return model


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return fresh(positions=64)


@pytest.fixture(scope="module")
def trained() -> LlamaForCausalLM:
    """A model that has learnt two answers by heart."""
    model = fresh()
    encoded = encode_examples(TOKENS, [Example("1", "a b", "c d"), Example("2", "b a e", "f")], 16)
    settings = TrainingSettings(steps=60, learning_rate=1e-2, per_device_train_batch_size=2)
    train_local(model, encoded, settings, pad_token_id=padding_token(TOKENS))
    return model


def random_examples(count: int, choices: tuple[str, ...]) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    examples = []
    for index in range(count):
        length = int(torch.randint(1, 12, (1,), generator=generator))
        letters = torch.randint(3, len(WORDS), (length,), generator=generator).tolist()
        answer = choices[index % len(choices)]
        examples.append(Example(str(index), " ".join(WORDS[letter] for letter in letters), answer, choices))
    return examples


def mean_log_likelihood(model: nn.Module, prompt: str, choice: str) -> float:
    """One sequence at a time, without padding: the oracle."""
    context, answer = prompt_tokens(TOKENS, prompt), answer_tokens(TOKENS, choice)
    with torch.no_grad():
        logits = model(torch.tensor([context + answer])).logits[0].log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(answer) - 1)
    return sum(float(logits[place, token]) for place, token in zip(places, answer, strict=True)) / len(answer)


@pytest.mark.parametrize("batch_size", [1, 4, 50])
@pytest.mark.parametrize("choices", [("a b c", "a d", "a"), ("a", "b", "c", "d")])
def test_choices_are_scored_alike(model: LlamaForCausalLM, choices: tuple[str, ...], batch_size: int) -> None:
    """By all tokens of a choice, and by the first where that decides."""
    examples = random_examples(20, choices)
    expected = []
    for example in examples:
        scores = [mean_log_likelihood(model, example.prompt, choice) for choice in choices]
        expected.append(scores.index(max(scores)))
    assert Examiner(model, TOKENS, batch_size, 64).most_likely_choices(examples) == expected
    assert len(set(expected)) > 1


class Counting(nn.Module):
    """Counts the rows that a model is asked for."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.rows = 0

    def forward(self, input_ids: torch.Tensor, **inputs: object) -> object:
        self.rows += len(input_ids)
        return self.model(input_ids=input_ids, **inputs)


def test_first_token_scoring_runs_each_prompt_once(model: LlamaForCausalLM) -> None:
    counting = Counting(model)
    Examiner(counting, TOKENS, 4, 64).most_likely_choices(random_examples(10, ("a b", "c d", "e")))
    assert counting.rows == 10
    Examiner(counting, TOKENS, 4, 64).most_likely_choices(random_examples(10, ("a b", "a d", "e")))
    assert counting.rows == 40


def test_a_long_prompt_is_cut_from_the_left(model: LlamaForCausalLM) -> None:
    choices = ("e", "f")
    for start in ("a b c d", "m n", "k", "q r s t"):
        short, long = (Example("1", f"{lead}{start}", "e", choices) for lead in ("", "x y z " * 30))
        length = len(start.split()) + 1
        found = [Examiner(model, TOKENS, 2, length).most_likely_choices([e]) for e in (short, long)]
        assert found[0] == found[1]


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_every_mode_is_given_back(model: LlamaForCausalLM, training: bool) -> None:
    class Noisy(Counting):
        def __init__(self) -> None:
            super().__init__(model)
            self.dropout = nn.Dropout()

        def forward(self, input_ids: torch.Tensor, **inputs: object) -> object:
            output = self.model(input_ids=input_ids, **inputs)
            output.logits = self.dropout(output.logits)
            return output

    noisy = Noisy().train(training)
    noisy.model.eval()
    examples = random_examples(20, ("a", "b"))
    first, second = (Examiner(m, TOKENS, 4, 64).most_likely_choices(examples) for m in (noisy, model))
    assert first == second
    assert (noisy.training, noisy.model.training, noisy.dropout.training) == (training, False, training)


def test_trainable_after_scoring(model: LlamaForCausalLM) -> None:
    Examiner(model, TOKENS, 2, 64).most_likely_choices(random_examples(2, ("a", "b")))
    model(torch.tensor([[3, 4, 5]])).logits.sum().backward()
    model.zero_grad()


@pytest.mark.parametrize(
    "choices", [("b",), ("c", "d"), ("b", " "), ("b", "c " * 80)], ids=["one", "other", "empty", "long"]
)
def test_unscorable_examples_are_refused(model: LlamaForCausalLM, choices: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError, match="example 1"):
        Examiner(model, TOKENS, 2, 64).score([Example("1", "a", "b", choices)])


@pytest.mark.parametrize("choices", [("a", "b"), ("a b", "a c")])
def test_a_damaged_model_is_refused_rather_than_scored(choices: tuple[str, ...]) -> None:
    damaged = fresh()
    with torch.no_grad():
        damaged.lm_head.weight.fill_(math.nan)
    with pytest.raises(ModelError, match="not finite"):
        Examiner(damaged, TOKENS, 2, 64).score(random_examples(2, choices))


def test_free_answers_are_scored_by_what_is_written(trained: LlamaForCausalLM) -> None:
    score = Examiner(trained, TOKENS, 2, 16).score(LEARNT)
    assert (score.value, score.measure) == (1.0, BY_WRITING)
    wrong = [LEARNT[0], Example("2", "b a e", "g")]
    assert Examiner(trained, TOKENS, 2, 16).score(wrong).value == 0.5
    goes_on = [Example("1", "a b", "c")]
    assert Examiner(trained, TOKENS, 1, 16).score(goes_on).value == 0.0


def test_mixed_sets_are_scored_example_by_example_and_say_so(trained: LlamaForCausalLM) -> None:
    closed = [Example(str(i), "a b", choice, ("c", "g")) for i, choice in enumerate(("c", "g"))]
    assert Examiner(trained, TOKENS, 2, 16).most_likely_choices(closed) == [0, 0]
    alone = Examiner(trained, TOKENS, 2, 16).score(closed)
    assert (alone.value, alone.measure) == (0.5, BY_CHOICE)
    mixed = Examiner(trained, TOKENS, 2, 16).score([closed[0], LEARNT[0], closed[1], LEARNT[1]])
    assert mixed.value == 0.75
    assert mixed.measure == f"{BY_CHOICE} for 2 examples, {BY_WRITING} for 2"


def test_batching_does_not_change_what_is_written(trained: LlamaForCausalLM) -> None:
    examples = [Example("1", "a b", "x"), Example("2", "b a e", "x"), Example("3", "a b", "x")]
    together = Examiner(trained, TOKENS, 3, 16).written(examples, 4)
    alone = [Examiner(trained, TOKENS, 1, 16).written([e], 4) for e in examples]
    assert together == [text for (text,) in alone] == ["c d", "f", "c d"]


@pytest.mark.parametrize(
    ("written", "answer", "same"),
    [
        ("The Answer.", "the answer", True),
        ("the answer is", "the answer", False),
        ("3.5", "35", False),
        (" + ", "+", True),
        ("-", "+", False),
        ("", "a", False),
    ],
)
def test_words_count_and_signs_only_where_there_are_no_words(written: str, answer: str, same: bool) -> None:
    assert same_words(written, answer) is same


def test_answers_longer_than_the_positions_are_refused_beforehand() -> None:
    with pytest.raises(ConfigurationError, match=r"38 tokens.*32 positions"):
        Examiner(fresh(), TOKENS, 1, 64).check([Example("1", "a", "b " * 30)], "test set 'self'")


def test_prompts_make_room_for_the_answer_within_the_positions() -> None:
    long = [Example("1", "a b " * 40, "c")]
    assert len(Examiner(fresh(), TOKENS, 1, 32).written(long, 8)) == 1


def test_tokens_without_a_row_are_refused_beforehand() -> None:
    few, examples = fresh(20), [Example("1", "a", "b"), Example("2", "z", "b")]
    with pytest.raises(ModelError, match="test set 'self', example 2"):
        Examiner(few, TOKENS, 1, 16).check(examples, "test set 'self'")
    with pytest.raises(ModelError, match="example 1"):
        Examiner(few, TOKENS, 1, 16).score([Example("1", "a", "b", ("b", "z"))])


def test_a_model_that_cannot_write_is_refused_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh()

    def generate(**_: object) -> None:
        raise ValueError("no cache of this kind")

    monkeypatch.setattr(model, "generate", generate)
    with pytest.raises(ModelError, match="cannot write answers: ValueError: no cache"):
        Examiner(model, TOKENS, 1, 16).check([Example("1", "a", "b")], "test set 'self'")
    Examiner(model, TOKENS, 1, 16).check([Example("1", "a", "b", ("b", "c"))], "test set 'self'")


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no example"):
        Examiner(fresh(), TOKENS, 1, 16).score([])
