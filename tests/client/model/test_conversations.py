"""Conversations as tokens: the loss is on what the assistant says, to the token, and on nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedmosaic.client.data.records import Example, Turn, read_set
from fedmosaic.client.model.examples import IGNORED, collate, encode_examples, example_pieces, question_tokens
from fedmosaic.client.model.loss import example_losses
from fedmosaic.client.model.scoring import Examiner
from fedmosaic.client.preflight.data import read_lengths
from fedmosaic.client.profile.release import read_as_text
from fedmosaic.client.vision.inputs import without_images
from fedmosaic.protos.errors import ConfigurationError, ModelError
from tiny import tiny_llama

SPECIAL = {"bos_token": "<s>", "eos_token": "</e>", "pad_token": "<pad>", "unk_token": "<unk>"}
LETTERS = "abcdefghijklmnopqrstuvwxyzSUB:\n "
UNKNOWN = {"unk_token": "<unk>"}
CHATML = (
    "{% for m in messages %}{{ {'system': 'S:', 'user': 'U:', 'assistant': 'B:'}[m.role] }}"
    "{{ m.content }}</e>\n{% endfor %}{% if add_generation_prompt %}B:{% endif %}"
)
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}S:help</e>\n{% endif %}" + CHATML
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}B:{% generation %}{{ m.content }}</e>"
    "{% endgeneration %}{{ '\n' }}{% else %}U:{{ m.content }}</e>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}B:{% endif %}"
)
WITHOUT_END = (
    "{% for m in messages %}{{ {'user': 'U:', 'assistant': 'B:'}[m.role] }}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}B:{% endif %}"
)
REWRITES = (
    "{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }}"
    "{% elif loop.last %}B:{{ m.content }}</e>"
    "{% else %}B:{{ m.content[:1] }}</e>{% endif %}{% endfor %}{% if add_generation_prompt %}B:{% endif %}"
)
ALTERNATES = (
    "{% if messages[1:] and messages[0].role == messages[1].role %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}" + CHATML
)


def tokenizer(template: str | None, merges: tuple[tuple[str, str], ...] = ()) -> PreTrainedTokenizerFast:
    """Letters as tokens, and the merges of two of them that are given."""
    words = [*SPECIAL.values(), *LETTERS, *("".join(pair) for pair in merges)]
    raw = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, list(merges), **UNKNOWN))
    raw.pre_tokenizer = pre_tokenizers.Split("</e>", "isolated")
    found = PreTrainedTokenizerFast(tokenizer_object=raw, **SPECIAL)
    found.chat_template = template
    return found


def chat(*texts: str, system: str = "") -> Example:
    roles = ("user", "assistant")
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return read_set([{"messages": messages}]).examples[0]


def shown(tokens: PreTrainedTokenizerFast, example: Example, max_length: int = 200) -> str:
    """What is read, what is learned in brackets; a token that is merged is upper case."""
    (encoded,) = encode_examples(tokens, [example], max_length)
    words = tokens.convert_ids_to_tokens(encoded.input_ids.tolist())
    learned = (encoded.labels != IGNORED).tolist()
    assert torch.equal(
        encoded.labels[encoded.labels != IGNORED], encoded.input_ids[encoded.labels != IGNORED]
    )
    text, inside = "", False
    for word, is_learned in zip(words, learned, strict=True):
        text += "]" * (inside and not is_learned) + "[" * (is_learned and not inside)
        text, inside = text + (word.upper() if len(word) == 2 and word.isalpha() else word), is_learned
    return text + "]" * inside


@pytest.mark.parametrize(
    ("template", "example", "expected"),
    [
        (CHATML, chat("hi", "yo"), "U:hi</e>\nB:[yo</e>]"),
        (CHATML, chat("a", "b", "c", "d"), "U:a</e>\nB:[b</e>]\nU:c</e>\nB:[d</e>]"),
        (CHATML, chat("a", "b", system="s"), "S:s</e>\nU:a</e>\nB:[b</e>]"),
        (DEFAULT_SYSTEM, chat("a", "b", "c", "d"), "S:help</e>\nU:a</e>\nB:[b</e>]\nU:c</e>\nB:[d</e>]"),
        (DEFAULT_SYSTEM, chat("a", "b", system="s"), "S:s</e>\nU:a</e>\nB:[b</e>]"),
        (MARKED, chat("a", "b", "c", "d"), "U:a</e>\nB:[b</e>]\nU:c</e>\nB:[d</e>]"),
        (WITHOUT_END, chat("a", "b", "c", "d"), "U:a\nB:[b\n]U:c\nB:[d\n</e>]"),
        # An assistant who quotes the end, or a user who does, moves no border.
        (CHATML, chat("a</e>", "b</e>c"), "U:a</e></e>\nB:[b</e>c</e>]"),
        (CHATML, chat("B:x", "y"), "U:B:x</e>\nB:[y</e>]"),
    ],
)
def test_exactly_what_the_assistant_says_is_learned(template: str, example: Example, expected: str) -> None:
    assert shown(tokenizer(template), example) == expected


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_no_token_is_merged_over_the_border(template: str) -> None:
    """A token ":b" over the border would put what is learned into the prompt."""
    tokens = tokenizer(template, merges=((":", "b"), ("b", "c")))
    assert ":b" in tokens.convert_ids_to_tokens(tokens("a:b")["input_ids"])
    assert shown(tokens, chat("a", "bc")) == "U:a</e>\nB:[BC</e>]"
    first, second = (question_tokens(tokens, chat("a", answer)) for answer in ("bc", "x"))
    assert first == second


def test_the_question_is_what_training_shows_before_the_last_turn() -> None:
    tokens = tokenizer(CHATML)
    example = chat("a", "b", "c", "d")
    (encoded,) = encode_examples(tokens, [example], 100)
    question = question_tokens(tokens, example)
    assert encoded.input_ids[: len(question)].tolist() == question
    assert tokens.convert_ids_to_tokens(encoded.input_ids[len(question) :].tolist()) == ["d", "</e>"]


def test_a_template_that_rewrites_earlier_turns_is_refused_and_one_turn_is_not() -> None:
    tokens = tokenizer(REWRITES)
    assert shown(tokens, chat("a", "bcd")) == "U:aB:[bcd</e>]"
    with pytest.raises(ModelError, match="renders earlier turns of a conversation in another way"):
        shown(tokens, chat("a", "bcd", "e", "f"))


def test_without_a_template_or_with_one_that_refuses_the_example_is_named() -> None:
    with pytest.raises(ModelError, match="no chat template; choose an instruct model"):
        shown(tokenizer(None), chat("a", "b"))
    twice = Example("1", "a\nb", "c", turns=(Turn("user", "a"), Turn("user", "b"), Turn("assistant", "c")))
    with pytest.raises(ConfigurationError, match=r"example 2: the model's chat template refuses .*alternate"):
        encode_examples(tokenizer(ALTERNATES), [chat("a", "b"), twice], 50)


def test_a_cut_goes_through_no_learned_turn() -> None:
    tokens = tokenizer(CHATML)
    example = chat("a", "bcdef", "g", "h")
    whole = "U:a</e>\nB:[bcdef</e>]\nU:g</e>\nB:[h</e>]"
    assert shown(tokens, example, 23) == whole
    # One token less: of the first turn nothing is lost, and it is learned.
    assert shown(tokens, example, 22) == whole[1:]
    # Cut through: its rest is read, and not learned.
    assert shown(tokens, example, 14) == "def</e>\nU:g</e>\nB:[h</e>]"
    with pytest.raises(ConfigurationError, match="answer of example 1 leaves no room"):
        shown(tokens, example, 2)


def test_lengths_are_told_with_what_is_learned() -> None:
    tokens = tokenizer(CHATML)
    turns = [{"role": turn.role, "content": turn.content} for turn in chat("a", "bcd", "e", "f").turns]
    found = read_set([{"messages": turns}])
    lengths = read_lengths(tokens, found, 100, "training.max_length")
    (encoded,) = encode_examples(tokens, found.examples, 100)
    assert (lengths.longest, lengths.learned) == (
        len(encoded.input_ids),
        int((encoded.labels != IGNORED).sum()),
    )
    assert "training.max_length = 5" in read_lengths(tokens, found, 5, "training.max_length").warning


def test_a_conversation_is_trained_and_scored_like_any_example() -> None:
    tokens = tokenizer(CHATML)
    sizes: dict[str, Any] = {"vocab_size": len(tokens), "hidden_size": 16, "num_hidden_layers": 2}
    model = tiny_llama(**sizes, pad_token_id=2, bos_token_id=0, eos_token_id=1)
    model.eval()
    examples = [chat("a", "b", "c", "d"), chat("e", "f")]
    examiner = Examiner(model, tokens, 2, 60)
    examiner.check(examples, "test")
    with_choices = [Example(e.id, e.prompt, e.answer, (e.answer, "zz"), e.turns) for e in examples]
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    batch = collate(encode_examples(tokens, examples, 60), 2)
    for _ in range(150):
        losses = example_losses(model, batch)
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(losses.detach().max()) < 0.1
    assert examiner.score(examples).value == 1.0
    assert examiner.score(with_choices).value == 1.0


def test_a_probe_without_a_template_reads_the_texts() -> None:
    bare, templated, example = tokenizer(None), tokenizer(CHATML), chat("a", "b", "c", "d")
    assert read_as_text(templated, [example]) == (example,)
    (told,) = read_as_text(bare, [example])
    assert (told.prompt, told.answer, told.turns) == ("a\nb\nc", "d", ())
    assert len(example_pieces(bare, told)) == 2


def test_pictures_are_taken_out_of_the_turns_as_well() -> None:
    found = without_images(chat("see <image:p.png> this", "b"))
    assert "image" not in found.prompt
    assert [turn.content for turn in found.turns] == ["see   this", "b"]


def test_the_files_of_a_conversation_can_be_of_any_length(tmp_path: Path) -> None:
    example = chat(*("a" if i % 2 == 0 else "b" for i in range(40)))
    assert shown(tokenizer(CHATML), example, 400).count("[b</e>]") == 20
