"""Encrypted aggregation against the same work in the clear, and with TenSEAL.

    OMP_NUM_THREADS=1 python -m benchmarks.encryption [--ranks 16 32 128] [--members 10 100] [--note FILE.md]

All systems run in one process on one thread, and times are processor time, so that other work on the machine
disturbs them little; the fastest repetition and, in brackets, the median. The server's time covers all
recipients, from uploads in bytes to aggregates in bytes, with every check that the product makes. Plain numpy
makes no checks at all; the back end `plain` is the same server without encryption.
"""

import datetime
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmarks.encryption_peers import PEERS, Cell, Work, make_work
from benchmarks.timing import Timing
from fedmosaic.experiments.scenario.metrics import markdown_table
from fedmosaic.privacy.encryption.aggregators import create_aggregator
from fedmosaic.privacy.encryption.ciphers import create_cipher, generate_group_secret
from fedmosaic.privacy.encryption.parameters import (
    CkksParameters,
    MaskParameters,
    Parameters,
    PlainParameters,
)
from fedmosaic.privacy.encryption.records import RoundContext
from fedmosaic.privacy.groupkey.key import GroupKey
from fedmosaic.privacy.policy import AggregationPolicy

OURS: tuple[Parameters, ...] = (CkksParameters(), MaskParameters(), PlainParameters())


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    ranks: tuple[int, ...] = (16, 32, 128)
    members: tuple[int, ...] = (10, 100)
    note: Path | None = None
    """Write a Markdown page with all tables."""


def ours(work: Work, parameters: Parameters) -> Cell:
    """Measure one of our back ends through its public interface."""
    policy, rows = AggregationPolicy(), work.rows(parameters.weight_bits)
    context = RoundContext("benchmark", 1, 0, "shared", work.size[2])
    secret = generate_group_secret(parameters)
    key = GroupKey(
        "benchmark", 1, work.names, parameters.digest(), bytes(32), bytes(32), os.urandom(32), secret
    )
    ciphers = [create_cipher(parameters, name, policy, allow_plaintext=True) for name in work.names]
    uploads = {
        name: cipher.encrypt(vector, key, context, os.urandom(16))
        for name, cipher, vector in zip(work.names, ciphers, work.vectors, strict=True)
    }
    aggregator = create_aggregator(parameters, policy, allow_plaintext=True)

    def server() -> list[memoryview]:
        for name, upload in uploads.items():
            aggregator.check_upload(upload, context, name)
        return aggregator.aggregate(uploads, rows, context)

    first, own, download = work.names[0], ciphers[0], server()[0]
    row = rows[first]
    shares = {name: weight / 2**row.bits for name, weight in zip(row.contributors, row.weights, strict=True)}
    clear = np.array([shares.get(name, 0.0) for name in work.names]) @ work.vectors
    return Cell(
        f"{parameters.backend} (back end)" if parameters.backend == "plain" else parameters.backend,
        *work.size,
        work.measure(lambda: own.encrypt(work.vectors[0], key, context, bytes(16))),
        len(uploads[first]),
        work.measure(server, 2),
        len(download),
        work.measure(lambda: own.decrypt(download, key, context, row)),
        float(np.abs(own.decrypt(download, key, context, row) - clear).max()),
    )


def results(cells: Sequence[Cell]) -> list[str]:
    """The table as lines of Markdown."""

    def ms(timing: Timing) -> str:
        return f"{1e3 * timing.least:.3g} ({1e3 * timing.median:.3g})"

    heads = ["system", "r", "N", "encrypt ms", "upload bytes (× float32)", "server ms"]
    heads += ["download bytes (×)", "decrypt ms", "error"]
    rows = [
        [
            f"{cell.system}{' *' if cell.note else ''}",
            str(cell.rank),
            str(cell.members),
            ms(cell.encrypt),
            f"{cell.upload_bytes:,} ({cell.upload_bytes / (4 * cell.dimensions):.2f})",
            ms(cell.server),
            f"{cell.download_bytes:,} ({cell.download_bytes / (4 * cell.dimensions):.2f})",
            ms(cell.decrypt),
            f"{cell.error:.1e}",
        ]
        for cell in cells
    ]
    notes = [f"* {c.system}, r {c.rank}, N {c.members}: {c.note}" for c in cells if c.note]
    return [*markdown_table(heads, rows), "", *notes]


def note(cells: Sequence[Cell], command: str) -> str:
    """Format a page that says what was measured, where and when, and how to read it."""
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    processor = found.group(1) if found else platform.machine()
    machine = f"{os.cpu_count()} processors ({processor}), load average {os.getloadavg()[0]:.1f}, one thread"
    return "\n\n".join(
        [
            "# Encrypted aggregation, measured",
            f"Written by `{command}` on {datetime.date.today().isoformat()}: {machine}.",
            *(" ".join(part.split()) for part in (__doc__ or "").split("\n\n")[2:]),
            "\n".join(results(cells)),
            "[How to read it](encryption.md#the-cost-read).\n",
        ]
    )


def main() -> None:
    """Run the benchmark and print or write its results."""
    arguments = tyro.cli(Arguments, description=__doc__)
    cells: list[Cell] = []
    for members in arguments.members:
        for rank in arguments.ranks:
            work = make_work(rank, members)
            cells += [peer(work) for peer in PEERS]
            cells += [ours(work, parameters) for parameters in OURS]
            print(f"measured rank {rank}, {members} members", file=sys.stderr)
    print("\n".join(results(cells)))
    if arguments.note:
        command = " ".join(["python -m benchmarks.encryption", *sys.argv[1:]])
        arguments.note.write_text(note(cells, command), encoding="utf-8")


if __name__ == "__main__":
    main()
