"""`fedmosaic client CONFIG`: take part in a federation as one client."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from transformers.utils.logging import disable_progress_bar

from fedmosaic.client.client import Client
from fedmosaic.client.result.ending import last_lines
from fedmosaic.protos.errors import NOTHING_EXCHANGED


@dataclass(frozen=True)
class Arguments:
    """Take part in a federation as one client, until its last round. Stop and start it as you like."""

    config: tyro.conf.Positional[Path]
    """The client's configuration (TOML or JSON); the README shows one."""


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic client` with its arguments."""
    return take_part(Client(tyro.cli(Arguments, args=list(arguments), prog="fedmosaic client").config))


def take_part(client: Client) -> int:
    """Run a client as a command: log to the terminal, print the last lines, return the exit status."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)-7s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        force=True,
    )
    disable_progress_bar()
    result = client.run()
    print(last_lines(result.state, result.adapter, result.comparison, result.statement))
    return 0 if result.received_rounds else NOTHING_EXCHANGED
