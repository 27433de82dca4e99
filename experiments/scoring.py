"""Scoring of answers that a model writes, independent of any tokenizer."""

import re
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from fedmosaic.client.examples import Example, cut_prompt, padding_token, prompt_tokens
from fedmosaic.client.loss import training_mode
from fedmosaic.protos.errors import ConfigurationError

_WORD = re.compile(r"\w+(?:['’.,]\w+)*")
_LETTER = re.compile(r"^(?:\(([a-z])\)|([a-z])[.:)]|([a-z])$)")


def words(text: str) -> list[str]:
    """Words of a text, without case and punctuation; "don't" and "3.5" are one word each."""
    return _WORD.findall(text.casefold())


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


def written_answers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int,
    *,
    max_length: int,
    max_new_tokens: int = 16,
) -> list[str]:
    """Let the model answer, greedily.

    Args:
        model: causal language model; its training mode is restored.
        tokenizer: of the model.
        examples: at least one.
        batch_size: prompts per batch.
        max_length: most tokens of a prompt, cut from the left.
        max_new_tokens: most tokens of an answer.

    Raises:
        ConfigurationError: there is no example.
    """
    if not examples:
        raise ConfigurationError("there is no example to answer; give at least one")
    pad = padding_token(tokenizer)
    prompts = [cut_prompt(tokenizer, prompt_tokens(tokenizer, e.prompt), max_length) for e in examples]
    answers: list[str] = []
    device = next(model.parameters()).device
    with training_mode(model, False), torch.no_grad():
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            longest = max(map(len, batch))
            # Left padding, so that every answer begins right after its prompt.
            ids = torch.tensor([[pad] * (longest - len(p)) + p for p in batch], device=device)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch], device=device)
            out = model.generate(  # type: ignore[no-untyped-call]  # PEFT leaves it untyped
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad,
                eos_token_id=tokenizer.eos_token_id,
            )
            answers += tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    return answers


def mean_word_f1(predictions: Sequence[str], examples: Sequence[Example]) -> float:
    """Mean F1 over examples; every example counts the same."""
    return fmean(word_f1(p, e.answer) for p, e in zip(predictions, examples, strict=True))
