"""Scoring of answers that a model writes, independent of any tokenizer."""

import re
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from fedmosaic.client.model.examples import Example
from fedmosaic.client.model.scoring import words

_LETTER = re.compile(r"^(?:\(([a-z])\)|([a-z])[.:)]|([a-z])$)")


def word_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall over words, repeated words counted.

    Args:
        prediction: what the model wrote.
        answer: what is right.

    Returns:
        F1 in [0, 1]; 1 if both are without words, 0 if one is.
    """
    written, right = Counter(words(prediction)), Counter(words(answer))
    if not written or not right:
        return float(written == right)
    common = (written & right).total()
    return 2.0 * common / (written.total() + right.total())


def parse_option(text: str, choices: Sequence[str]) -> int | None:
    """Which of the choices a written answer names.

    The whole answer, then a leading letter marked as one ("(B)", "B." or "B" alone), then the one
    choice whose words stand in the answer as whole words. A choice inside another choice that is also there
    ("york" in "new york") does not count. Several or none: no choice.

    Args:
        text: what the model wrote.
        choices: two or more, different in their words.

    Returns:
        Index of the choice, or None.
    """
    said = words(text)
    options = [words(choice) for choice in choices]
    if said in options:
        return options.index(said)
    letter = _LETTER.match(text.strip().casefold())
    if letter is not None:
        index = ord(letter[letter.lastindex or 0]) - ord("a")
        if index < len(choices):
            return index
    found = [i for i, option in enumerate(options) if _holds(said, option)]
    longest = [i for i in found if not any(i != j and _holds(options[j], options[i]) for j in found)]
    return longest[0] if len(longest) == 1 else None


def _holds(sequence: list[str], part: list[str]) -> bool:
    return bool(part) and any(
        sequence[start : start + len(part)] == part for start in range(len(sequence) - len(part) + 1)
    )


def mean_word_f1(predictions: Sequence[str], examples: Sequence[Example]) -> float:
    """Mean F1 over examples; every example counts the same."""
    return fmean(word_f1(p, e.answer) for p, e in zip(predictions, examples, strict=True))
