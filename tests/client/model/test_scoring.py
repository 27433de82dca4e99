"""Test sets with and without choices: what is scored how, and that the measure is told."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedmosaic.client.model.evaluation import most_likely_choices
from fedmosaic.client.model.examples import Example, encode_examples, padding_token
from fedmosaic.client.model.scoring import (
    BY_CHOICE,
    BY_WRITING,
    check_scorable,
    same_words,
    score_examples,
    written_answers,
)
from fedmosaic.client.model.training import TrainingSettings, train_local
from fedmosaic.protos.errors import ConfigurationError, ModelError

UNKNOWN = {"unk_token": "<unk>"}
SPECIAL = {**UNKNOWN, "eos_token": "</s>", "pad_token": "<pad>"}
WORDS = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, **UNKNOWN))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, **SPECIAL)


def fresh(rows: int = len(WORDS)) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def trained(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A model that has learnt two answers by heart."""
    model = fresh()
    encoded = encode_examples(tokenizer, [Example("1", "a b", "c d"), Example("2", "b a e", "f")], 16)
    settings = TrainingSettings(steps=60, learning_rate=1e-2, per_device_train_batch_size=2)
    train_local(model, encoded, settings, pad_token_id=padding_token(tokenizer))
    return model


LEARNT = [Example("1", "a b", "C d."), Example("2", "b a e", "f")]


def test_free_answers_are_scored_by_what_is_written(
    trained: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    score = score_examples(trained, tokenizer, LEARNT, 2, max_length=16)
    assert (score.value, score.measure) == (1.0, BY_WRITING)
    wrong = [LEARNT[0], Example("2", "b a e", "g")]
    assert score_examples(trained, tokenizer, wrong, 2, max_length=16).value == 0.5


def test_an_answer_that_goes_on_is_not_taken_for_a_shorter_one(
    trained: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    shorter = [Example("1", "a b", "c")]
    assert score_examples(trained, tokenizer, shorter, 1, max_length=16).value == 0.0


def test_mixed_sets_are_scored_example_by_example_and_say_so(
    trained: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    closed = [Example(str(i), "a b", choice, ("c", "g")) for i, choice in enumerate(("c", "g"))]
    assert most_likely_choices(trained, tokenizer, closed, 2, max_length=16) == [0, 0]
    alone = score_examples(trained, tokenizer, closed, 2, max_length=16)
    assert (alone.value, alone.measure) == (0.5, BY_CHOICE)
    mixed = score_examples(trained, tokenizer, [closed[0], LEARNT[0], closed[1], LEARNT[1]], 2, max_length=16)
    assert mixed.value == 0.75
    assert mixed.measure == f"{BY_CHOICE} for 2 examples, {BY_WRITING} for 2"


def test_batching_does_not_change_what_is_written(
    trained: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    examples = [Example("1", "a b", "x"), Example("2", "b a e", "x"), Example("3", "a b", "x")]
    together = written_answers(trained, tokenizer, examples, 3, max_length=16, max_new_tokens=4)
    alone = [written_answers(trained, tokenizer, [e], 1, max_length=16, max_new_tokens=4) for e in examples]
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


def test_answers_longer_than_the_positions_are_refused_beforehand(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigurationError, match=r"38 tokens.*32 positions"):
        check_scorable(fresh(), tokenizer, [Example("1", "a", "b " * 30)], 64, "test set 'self'")


def test_prompts_make_room_for_the_answer_within_the_positions(tokenizer: PreTrainedTokenizerFast) -> None:
    long = [Example("1", "a b " * 40, "c")]
    assert len(written_answers(fresh(), tokenizer, long, 1, max_length=32, max_new_tokens=8)) == 1


def test_tokens_without_a_row_are_refused_beforehand(tokenizer: PreTrainedTokenizerFast) -> None:
    few, examples = fresh(20), [Example("1", "a", "b"), Example("2", "z", "b")]
    with pytest.raises(ModelError, match="test set 'self', example 2"):
        check_scorable(few, tokenizer, examples, 16, "test set 'self'")
    with pytest.raises(ModelError, match="example 1"):
        score_examples(few, tokenizer, [Example("1", "a", "b", ("b", "z"))], 1, max_length=16)


def test_a_model_that_cannot_write_is_refused_beforehand(tokenizer: PreTrainedTokenizerFast) -> None:
    model = fresh()

    def generate(**_: object) -> None:
        raise ValueError("no cache of this kind")

    model.generate = generate
    with pytest.raises(ModelError, match="cannot write answers: ValueError: no cache"):
        check_scorable(model, tokenizer, [Example("1", "a", "b")], 16, "test set 'self'")
    check_scorable(model, tokenizer, [Example("1", "a", "b", ("b", "c"))], 16, "test set 'self'")


def test_nothing_to_score_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigurationError, match="no example"):
        score_examples(fresh(), tokenizer, [], 1, max_length=16)
