"""`python -m fedmosaic.server`: run the server of a federation until its run is over, or until told."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from fedmosaic.privacy.configuration import read_configuration
from fedmosaic.privacy.terminal import guarded
from fedmosaic.protos.errors import FedMosaicError
from fedmosaic.server.server import Server
from fedmosaic.server.settings import ServerSettings

log = logging.getLogger("fedmosaic.server")


class _JsonLines(logging.Formatter):
    """One JSON object per line, for programs that read logs."""

    def format(self, record: logging.LogRecord) -> str:
        content = {
            "time": record.created,
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            content["traceback"] = self.formatException(record.exc_info)
        return json.dumps(content)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the server.

    Exit status: 0 when the run is over or after SIGTERM or SIGINT, 1 if the server could not start or go
    on, 3 when the run is over and nothing was exchanged.
    """
    parser = argparse.ArgumentParser(prog="fedmosaic server", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--kit", type=Path, metavar="DIR", help="the server's kit, made by `fedmosaic keys init`"
    )
    source.add_argument("--settings", type=Path, metavar="FILE", help="complete settings, TOML or JSON")
    parser.add_argument("--log-format", choices=("text", "json"), default="text", help="default: text")
    parsed = parser.parse_args(arguments)
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s")
    handler.setFormatter(_JsonLines() if parsed.log_format == "json" else plain)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    try:
        return Server(parsed.kit or read_configuration(parsed.settings, ServerSettings)).serve()
    except FedMosaicError as error:
        log.error("%s", error)
        return 1


if __name__ == "__main__":
    sys.exit(guarded("fedmosaic server", main))
