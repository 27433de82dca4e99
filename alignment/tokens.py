"""One public text as the tokens of two models, and which of their positions mean the same characters.

Both tokenizers read the same characters, and a fast tokenizer says which of them each token stands for. So
nothing has to be searched: the finest spans on which both sides agree are the connected components of
overlapping character ranges. Space around a token is left out of its range, because tokenizers disagree on
whether it belongs to the word before or after; bytes of one character overlap and thereby fall together.

Reference: arXiv 2506.11024, appendix on cross-family alignment, which compares token strings by dynamic
programming (as FuseLLM does). Character ranges give the same spans where the strings are equal, and also
where they are not: byte fallback, normalisation, markers of space.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from fedmosaic.client.model.examples import rendered_prompt
from fedmosaic.protos.errors import ModelError

CharacterRange = tuple[int, int]
SpanPair = tuple[tuple[int, ...], tuple[int, ...]]
"""Token positions of one model and of the other that stand for the same characters."""


@dataclass(frozen=True)
class PublicText:
    """One public sample: a plain text, or an answer and the prompt that the model reads before it."""

    text: str = field(repr=False)
    prompt: str = field(default="", repr=False)


@dataclass(frozen=True)
class Rendering:
    """A public text as one model reads it.

    Attributes:
        input_ids: T tokens.
        ranges: For each token its half-open character range in the text both models read, or None where it
            stands for none of it (special tokens, words of a chat template).
        supervised_from: First position whose token the model is to predict: 1, or the answer's.
        landmark: Position that predicts the answer's first token; None for a plain text.
    """

    input_ids: tuple[int, ...] = field(repr=False)
    ranges: tuple[CharacterRange | None, ...] = field(repr=False)
    supervised_from: int
    landmark: int | None


def render(tokenizer: PreTrainedTokenizerBase, sample: PublicText, max_length: int) -> Rendering:
    """Tokenise a public text as `fedmosaic.client.model.examples` does, and keep the character ranges.

    A chat template is used for a prompt if there is one. Of at least 3 tokens, a plain text is cut at its
    end, a prompt at its beginning. `ModelError` if the tokenizer is slow, or the text leaves no token.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} cannot say which characters its tokens stand for; alignment needs a "
            "fast tokenizer (a tokenizer.json in the model's folder)."
        )
    if not sample.prompt:
        ids, ranges = _tokenise(tokenizer, sample.text, special=True)
        if not ids:
            raise ModelError("A public text has no tokens; leave empty texts out.")
        return Rendering(ids[:max_length], ranges[:max_length], 1, None)
    ids, ranges = _tokenise_prompt(tokenizer, sample.prompt)
    start = len(sample.prompt) + 1
    answer_ids, answer_ranges = _tokenise(tokenizer, sample.text, special=False)
    answer_ids, answer_ranges = answer_ids[: max_length - 1], answer_ranges[: max_length - 1]
    room = max_length - len(answer_ids)
    keep = _kept(ids, room, tokenizer.bos_token_id)
    shifted = tuple(
        None if found is None else (found[0] + start, found[1] + start) for found in answer_ranges
    )
    return Rendering(
        input_ids=tuple(ids[i] for i in keep) + answer_ids,
        ranges=tuple(ranges[i] for i in keep) + shifted,
        supervised_from=len(keep),
        landmark=len(keep) - 1,
    )


def shared_text(sample: PublicText) -> str:
    """The characters that the ranges of a rendering count."""
    return f"{sample.prompt}\n{sample.text}" if sample.prompt else sample.text


def align(sample: PublicText, left: Rendering, right: Rendering) -> list[SpanPair]:
    """Positions of both models that stand for the same characters, and the positions that predict the answer.

    In the order of the text. The first position of each model is left out: it is an attention sink, whose
    state is like no other.
    """
    pairs = align_ranges(shared_text(sample), left.ranges, right.ranges)
    if left.landmark is not None and right.landmark is not None:
        # What the adapter changes there decides the answer, though the token itself may be the template's.
        pairs.append(((left.landmark,), (right.landmark,)))
    return [pair for pair in pairs if 0 not in pair[0] and 0 not in pair[1]]


def align_ranges(
    text: str, left: Sequence[CharacterRange | None], right: Sequence[CharacterRange | None]
) -> list[SpanPair]:
    """The finest spans of tokens of two sequences that stand for the same characters, in order.

    Ranges are half-open and count the text, None for tokens that stand for nothing. Tokens of mere space, and
    tokens whose characters the other sequence does not cover exactly, are in no span.
    """
    intervals = sorted(
        [(*found, 0, position) for found, position in _trimmed(text, left)]
        + [(*found, 1, position) for found, position in _trimmed(text, right)]
    )
    pairs: list[SpanPair] = []
    component: list[tuple[int, int, int, int]] = []
    reach = -1
    for interval in intervals:
        if component and interval[0] >= reach:
            pairs.extend(_as_pair(text, component))
            component = []
        component.append(interval)
        reach = max(reach, interval[1])
    pairs.extend(_as_pair(text, component))
    return pairs


def _as_pair(text: str, component: Iterable[tuple[int, int, int, int]]) -> list[SpanPair]:
    positions: tuple[list[int], list[int]] = ([], [])
    covered: tuple[set[int], set[int]] = (set(), set())
    for start, end, side, position in component:
        positions[side].append(position)
        covered[side].update(index for index in range(start, end) if not text[index].isspace())
    if not positions[0] or not positions[1] or covered[0] != covered[1]:
        return []
    return [(tuple(sorted(positions[0])), tuple(sorted(positions[1])))]


def _trimmed(text: str, ranges: Sequence[CharacterRange | None]) -> Iterable[tuple[CharacterRange, int]]:
    for position, found in enumerate(ranges):
        if found is None:
            continue
        start, end = max(0, found[0]), min(len(text), found[1])
        while start < end and text[start].isspace():
            start += 1
        while end > start and text[end - 1].isspace():
            end -= 1
        if start < end:
            yield (start, end), position


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool
) -> tuple[tuple[int, ...], tuple[CharacterRange | None, ...]]:
    encoding = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    ids = tuple(int(token) for token in encoding["input_ids"])
    ranges = tuple((start, end) if end > start else None for start, end in encoding["offset_mapping"])
    if special and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        return ids[:-1], ranges[:-1]
    return ids, ranges


def _tokenise_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str
) -> tuple[tuple[int, ...], tuple[CharacterRange | None, ...]]:
    if not tokenizer.chat_template:
        return _tokenise(tokenizer, prompt + "\n", special=True)
    text = rendered_prompt(tokenizer, prompt)
    ids, ranges = _tokenise(tokenizer, text, special=False)
    # A template may strip what it wraps; the last occurrence is the user's turn, not a system prompt.
    content = prompt.strip()
    place, lead = text.rfind(content), prompt.find(content)
    if place < 0:
        return ids, (None,) * len(ids)
    return ids, tuple(_within(found, place, place + len(content), lead - place) for found in ranges)


def _within(found: CharacterRange | None, start: int, end: int, shift: int) -> CharacterRange | None:
    if found is None or found[0] < start or found[1] > end:
        return None
    return found[0] + shift, found[1] + shift


def _kept(ids: Sequence[int], room: int, begin: int | None) -> list[int]:
    """Positions of a prompt that stay when it is cut from the left, as `client.examples.cut_prompt` cuts."""
    room = max(1, room)
    if len(ids) <= room:
        return list(range(len(ids)))
    if room > 1 and ids[0] == begin:
        return [0, *range(len(ids) - room + 1, len(ids))]
    return list(range(len(ids) - room, len(ids)))
