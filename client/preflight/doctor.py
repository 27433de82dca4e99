"""`fedmosaic doctor CONFIG`: make every check that a client makes before it enrols, and change nothing."""

import logging
import platform
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

import huggingface_hub.constants
import torch
import tyro
from transformers.utils import logging as transformers_logging

from fedmosaic import __version__
from fedmosaic.client.preflight.checks import Preflight
from fedmosaic.client.progress import Progress
from fedmosaic.client.settings import ClientSettings
from fedmosaic.privacy.configuration import read_configuration
from fedmosaic.protos.errors import FedMosaicError

_COLUMNS: Final = 80
_SERVER_PATIENCE_SECONDS: Final = 5.0
_PACKAGES: Final = ("torch", "transformers", "peft", "opacus", "grpcio")
_INDENT: Final = " " * 20


@dataclass(frozen=True)
class Arguments:
    """Check everything that a client needs, without taking part: nothing is spent, sent or changed.

    Only the federation's server is asked, once, whether it would accept this client. Exit status 0 if a
    client could start, else 1.
    """

    config: tyro.conf.Positional[Path]
    """The client's configuration (TOML or JSON); the README shows one."""


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic doctor` with its arguments."""
    parsed = tyro.cli(Arguments, args=list(arguments), prog="fedmosaic doctor")
    with _on_this_machine():
        return _diagnose(parsed.config)


def _diagnose(path: Path) -> int:
    packages = (f"{name} {version(name)}" for name in _PACKAGES)
    _tell(
        "versions",
        "ok",
        ", ".join([f"fedmosaic {__version__}", f"python {platform.python_version()}", *packages]),
    )
    try:
        settings = read_configuration(path, ClientSettings).located(path.parent)
        settings.check_complete()
    except FedMosaicError as error:
        _tell("configuration", "WRONG", str(error))
        return 1
    _tell("configuration", "ok", str(path))
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory(prefix="fedmosaic-doctor-") as scratch:
        preflight = Preflight(
            settings, Progress(), server_patience_seconds=_SERVER_PATIENCE_SECONDS, scratch=Path(scratch)
        )
        with closing(preflight):
            return 0 if _examine(preflight) else 1


def _examine(preflight: Preflight) -> bool:
    """Make every check that can be made; whether all went well."""
    failed: dict[str, str] = {}
    for check in preflight.checks():
        cause = next((need for need in check.needs if need in failed), None)
        if cause is not None:
            failed[check.name] = cause
            _tell(check.name, "-", f"not checked, because of {failed.get(cause) or cause}")
            continue
        told = len(preflight.warnings)
        try:
            _tell(check.name, "ok", check.run())
        except (FedMosaicError, OSError) as error:
            failed[check.name] = ""
            words = str(error)
            if isinstance(error, OSError):
                words = f"{error.filename or ''}: {error.strerror or error}".lstrip(": ")
            _tell(check.name, "WRONG", words)
        for warning in preflight.warnings[told:]:
            _tell("", "note", warning)
    print()
    print("a client could start" if not failed else "a client could not start; see the lines marked WRONG")
    return not failed


@contextmanager
def _on_this_machine() -> Iterator[None]:
    """Ask no hub, and be quiet: a model that is not here is named, where a client would download it."""
    ours = logging.getLogger("fedmosaic")
    before = (
        huggingface_hub.constants.HF_HUB_OFFLINE,
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
        ours.level,
    )
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    ours.setLevel(logging.ERROR)
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before[0]
        transformers_logging.set_verbosity(before[1])
        if before[2]:
            transformers_logging.enable_progress_bar()
        ours.setLevel(before[3])


def _tell(name: str, state: str, text: str) -> None:
    """One check in lines of at most 80 columns, unless a file's name is longer, which is not broken."""
    told = f"{name:<13} {state:<6}{text}"
    shown = textwrap.fill(
        told, _COLUMNS, subsequent_indent=_INDENT, break_on_hyphens=False, break_long_words=False
    )
    print(shown, flush=True)
