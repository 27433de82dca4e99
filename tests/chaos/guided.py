"""`make chaos GUIDED=30`: mutations of every call and format that follow what code they reach, with atheris.

For so many seconds each, in a process of its own; exit status 1 if anything but our own refusal was raised.
"""

import os
import re
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["fedmosaic"], enable_loader_override=False):
    from chaos import formats
    from chaos.mutations import MEMBER, record, where
    from chaos.received import received
    from end_to_end import federation_of_vectors as fv
    from fedmosaic.privacy.terminal import ending_children
    from fedmosaic.protos.errors import FedMosaicError
    from fedmosaic.server.server import Server
    from fedmosaic.server.settings import settings_from_kit


def contents(directory: Path, kept: dict[str, list[bytes]]) -> dict[str, Any]:
    """Every call and format: an original, and what reads it."""
    run = fv.coordinator_of(directory)
    return (
        formats.calls(run, kept) | received(directory, run, kept, MEMBER) | formats.readers(directory, kept)
    )


def recorded(directory: Path) -> tuple[dict[str, list[bytes]], list[str]]:
    """What a federation that stops in its second round has sent, and all names; gRPC begins here."""
    settings = settings_from_kit(directory / "server").model_copy(update={"durable": False})
    with Server(settings).background() as port:
        kept = record(directory, port)
    return kept, list(contents(shutil.copytree(directory, directory.with_name("named")), kept))


def fuzz(place: Path, name: str, original: bytes, read: formats.Reader, seconds: int) -> None:
    """Mutate one for so long; what is no refusal is told once for each place it comes from. Never returns."""
    found = set[str]()
    (place / "corpus").mkdir()
    (place / "corpus" / "original").write_bytes(original)

    def once(content: bytes) -> None:
        try:
            read(content)
        except FedMosaicError:
            pass
        except Exception as error:
            if where(error) not in found:
                found.add(where(error))
                (place / f"fault-{len(found)}").write_bytes(content)
                print(f"FAULT {name}: {where(error)}: {error}", file=sys.stderr, flush=True)

    atheris.Setup([name, f"-max_total_time={seconds}", "-rss_limit_mb=0", str(place / "corpus")], once)
    atheris.Fuzz()


@ending_children()
def main(seconds: int) -> int:
    """All of them, one after the other; a line for each."""
    place, faults = Path(tempfile.mkdtemp(prefix="fedmosaic-guided-")), 0
    origin = formats.found_federation(place / "origin")
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        kept, names = pool.submit(recorded, origin).result()
    for number, name in enumerate(names):
        log = place / f"{number}.log"
        if not (child := os.fork()):
            os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 2)
            directory = shutil.copytree(origin, place / str(number))
            original, read = contents(directory, kept)[name]
            fuzz(directory, name, original, read, seconds)
        os.waitpid(child, 0)
        said = log.read_text(errors="replace")
        marks = re.findall(r"^#(\d+)\s+(?:INITED|DONE)\s+(cov: \d+)", said, re.MULTILINE)
        told = re.findall("^FAULT .*", said, re.MULTILINE) + ["FAULT: it ended early"] * ("DONE" not in said)
        faults += len(told)
        reached = "; ".join(f"{tried} tried, {edges}" for tried, edges in marks)
        print(f"{name:45s} {reached}", *told, sep="\n  ", flush=True)
    print(f"{len(names)} targets, {faults} faults; what the runs left is in {place}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
