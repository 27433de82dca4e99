"""Spans of two tokenizers over the same text: properties on mixed scripts, spaces and byte fallback."""

import functools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fedmosaic.alignment.tokens import PublicText, align, align_ranges, render, shared_text
from fedmosaic.client.model.examples import Example, encode_examples
from fedmosaic.protos.errors import ModelError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CORPUS = ["the cat sat on the mat", "a naïve café in 東京", "мама мыла раму", "x = 1;  y = 2", "emoji 🙂 end"]
TEXTS = st.text(
    alphabet=st.sampled_from(list("the catsonm naïvé 東京мамаы=1;🙂\t\n") + [" "] * 6),
    min_size=1,
    max_size=40,
)
SHARED = Path(__file__).parents[2].parent / "shared"


def byte_level(vocab_size: int) -> PreTrainedTokenizerFast:
    """As GPT-2, Qwen and SmolLM: bytes, merged, the space at the front of a word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2: characters and words after a marker of space; unknown characters as bytes."""
    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"thecasonmxy=1;2"]
    vocab = {piece: index for index, piece in enumerate([*pieces, "▁t", "▁th", "▁the"])}
    tokenizer = Tokenizer(
        models.BPE(vocab, [("▁", "t"), ("▁t", "h"), ("▁th", "e")], byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


FAST = {"small": byte_level(280), "large": byte_level(400), "fallback": byte_fallback()}
PAIRS = [(a, b) for a in FAST for b in FAST if a < b]


def characters(text: str, ranges: tuple[tuple[int, int] | None, ...], positions: tuple[int, ...]) -> set[int]:
    return {
        index
        for position in positions
        for start, end in [ranges[position] or (0, 0)]
        for index in range(start, end)
        if not text[index].isspace()
    }


@pytest.mark.parametrize("pair", PAIRS)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_spans_stand_for_the_same_characters_once_each(pair: tuple[str, str], text: str) -> None:
    sample = PublicText(text)
    left, right = (render(FAST[name], sample, 500) for name in pair)
    spans = align_ranges(text, left.ranges, right.ranges)
    for side in range(2):
        used = [position for span in spans for position in span[side]]
        assert len(used) == len(set(used))
        assert used == sorted(used)
    for a, b in spans:
        assert a
        assert b
        assert characters(text, left.ranges, a) == characters(text, right.ranges, b) != set()


@pytest.mark.parametrize("name", FAST)
@settings(max_examples=40, deadline=None)
@given(text=TEXTS)
def test_a_tokenizer_aligned_with_itself_matches_every_visible_character(name: str, text: str) -> None:
    rendering = render(FAST[name], PublicText(text), 500)
    spans = align_ranges(text, rendering.ranges, rendering.ranges)
    assert all(a == b for a, b in spans)
    covered = set().union(*(characters(text, rendering.ranges, a) for a, _ in spans)) if spans else set()
    assert covered == characters(text, rendering.ranges, tuple(range(len(rendering.ranges))))


@pytest.mark.parametrize(
    ("text", "left", "right", "spans"),
    [
        (
            "abcdef gh",
            [(0, 2), (2, 4), (4, 6), (6, 9)],
            [(0, 1), (1, 2), (2, 6), (7, 8), (8, 9)],
            [((0,), (0, 1)), ((1, 2), (2,)), ((3,), (3, 4))],
        ),
        # A character of several bytes is one span.
        ("東a", [(0, 1), (0, 1), (0, 1), (1, 2)], [(0, 1), (1, 2)], [((0, 1, 2), (0,)), ((3,), (1,))]),
        # The right side lacks "b", so "ab" covers more than "a"; space alone stands for nothing.
        ("ab cd", [(0, 2), (2, 3), (3, 5)], [(0, 1), (3, 5)], [((2,), (1,))]),
        ("ab cd", [None, (0, 5)], [None], []),
        ("", [], [], []),
    ],
)
def test_spans_are_the_finest_common_ones(text: str, left: Any, right: Any, spans: Any) -> None:
    assert align_ranges(text, left, right) == spans


def test_tokens_of_real_text_match_word_by_word() -> None:
    sample = PublicText("the cat sat on the mat")
    left, right = render(FAST["large"], sample, 99), render(FAST["fallback"], sample, 99)
    spans = align(sample, left, right)
    assert len(spans) >= 5
    assert all(0 not in a and 0 not in b for a, b in spans)


TEMPLATE = "<s>user: {{ messages[0]['content'] | trim }} assistant:"


def with_template(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerBase:
    copy = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **SPECIAL)
    copy.chat_template = TEMPLATE
    return copy


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("max_length", [200, 12])
def test_a_prompt_is_read_as_in_training(template: bool, max_length: int) -> None:
    tokenizer = with_template(FAST["large"]) if template else FAST["large"]
    example = Example("1", " the cat  sat on the mat?", "on the mat")
    rendering = render(tokenizer, PublicText(example.answer, example.prompt), max_length - 1)
    [encoded] = encode_examples(tokenizer, [example], max_length)
    # Training adds the end of sequence, which has no place in the text.
    assert list(rendering.input_ids) == encoded.input_ids.tolist()[:-1]
    first = int((encoded.labels != -100).nonzero()[0])
    assert rendering.supervised_from == first
    assert rendering.landmark == first - 1


def test_templates_differ_but_contents_and_the_answers_place_match() -> None:
    sample = PublicText("on the mat", " the cat?")
    plain, wrapped = render(FAST["large"], sample, 99), render(with_template(FAST["fallback"]), sample, 99)
    spans = align(sample, plain, wrapped)
    text = shared_text(sample)
    for a, b in spans[:-1]:
        assert characters(text, plain.ranges, a) == characters(text, wrapped.ranges, b) != set()
    assert spans[-1] == ((plain.landmark,), (wrapped.landmark,))
    assert wrapped.ranges[1] is None


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="fast tokenizer"):
        render(Slow(), PublicText("a"), 9)  # type: ignore[arg-type]  # the point


@functools.cache
def _real(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.mark.real_models
@settings(max_examples=80, deadline=None)
@given(text=TEXTS)
def test_real_tokenizers_share_every_visible_character(text: str) -> None:
    folders = [SHARED / "models" / name for name in ("stories-15m", "minimind2-small")]
    if not all(folder.is_dir() for folder in folders):
        pytest.skip("needs the pretrained models beside the repository")
    if not text.strip():
        return
    left, right = (render(_real(folder), PublicText(text), 500) for folder in folders)
    spans = align_ranges(text, left.ranges, right.ranges)
    covered = set().union(*(characters(text, left.ranges, a) for a, _ in spans))
    assert covered == {index for index, character in enumerate(text) if not character.isspace()}
