"""Converters: what becomes an example, and that training and test never share a text or a group."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmosaic.client.model.examples import read_examples
from fedmosaic.experiments.demo.corpora import commands, conversations, news
from fedmosaic.experiments.scenario.participants import write_examples
from fedmosaic.experiments.tasks.labelled import (
    ClassificationTask,
    LabelledText,
    distinct,
    sentences,
    shorten,
    split,
)
from fedmosaic.protos.errors import ConfigurationError

TASK = ClassificationTask(name="t", opening="Text", question="A or b?", choices=("a", "b"))


def texts(count: int, per_group: int = 3) -> list[LabelledText]:
    return [LabelledText(f"text {i}", "ab"[i % 2], f"group {i // per_group}") for i in range(count)]


# Labelled texts


def test_texts_that_differ_in_case_and_punctuation_are_one() -> None:
    items = [
        LabelledText(text, "a", "g") for text in ("It's GREAT!", "its great", "It s great", "", "...", "x")
    ]
    seen: set[str] = set()
    assert [item.text for item in distinct(items, seen)] == ["It's GREAT!", "its great", "x"]
    assert list(distinct(items, seen)) == []


@given(st.text(max_size=80), st.integers(1, 40))
def test_a_shortened_text_fits_and_is_a_beginning(text: str, characters: int) -> None:
    short = shorten(text, characters)
    assert len(short) <= characters
    assert text.startswith(short)
    assert shorten("one two, three", 9) == shorten("one two", 7) == "one two"


def test_sentences_end_where_a_space_follows() -> None:
    assert sentences("Rose 3.5% in 2004.  Why? Nobody\nknows") == [
        "Rose 3.5% in 2004.",
        "Why?",
        "Nobody knows",
    ]
    assert sentences("  ") == []


@given(st.permutations(texts(60)))
@settings(max_examples=20)
def test_a_split_does_not_depend_on_the_order(items: list[LabelledText]) -> None:
    assert split(TASK, items, 20, 4) == split(TASK, texts(60), 20, 4)


@pytest.mark.parametrize(
    ("items", "rows", "message"),
    [
        (texts(100), (3, 2), "3 training rows cannot be balanced"),
        (texts(100), (2, 3), "3 test rows cannot be balanced"),
        (texts(10), (20, 2), "training texts in its smallest class, 10 are needed"),
        ([LabelledText(x, "c", x) for x in "xy"], (2, 2), "not among its choices"),
        ([], (2, 2), "has 0 training texts"),
    ],
)
def test_what_cannot_be_split_is_refused(
    items: list[LabelledText], rows: tuple[int, int], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        split(TASK, items, *rows)


def test_examples_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    examples = tuple(
        TASK.example(LabelledText(text, "a", "g")) for text in ("ünï “code”\u2028x", 'quote"\\', "tab\t")
    )
    write_examples(path, examples)
    assert read_examples(path) == examples


# News


def article(folder: str, number: int, content: str | bytes) -> tuple[str, bytes]:
    encoded = content if isinstance(content, bytes) else content.encode()
    return f"{news.PREFIX}{folder}/{number:03}.txt", encoded


def test_an_article_becomes_its_headline_and_the_start_of_its_first_sentence() -> None:
    body = "The club signed a striker for £3m after weeks of talks. He starts on Sunday."
    (item,) = news.topics([article("sports", 1, f"Striker signs\n\n{body}\n\nMore.")])
    assert item.text == "Striker signs. The club signed a striker for £3m after weeks of talks."
    assert (item.label, item.group) == ("sport", "news striker signs")


def test_latin_1_articles_are_read_and_repeated_headlines_are_not() -> None:
    articles = [
        article("tech", 1, "Chips\n\nPrices fell by £5 this week.".encode("latin-1")),
        article("business", 2, "CHIPS!\n\nThe same story once more."),
        article("tech", 3, "Headline only\n"),
        article("weather", 4, "Rain\n\nIt rains."),
    ]
    items = list(news.topics(articles))
    assert [(item.text, item.label) for item in items] == [
        ("Chips. Prices fell by £5 this week.", "technology")
    ]


def test_long_news_are_cut_to_length() -> None:
    (item,) = news.topics([article("politics", 1, "Long\n\n" + "word " * 100)])
    assert len(item.text) <= 120
    assert item.text.endswith("word")


# Commands


def grammar(templates: list[str], **parts: object) -> bytes:
    record = {
        "intents": {"HassLightSet": {"data": [{"sentences": templates}]}, "HassOther": {"data": []}},
        "expansion_rules": {"the": "(the|my)", "loop": "<loop>"},
        "lists": {
            "level": {"range": {"from": 10, "to": 30, "step": 10}},
            "hue": {"values": [{"in": "red"}, "blue"]},
        },
    }
    return json.dumps(record | parts).encode()


def drawn(template: str) -> set[str]:
    items = list(commands.device_commands(grammar([template])))
    assert {(item.label, item.group) for item in items} <= {("light", f"command {template}")}
    return {item.text for item in items}


@pytest.mark.parametrize(
    ("template", "language"),
    [
        ("dim", {"dim"}),
        (
            "(dim|brighten) <the> lamp[s]",
            {f"{v} {t} lamp{s}" for v in ("dim", "brighten") for t in ("the", "my") for s in ("", "s")},
        ),
        ("(red;lamp)", {"red lamp", "lamp red"}),
        (
            "lamp [to] {level:brightness}[%| percent]",
            {f"lamp {to}{n}{p}" for to in ("", "to ") for n in (10, 20, 30) for p in ("", "%", " percent")},
        ),
        ("[a|an] {hue}", {f"{a}{h}" for a in ("", "a ", "an ") for h in ("red", "blue")}),
        ("((a|b)|c)", {"a", "b", "c"}),
    ],
)
def test_sentences_belong_to_the_language_of_their_template(template: str, language: set[str]) -> None:
    sentences_drawn = drawn(template)
    assert sentences_drawn <= language
    assert len(sentences_drawn) >= min(len(language), 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a grammar"),
        (b"[]", "not a grammar"),
        (b'{"intents": {}}', "not a grammar"),
        (grammar(["(a|b"]), "unbalanced"),
        (grammar(["a)"]), "unbalanced"),
        (grammar(["(a]"]), "unbalanced"),
        (grammar(["<a"]), "unbalanced"),
        (grammar(["<nothing>"]), "a rule that it does not hold"),
        (grammar(["<loop>"]), "name each other"),
        (grammar(["{nothing}"]), "list without values"),
    ],
)
def test_a_grammar_that_is_not_as_expected_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        list(commands.device_commands(content))


# Conversations


def subject(name: str, content: str) -> tuple[str, bytes]:
    return f"{conversations.PREFIX}{name}.yml", content.encode()


def test_short_questions_are_taken_once_with_their_first_answer() -> None:
    content = """
conversations:
- ["What is history?", The course of events., A second answer.]
- ["what is HISTORY", Something else.]
- [Too short, x]
- ["No?", Shorter than eight characters.]
- [A question without an answer]
- ["Is a number an answer?", 1963]
- ["Are two lines\\nallowed?", "No."]
"""
    examples = list(conversations.conversations([subject("history", content), subject("gossip", content)]))
    assert [(e.prompt, e.answer, e.choices) for e in examples] == [
        ("What is history?", "The course of events.", ()),
        ("Too short", "x", ()),
    ]


@pytest.mark.parametrize("content", ["a: [", "other: []", "- x", "conversations: 5", "conversations: [5]"])
def test_conversations_that_are_not_as_expected_are_refused(content: str) -> None:
    with pytest.raises(ConfigurationError, match="does not hold conversations"):
        list(conversations.conversations([subject("ai", content)]))
