"""Examples: reading, encoding, padding."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from fedmosaic.client.model.examples import (
    IGNORED,
    EncodedExample,
    Example,
    collate,
    encode_examples,
    length_buckets,
    padding_token,
    prompt_tokens,
    read_examples,
    read_public_examples,
)
from fedmosaic.protos.errors import ConfigurationError, ModelError
from tiny import word_tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
CHAT_TEMPLATE = (
    "{% for message in messages %}user {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}bot{% endif %}"
)
WORDS = ["<s>", "</s>", "<pad>", "<unk>", "user", "bot", *"abcdefghijklmnopqrstuvwxyz"]


def make_tokenizer(chat: bool = False, bos: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = word_tokenizer(WORDS, **SPECIAL)
    if bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tokens(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def write(path: Path, *records: object) -> Path:
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "record",
    [
        {"id": "1", "prompt": "  ", "answer": "secret"},
        {"id": 1, "prompt": "secret", "answer": "a"},
        {"id": "1", "prompt": "secret", "answer": "a", "choices": "a"},
        {"id": "1", "prompt": "secret", "answer": "a", "secret": 1},
        {"id": "1", "answer": "secret"},
        ["secret"],
    ],
)
def test_a_bad_record_is_refused_by_line_without_its_contents(tmp_path: Path, record: object) -> None:
    good = {"id": "0", "prompt": "p", "answer": "a"}
    with pytest.raises(ConfigurationError, match="line 2") as caught:
        read_examples(write(tmp_path / "data.jsonl", good, record))
    assert "secret" not in str(caught.value)


def test_private_text_is_not_in_the_representation() -> None:
    assert "secret" not in repr(Example("1", "secret", "secret", ("secret",)))


def test_only_answer_and_end_are_supervised() -> None:
    (encoded,) = encode_examples(make_tokenizer(), [Example("1", "a b c", "d e")], 16)
    assert encoded.input_ids.tolist() == tokens("<s> a b c d e </s>")
    assert encoded.labels.tolist() == [IGNORED] * 4 + tokens("d e </s>")


def test_the_chat_template_is_used_without_a_second_start_token() -> None:
    (encoded,) = encode_examples(make_tokenizer(chat=True), [Example("1", "a b", "d")], 16)
    assert encoded.input_ids.tolist() == tokens("user a b bot d </s>")
    assert encoded.labels.tolist() == [IGNORED] * 4 + tokens("d </s>")


def test_an_end_token_that_the_tokenizer_adds_is_taken_off_the_prompt() -> None:
    tokenizer = make_tokenizer(bos=False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    assert prompt_tokens(tokenizer, "a b") == tokens("a b")


@settings(max_examples=40)
@given(prompt=st.integers(1, 12), answer=st.integers(1, 4), room=st.integers(3, 20))
def test_the_answer_survives_any_truncation(prompt: int, answer: int, room: int) -> None:
    example = Example("1", " ".join("abcdefghijkl"[:prompt]), " ".join("wxyz"[:answer]))
    if room < answer + 2:
        with pytest.raises(ConfigurationError, match="leaves no room"):
            encode_examples(make_tokenizer(), [example], room)
        return
    (encoded,) = encode_examples(make_tokenizer(), [example], room)
    assert len(encoded.input_ids) == min(room, 1 + prompt + answer + 1)
    assert encoded.labels[-answer - 1 :].tolist() == tokens(example.answer + " </s>")
    assert (encoded.labels[: -answer - 1] == IGNORED).all()
    context = encoded.input_ids[: -answer - 1].tolist()
    if len(context) > 1:
        assert context == [0, *tokens(example.prompt)[-(len(context) - 1) :]]
    else:
        assert context == tokens(example.prompt)[-1:]


@pytest.mark.parametrize("example", [Example("1", "", "a"), Example("1", "a", " ")])
def test_empty_texts_are_refused(example: Example) -> None:
    with pytest.raises(ConfigurationError, match="example 2 has an empty"):
        encode_examples(make_tokenizer(), [Example("0", "a", "b"), example], 16)
    with pytest.raises(ConfigurationError, match="no example"):
        encode_examples(make_tokenizer(), [], 16)


def test_padding_token_falls_back_to_the_end() -> None:
    tokenizer = make_tokenizer()
    assert padding_token(tokenizer) == 2
    tokenizer.pad_token = None
    assert padding_token(tokenizer) == 1
    tokenizer.eos_token = None
    with pytest.raises(ModelError):
        padding_token(tokenizer)
    with pytest.raises(ModelError, match="end-of-sequence"):
        encode_examples(tokenizer, [Example("1", "a", "b")], 16)


def test_collate_pads_on_the_right() -> None:
    rows = [
        EncodedExample("1", torch.tensor([5, 6, 7]), torch.tensor([IGNORED, 6, 7])),
        EncodedExample("2", torch.tensor([8, 9]), torch.tensor([IGNORED, 9])),
    ]
    batch = collate(rows, 2)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    with pytest.raises(ModelError, match="empty batch"):
        collate([], 2)


@given(lengths=st.lists(st.integers(1, 50), max_size=30), batch_size=st.integers(1, 7))
def test_buckets_are_a_partition_sorted_by_length(lengths: list[int], batch_size: int) -> None:
    buckets = list(length_buckets(lengths, batch_size))
    flat = [index for bucket in buckets for index in bucket]
    assert sorted(flat) == list(range(len(lengths)))
    assert all(1 <= len(bucket) <= batch_size for bucket in buckets)
    assert [lengths[index] for index in flat] == sorted(lengths, reverse=True)
    with pytest.raises(ConfigurationError, match="batch_size is 0"):
        list(length_buckets(lengths, 0))


GOOD = b'{"id":"a","prompt":"p","answer":"b"}'
BAD_LINES = {
    "half a character": b'{"id":"a","prompt":"secret \\ud83d","answer":"x"}',
    "half a character in the id": b'{"id":"a\\ud83d","prompt":"secret","answer":"x"}',
    "5,000 digits": b'{"id":"a","prompt":"secret","answer":"b","choices":[' + b"9" * 5000 + b"]}",
    "deep nesting": b'{"id":"a","prompt":"secret","answer":"b","choices":' + b"[" * 100_000,
    "an open string": b'{"id":"a","prompt":"secret',
    "NaN": b'{"id":"a","prompt":"secret","answer":NaN}',
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_lines_that_the_decoder_refuses_in_its_own_ways_are_named(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(GOOD.replace(b'"a"', b'"0"') + b"\n" + line)
    with pytest.raises(ConfigurationError, match=r"x\.jsonl, line 2 is not JSON") as error:
        read_examples(tmp_path / "x.jsonl")
    assert "secret" not in str(error.value)
    assert error.value.__cause__ is None


def test_byte_order_marks_are_no_part_of_the_data(tmp_path: Path) -> None:
    second = GOOD.replace(b'"a"', b'"c"').replace(b'p"', 'p\u2028q"'.encode())
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\xef\xbb\xbf" + second + b"\r\n")
    read = [(e.id, e.prompt) for e in read_examples(tmp_path / "x.jsonl")]
    assert read == [("a", "p"), ("c", "p\u2028q")], "nor is a separator of lines an end of one"


@pytest.mark.parametrize("content", [GOOD.decode().encode("utf-16"), b"\xff" * 9, b"", b"\n\n"], ids=repr)
def test_what_is_no_text_names_the_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"x\.jsonl"):
        read_examples(tmp_path / "x.jsonl")
    for place, words in ((tmp_path, "Is a directory"), (tmp_path / "absent.jsonl", "cannot read")):
        with pytest.raises(ConfigurationError, match=words):
            read_examples(place)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("Answers", "unknown key 'Answers'; did you mean 'answer'\\? Use id, prompt"),
        ("label", "unknown key 'label'; use id, prompt, answer, choices, messages, person only"),
        ("Mrs Smith", "unknown key number 4; use .* or name in \\[data.columns\\] the columns to be read"),
    ],
)
def test_an_unknown_key_is_named_where_it_is_nobody_s_text(key: str, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"id": "1", "prompt": "p", "answer": "a", key: 1})
    with pytest.raises(ConfigurationError, match=words):
        read_examples(path)


def test_public_examples_need_no_id(tmp_path: Path) -> None:
    sums = [{"prompt": f"{n}+{n}?", "answer": f"{n + n}"} for n in (2, 3, 4)]
    path = write(tmp_path / "x.jsonl", *sums[:2], sums[2] | {"id": "mine"})
    assert [example.id for example in read_public_examples(path)] == ["line-1", "line-2", "mine"]
    with pytest.raises(ConfigurationError, match="line 3 has an id that rows before it lack; name every"):
        read_examples(path)
