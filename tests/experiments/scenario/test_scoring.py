"""Words and F1: nothing may depend on a tokenizer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmosaic.client.model.examples import Example
from fedmosaic.client.model.scoring import words
from fedmosaic.experiments.scenario.scoring import majority_accuracy, word_f1


def test_f1_of_a_known_pair() -> None:
    # 2 of 3 written words are right, 2 of 4 right words are written: F1 = 2·2/(3+4).
    assert word_f1("The red box", "a red box here") == pytest.approx(4 / 7)


def test_repeated_words_count_as_often_as_they_are_right() -> None:
    assert word_f1("red red red", "red") == pytest.approx(2 / 4)


def test_empty_answers() -> None:
    assert word_f1("", "") == 1.0
    assert word_f1("", "red") == 0.0
    assert word_f1("...", "red") == 0.0


@given(st.text(max_size=40), st.text(max_size=40))
def test_f1_is_symmetric_and_within_bounds(first: str, second: str) -> None:
    assert 0.0 <= word_f1(first, second) <= 1.0
    assert word_f1(first, second) == word_f1(second, first)
    assert word_f1(first, first) == 1.0


def test_words_keep_contractions_and_decimals_together() -> None:
    assert words("Don't pay 3.5, OK?") == ["don't", "pay", "3.5", "ok"]


def test_the_majority_is_what_always_the_most_frequent_answer_scores() -> None:
    answers = ["yes", "yes", "no", "yes"]
    examples = [Example(str(n), "?", answer, ("no", "yes")) for n, answer in enumerate(answers)]
    assert majority_accuracy(examples) == 0.75
    assert majority_accuracy([]) is None
    assert majority_accuracy([*examples, Example("4", "?", "a written answer")]) is None
