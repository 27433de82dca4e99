"""Scoring of answers that a model writes, independent of any tokenizer; what no model would score."""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from fedmosaic.client.model.examples import Example
from fedmosaic.client.model.scoring import words


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


def mean_word_f1(predictions: Sequence[str], examples: Sequence[Example]) -> float:
    """Mean F1 over examples; every example counts the same."""
    return fmean(word_f1(p, e.answer) for p, e in zip(predictions, examples, strict=True))


def majority_accuracy(examples: Sequence[Example]) -> float | None:
    """Share of examples whose answer is the most frequent one: what always giving that answer would score.

    Args:
        examples: a test set.

    Returns:
        Accuracy in [0, 1]; None where an example has no choices, or there is none.
    """
    if not examples or not all(example.choices for example in examples):
        return None
    return Counter(example.answer for example in examples).most_common(1)[0][1] / len(examples)
