"""Scoring of choices."""

import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedmosaic.client.model.evaluation import choice_accuracy, most_likely_choices
from fedmosaic.client.model.examples import Example, answer_tokens, prompt_tokens
from fedmosaic.protos.errors import ConfigurationError, ModelError

SHARED = Path(__file__).parents[3].parent / "shared"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
UNKNOWN = {"unk_token": "<unk>"}
WORDS = ["<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, **UNKNOWN))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, **SPECIAL)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


def random_examples(count: int, choices: tuple[str, ...]) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    examples = []
    for index in range(count):
        length = int(torch.randint(1, 12, (1,), generator=generator))
        letters = torch.randint(3, len(WORDS), (length,), generator=generator).tolist()
        answer = choices[index % len(choices)]
        examples.append(Example(str(index), " ".join(WORDS[letter] for letter in letters), answer, choices))
    return examples


def mean_log_likelihood(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, prompt: str, choice: str
) -> float:
    """One sequence at a time, without padding: the oracle."""
    context, answer = prompt_tokens(tokenizer, prompt), answer_tokens(tokenizer, choice)
    with torch.no_grad():
        logits = model(torch.tensor([context + answer])).logits[0].log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(answer) - 1)
    return sum(float(logits[place, token]) for place, token in zip(places, answer, strict=True)) / len(answer)


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_likelihood_scoring_equals_one_by_one(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    examples = random_examples(20, ("a b c", "a d", "a"))
    expected = []
    for example in examples:
        scores = [mean_log_likelihood(model, tokenizer, example.prompt, choice) for choice in example.choices]
        expected.append(scores.index(max(scores)))
    assert most_likely_choices(model, tokenizer, examples, batch_size) == expected
    assert len(set(expected)) > 1


def test_the_first_token_decides_as_the_full_score_does_for_single_tokens(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    examples = random_examples(30, ("a", "b", "c", "d"))
    fast = most_likely_choices(model, tokenizer, examples, 8)
    assert fast == most_likely_choices(model, tokenizer, examples, 8, scoring="likelihood")
    assert len(set(fast)) > 1


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


def test_first_token_scoring_runs_each_prompt_once(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    counting = Counting(model)
    most_likely_choices(counting, tokenizer, random_examples(10, ("a b", "c d", "e")), 4)
    assert counting.rows == 10
    most_likely_choices(counting, tokenizer, random_examples(10, ("a b", "a d", "e")), 4)
    assert counting.rows == 40


def test_accuracy_counts_the_answers_that_were_chosen(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    examples = random_examples(12, ("a", "b", "c"))
    predictions = most_likely_choices(model, tokenizer, examples, 4)
    right = [
        Example(example.id, example.prompt, example.choices[index], example.choices)
        for example, index in zip(examples, predictions, strict=True)
    ]
    assert choice_accuracy(model, tokenizer, right, 4) == 1.0
    wrong = [
        Example(e.id, e.prompt, e.choices[(e.choices.index(e.answer) + 1) % 3], e.choices) for e in right
    ]
    assert choice_accuracy(model, tokenizer, wrong, 4) == 0.0
    assert choice_accuracy(model, tokenizer, right[:9] + wrong[9:], 4) == pytest.approx(0.75)


def test_permuting_the_choices_permutes_the_prediction(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    examples = random_examples(10, ("a b", "a c", "d"))
    turned = [Example(e.id, e.prompt, e.answer, e.choices[::-1]) for e in examples]
    first = most_likely_choices(model, tokenizer, examples, 3)
    assert [2 - index for index in most_likely_choices(model, tokenizer, turned, 3)] == first


def test_a_long_prompt_is_cut_from_the_left(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    short = [Example("1", "a b c d", "e", ("e", "f"))]
    long = [Example("1", "x y z " * 30 + "a b c d", "e", ("e", "f"))]
    counting = Counting(model)
    assert most_likely_choices(counting, tokenizer, long, 2, max_length=5) == most_likely_choices(
        model, tokenizer, short, 2
    )


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_every_mode_is_given_back(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, training: bool
) -> None:
    dropping = nn.Sequential(model, nn.Dropout())

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = dropping
            self.config = model.config

        def forward(self, **inputs: torch.Tensor) -> object:
            output = self.inner[0](**inputs)
            output.logits = self.inner[1](output.logits)
            return output

    noisy = Noisy().train(training)
    noisy.inner[0].eval()
    examples = random_examples(20, ("a", "b"))
    assert most_likely_choices(noisy, tokenizer, examples, 4) == most_likely_choices(
        model, tokenizer, examples, 4
    )
    assert (noisy.training, noisy.inner[0].training, noisy.inner[1].training) == (training, False, training)


def test_trainable_after_scoring(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    most_likely_choices(model, tokenizer, random_examples(2, ("a", "b")), 2)
    model(torch.tensor([[3, 4, 5]])).logits.sum().backward()
    model.zero_grad()


@pytest.mark.parametrize(
    "example",
    [
        Example("1", "a", "b"),
        Example("1", "a", "b", ("b",)),
        Example("1", "a", "b", ("c", "d")),
        Example("1", "a", "b", ("b", " ")),
        Example("1", "a", "b", ("b", "c " * 80)),
    ],
)
def test_unscorable_examples_are_refused(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, example: Example
) -> None:
    with pytest.raises(ConfigurationError, match="example 1"):
        choice_accuracy(model, tokenizer, [example], 2)


def test_no_example_is_refused(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigurationError, match="no example"):
        choice_accuracy(model, tokenizer, [], 2)


@pytest.mark.parametrize("choices", [("a", "b"), ("a b", "a c")])
def test_a_damaged_model_is_refused_rather_than_scored(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, choices: tuple[str, ...]
) -> None:
    damaged = LlamaForCausalLM(model.config)
    with torch.no_grad():
        damaged.lm_head.weight.fill_(math.nan)
    with pytest.raises(ModelError, match="not finite"):
        choice_accuracy(damaged, tokenizer, random_examples(2, choices), 2)


def test_a_real_tokenizer_and_model() -> None:
    folder = SHARED / "models" / "stories-260k"
    if not folder.exists():
        pytest.skip("the small pretrained model is not in this checkout")
    from fedmosaic.client.model.load import load_base_model

    model, tokenizer = load_base_model(folder)
    story = "Once upon a time there was a little girl named"
    examples = [Example("1", story, "Lily", ("Lily", "Once", "the"))]
    assert choice_accuracy(model, tokenizer, examples, 2, scoring="likelihood") in (0.0, 1.0)
