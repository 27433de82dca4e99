"""`python -m fedmosaic.server`: run the server of a federation until its run is over, or until told."""

import argparse
import asyncio
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fedmosaic.privacy.configuration import read_configuration
from fedmosaic.privacy.terminal import guarded
from fedmosaic.protos.errors import FedMosaicError
from fedmosaic.server.from_kit import settings_from_kit
from fedmosaic.server.native_log import translated_native_log
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

    Args:
        arguments: command line without the program's name; `sys.argv` by default.

    Returns:
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
    # Read by gRPC when it is first imported, hence the import below. TLS 1.3 suites are not chosen by this
    # list; for TLS 1.2 it leaves only one that a P-256 certificate cannot serve, so that nobody falls back.
    os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES256-GCM-SHA384"
    from fedmosaic.server.network.serving import serve

    with translated_native_log() as stream:
        handler = logging.StreamHandler(stream)
        plain = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s")
        handler.setFormatter(_JsonLines() if parsed.log_format == "json" else plain)
        logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
        try:
            if parsed.kit is not None:
                settings = settings_from_kit(parsed.kit)
            else:
                settings = read_configuration(parsed.settings, ServerSettings)
            return asyncio.run(serve(settings))
        except FedMosaicError as error:
            log.error("%s", error)
            return 1


if __name__ == "__main__":
    sys.exit(guarded("fedmosaic server", main))
