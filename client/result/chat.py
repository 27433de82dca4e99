"""`fedmosaic chat STATE`: ask the member's model, line by line."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import tyro
from transformers import TextStreamer

from fedmosaic.client.model.examples import Example
from fedmosaic.client.model.scoring import Examiner
from fedmosaic.client.result.saved import Opening
from fedmosaic.protos.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Arguments(Opening):
    """Ask a client's model. Each line is a prompt of its own, as in training; an empty line ends."""

    max_new_tokens: int = 128
    """Most tokens of an answer."""


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic chat` with its arguments."""
    parsed = tyro.cli(Arguments, args=list(arguments), prog="fedmosaic chat")
    if parsed.max_new_tokens < 1:
        raise ConfigurationError(f"--max-new-tokens is {parsed.max_new_tokens}; give at least 1")
    opened = parsed.open()
    saved, terminal = opened.saved, sys.stdin.isatty()
    if terminal:
        print(f"{saved.client} of {saved.federation}, after round {opened.round}. An empty line ends.")
    streamer = TextStreamer(opened.tokenizer, skip_prompt=True, skip_special_tokens=True)
    examiner = Examiner(opened.model, opened.tokenizer, 1, saved.max_length)
    while True:
        print("> " if terminal else "", end="", flush=True)
        prompt = sys.stdin.readline().strip()
        if not prompt:
            return 0
        examiner.written([Example("chat", prompt, "")], parsed.max_new_tokens, streamer)
