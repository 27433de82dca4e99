"""Where the public text of an alignment comes from: a file, the anchor itself, or nowhere at all."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedmosaic.alignment.tokens import PublicText
from fedmosaic.client.model.examples import padding_token
from fedmosaic.privacy.configuration import decode_text, parse_json
from fedmosaic.protos.errors import ConfigurationError

Synthetic = Literal["generated", "random_tokens"]

_FEWEST_CHARACTERS: Final = 20
_MOST_CHARACTERS: Final = 20_000
_GENERATED_AT_ONCE: Final = 32
_RANDOM_TOKENS: Final = 64
# All that a model's folder may say of sampling, so that the text is the model's own.
_SAMPLED: Final = {
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
}


def read_public_text(path: Path, samples: int) -> tuple[PublicText, ...]:
    """Read public text; which samples are taken depends on their content alone, not on their order.

    `.jsonl` has the keys `prompt` and `answer`, or `text`, per line; any other file is plain text, one sample
    per line, lines of fewer than 20 characters left out.
    """
    if samples < 1:
        raise ConfigurationError(f"samples is {samples}; alignment needs at least 1 public text.")
    try:
        lines = decode_text(path.read_bytes()).splitlines()
    except OSError as error:
        raise ConfigurationError(
            f"The public text {path} cannot be read ({error.strerror}); give UTF-8 text or JSON lines."
        ) from None
    except ValueError as error:
        raise ConfigurationError(f"The public text {path} cannot be read: {error}.") from None
    if path.suffix == ".jsonl":
        found = [_parse(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        found = [
            PublicText(line.strip()[:_MOST_CHARACTERS])
            for line in lines
            if len(line.strip()) >= _FEWEST_CHARACTERS
        ]
    distinct = {text_digest([text]): text for text in found}
    if not distinct:
        raise ConfigurationError(f"{path} holds no public text; give hundreds of lines.")
    return tuple(text for _, text in sorted(distinct.items())[:samples])


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    *,
    max_length: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[PublicText, ...]:
    """Let the anchor write the text: sampled at temperature 1 from a begin token and one random token.

    A few fewer samples than asked for where the anchor ends at once. `ConfigurationError` if it wrote
    nothing.
    """
    begin = tokenizer.bos_token_id if isinstance(tokenizer.bos_token_id, int) else tokenizer.eos_token_id
    if not isinstance(begin, int):
        raise ConfigurationError("The anchor's tokenizer has no token to begin a text with; give --data.")
    device = next(model.parameters()).device
    tokens = _ordinary_tokens(tokenizer)
    texts: list[PublicText] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, samples, _GENERATED_AT_ONCE):
            first = tokens[torch.randint(len(tokens), (min(_GENERATED_AT_ONCE, samples - start),))]
            prompt = torch.stack([torch.full_like(first, begin), first], dim=1).to(device)
            # transformers types generate() for one of its many return forms only.
            rows = model.generate(  # type: ignore[operator]  # transformers' mixin
                prompt,
                attention_mask=torch.ones_like(prompt),
                **_SAMPLED,
                max_new_tokens=max(1, max_length - 2),
                pad_token_id=padding_token(tokenizer),
            )
            texts += _decoded(tokenizer, rows.cpu().tolist())
            if progress is not None:
                progress(start + len(first), samples)
    if not texts:
        raise ConfigurationError("The anchor generated no text; give a file of public text with --data.")
    return tuple(texts)


def random_token_text(
    tokenizer: PreTrainedTokenizerBase, samples: int, *, seed: int
) -> tuple[PublicText, ...]:
    """Text of uniformly random tokens of the anchor."""
    generator = torch.Generator().manual_seed(seed)
    tokens = _ordinary_tokens(tokenizer)
    rows = tokens[torch.randint(len(tokens), (samples, _RANDOM_TOKENS), generator=generator)]
    return tuple(_decoded(tokenizer, rows.tolist()))


def text_digest(texts: Sequence[PublicText]) -> str:
    """SHA-256 over texts in order, in hexadecimal."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(json.dumps([text.prompt, text.text]).encode() + b"\n")
    return digest.hexdigest()


def _ordinary_tokens(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    special = set(tokenizer.all_special_ids)
    return torch.tensor([token for token in range(len(tokenizer)) if token not in special])


def _decoded(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[PublicText]:
    decoded = (str(tokenizer.decode(list(row), skip_special_tokens=True)).strip() for row in rows)
    return [PublicText(text) for text in decoded if len(text) >= _FEWEST_CHARACTERS]


def _parse(line: str, path: Path, number: int) -> PublicText:
    where = f"{path}, line {number}"
    try:
        record = parse_json(line)
    except ValueError as error:
        raise ConfigurationError(f"{where} is not JSON ({error}); write one JSON object per line.") from None
    if not isinstance(record, dict):
        raise ConfigurationError(f"{where} is a {type(record).__name__}; write a JSON object.")
    text, prompt = record.get("answer", record.get("text")), record.get("prompt", "")
    if not isinstance(text, str) or not isinstance(prompt, str) or not text.strip():
        raise ConfigurationError(
            f"{where}: give 'text', or 'prompt' and 'answer', as text that is not empty."
        )
    return PublicText(text[:_MOST_CHARACTERS], prompt[:_MOST_CHARACTERS])
