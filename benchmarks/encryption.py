"""Encrypted aggregation against the same work in the clear, with TenSEAL and with Flower.

    python -m benchmarks.encryption [--ranks 16 32 128] [--members 10 100] [--json FILE]

All systems run in one process on one thread, and times are processor time, so that other work on the machine
disturbs them little; the fastest repetition and, in brackets, the median. The server's time covers all
recipients, from uploads in bytes to aggregates in bytes, with every check that the product makes; `ingest`
and `arithmetic` are parts of it, measured alone. Plain numpy makes no checks at all; the back end `plain` is
the same server without encryption.

Memory that is freed is kept by the process, except in the column `server, fresh`: there all of it was handed
back to the operating system before, as in a server whose last round is some time ago.

Flower's row appears if Flower can be imported. It wants other versions of shared packages than this project,
so put it beside the environment, without its dependencies:

    pip install --no-deps --target build/flower flwr==1.42.0 iterators pycryptodome httpx
    PYTHONPATH=build/flower python -m benchmarks.encryption
"""

import benchmarks.single_thread  # noqa: F401  # before numpy

# isort: split

import argparse
import dataclasses
import datetime
import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.encryption_peers import PEERS
from benchmarks.encryption_work import NOTHING, Cell, Timing, Work, keep_memory, make_work
from fedmosaic.experiments.scenario.metrics import markdown_table
from fedmosaic.privacy.encryption.aggregators import create_aggregator
from fedmosaic.privacy.encryption.ciphers import create_cipher, generate_group_secret
from fedmosaic.privacy.encryption.ckks.expansion import expand_seed
from fedmosaic.privacy.encryption.ckks.modular import modular_matrix_product
from fedmosaic.privacy.encryption.mask.aggregation import WordProduct
from fedmosaic.privacy.encryption.parameters import (
    CkksParameters,
    MaskParameters,
    Parameters,
    PlainParameters,
)
from fedmosaic.privacy.encryption.records import RoundContext, ring_blocks
from fedmosaic.privacy.groupkey.key import GroupKey
from fedmosaic.privacy.policy import AggregationPolicy
from fedmosaic.protos.messages import WeightRow

OURS: tuple[Parameters, ...] = (CkksParameters(), MaskParameters(), PlainParameters())


def ours(work: Work, parameters: Parameters) -> Cell:
    """Measure one of our back ends through its public interface."""
    policy = AggregationPolicy()
    context = RoundContext("benchmark", 1, 0, "shared", work.dimensions)
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
    rows = work.rows(parameters.weight_bits)

    def check() -> None:
        for name, upload in uploads.items():
            aggregator.check_upload(upload, context, name)

    def server() -> list[memoryview]:
        check()
        return aggregator.aggregate(uploads, rows, context)

    weights = _matrix(work, rows)
    download = server()[0]
    found = ciphers[0].decrypt(download, key, context, rows[work.names[0]])
    clear = np.ldexp(weights[0].astype(np.float64), -parameters.weight_bits) @ work.vectors
    return Cell(
        f"{parameters.backend} (back end)" if parameters.backend == "plain" else parameters.backend,
        *work.size,
        work.measure(lambda: ciphers[0].encrypt(work.vectors[0], key, context, bytes(16))),
        len(uploads[work.names[0]]),
        work.measure(check) + _expansion(work, parameters),
        _arithmetic(work, parameters, weights),
        work.measure(server, 2),
        len(download),
        work.measure(lambda: ciphers[0].decrypt(download, key, context, rows[work.names[0]])),
        float(np.abs(found - clear).max()),
        server_fresh=work.measure_fresh(server),
    )


def _matrix(work: Work, rows: Mapping[str, WeightRow]) -> np.ndarray:
    column = {name: index for index, name in enumerate(work.names)}
    weights = np.zeros((work.members, work.members), dtype=np.int64)
    for target, row in zip(weights, rows.values(), strict=True):
        target[[column[name] for name in row.contributors]] = row.weights
    return weights


def _expansion(work: Work, parameters: Parameters) -> Timing:
    if not isinstance(parameters, CkksParameters):
        return NOTHING
    words = np.empty(ring_blocks(parameters, work.dimensions) * parameters.ring_degree, dtype=np.uint64)
    one = work.measure(lambda: expand_seed(bytes(32), 0, words, parameters.modulus))
    return one.scaled(work.members)


def _arithmetic(work: Work, parameters: Parameters, weights: np.ndarray) -> Timing:
    generator = np.random.default_rng(0)
    if isinstance(parameters, CkksParameters):
        # In parts of four ring elements, as the aggregator does; every part costs the same.
        blocks = ring_blocks(parameters, work.dimensions)
        part = min(4, blocks) * parameters.ring_degree
        residues = generator.integers(0, parameters.modulus, (work.members, part), dtype=np.uint64)
        one = work.measure(lambda: modular_matrix_product(weights, residues, parameters.modulus))
        return one.scaled(2 * blocks * parameters.ring_degree / part)
    if isinstance(parameters, PlainParameters):
        values = work.vectors.astype(np.float32)
        shares = np.ldexp(weights.astype(np.float32), -parameters.weight_bits)
        return work.measure(lambda: shares @ values)
    words = list(generator.integers(-(1 << 31), 1 << 31, (work.members, work.dimensions), dtype=np.int32))
    product, sums = WordProduct(), list(np.empty((work.members, work.dimensions), dtype=np.uint32))
    return work.measure(lambda: product(weights, words, sums))


def bars(cells: Sequence[Cell]) -> list[tuple[str, float, str, bool]]:
    """Compare the cells with the figures that were promised: what, value, limit, kept."""
    by = {(cell.system, cell.rank, cell.members): cell for cell in cells}
    found: list[tuple[str, float, str, bool]] = []

    def at_most(what: str, value: float, limit: float) -> None:
        found.append((what, value, f"≤ {limit:g}", value <= limit))

    def at_least(what: str, value: float, limit: float) -> None:
        found.append((what, value, f"≥ {limit:g}", value >= limit))

    ckks, raw = (by.get((name, 16, 10)) for name in ("ckks", "TenSEAL 8192 [60,40,40] (NVFlare's)"))
    if ckks:
        at_most("ckks r16 N10 upload / float32", ckks.upload_bytes / (4 * ckks.dimensions), 1.65)
        at_most("ckks r16 N10 download / float32", ckks.download_bytes / (4 * ckks.dimensions), 3.3)
        at_most("ckks r16 N10 error", ckks.error, 1e-5)
        round_ms = 1e3 * (ckks.encrypt + ckks.server + ckks.decrypt).least
        at_most("ckks r16 N10 encrypt + server + decrypt, ms", round_ms, 20)
    if ckks and raw:
        faster = raw.server.least / ckks.server.least
        at_least("ckks r16 N10 server, times faster than TenSEAL's", faster, 20)
        at_least("ckks r16 N10 upload, times smaller than TenSEAL's", raw.upload_bytes / ckks.upload_bytes, 9)
    for members, limit in ((10, 5.0), (100, 2.0)):
        names = ("mask", "plain numpy (float32)", "plain (back end)")
        mask, numpy, plain = (by.get((name, 16, members)) for name in names)
        if mask and numpy and plain:
            label = f"mask r16 N{members}"
            at_most(f"{label} upload / float32", mask.upload_bytes / (4 * mask.dimensions), 1.02)
            values = mask.download_bytes - 16 * (members - 1)
            at_most(f"{label} download / float32, less nonces", values / (4 * mask.dimensions), 1.02)
            if mask.server_fresh and numpy.server_fresh:
                fresh = mask.server_fresh.least / numpy.server_fresh.least
                at_most(f"{label} server / numpy's without checks, fresh memory", fresh, limit)
            kept = mask.server.least / numpy.server.least
            at_most(f"{label} server / numpy's without checks, memory kept", kept, limit)
            at_most(f"{label} server / back end plain's", mask.server.least / plain.server.least, limit)
    return found


def growth(cells: Sequence[Cell]) -> list[tuple[str, int, int, float]]:
    """Server time per N²·d, relative to the first cell of the system: at most 1 means no faster growth."""
    result = []
    for system in dict.fromkeys(cell.system for cell in cells):
        mine = [cell for cell in cells if cell.system == system]
        rate = [cell.server.least / (cell.members**2 * cell.dimensions) for cell in mine]
        result += [(system, c.rank, c.members, r / rate[0]) for c, r in zip(mine, rate, strict=True)]
    return result


def table(cells: Sequence[Cell]) -> list[str]:
    """Format cells as a Markdown table."""

    def ms(timing: Timing | None) -> str:
        return f"{1e3 * timing.least:.3g} ({1e3 * timing.median:.3g})" if timing is not None else "–"

    heads = [
        "system", "r", "N", "encrypt ms", "upload bytes (× float32)", "ingest ms", "arithmetic ms",
        "server ms", "server, fresh ms", "download bytes (×)", "decrypt ms", "error",
    ]  # fmt: skip
    rows = [
        [
            f"{cell.system}{' *' if cell.note else ''}", str(cell.rank), str(cell.members), ms(cell.encrypt),
            f"{cell.upload_bytes:,} ({cell.upload_bytes / (4 * cell.dimensions):.2f})", ms(cell.ingest),
            ms(cell.arithmetic), ms(cell.server), ms(cell.server_fresh),
            f"{cell.download_bytes:,} ({cell.download_bytes / (4 * cell.dimensions):.2f})",
            ms(cell.decrypt), f"{cell.error:.1e}",
        ]
        for cell in cells
    ]  # fmt: skip
    notes = [f"* {c.system}, r {c.rank}, N {c.members}: {c.note}" for c in cells if c.note]
    return [*markdown_table(heads, rows), *(["", *notes] if notes else [])]


def results(cells: Sequence[Cell]) -> str:
    """Format the table, the figures that were promised, and the growth."""
    promised = [[w, f"{v:.3g}", limit, "kept" if k else "**missed**"] for w, v, limit, k in bars(cells)]
    grown = [[system, str(rank), str(n), f"{rate:.2f}"] for system, rank, n, rate in growth(cells)]
    return "\n".join(
        [
            *table(cells),
            "",
            *markdown_table(["promised", "measured", "limit", ""], promised),
            "",
            "Server time per N²·d, relative to the first line of each system (above 1 grows faster):",
            "",
            *markdown_table(["system", "r", "N", ""], grown),
        ]
    )


def note(cells: Sequence[Cell], command: str) -> str:
    """Format a page that says what was measured, where and when, and how to read it."""
    explanation = (__doc__ or "").split("\n\n")
    return (
        "\n\n".join(
            [
                "# Encrypted aggregation, measured",
                f"Written by `{command}` on {datetime.date.today().isoformat()}: {_machine()}.",
                *(" ".join(part.split()) for part in explanation[2:]),
                results(cells),
                _READING.strip(),
            ]
        )
        + "\n"
    )


def _machine() -> str:
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        processor = found.group(1) if found else platform.machine()
    except OSError:
        processor = platform.processor() or platform.machine()
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{os.cpu_count()} processors ({processor}){load}, one thread"


_READING = """
## How to read it

`mask` computes exact sums of 32-bit words with weights of 12 bits, 44 bits in all. float32 holds 24, so the
product is one in float64, which takes about twice as long as one in float32. Three float32 products over
limbs of 12 bits would take three times as long, and numpy has no fast integer product. That is all that
encryption adds to the arithmetic. The rest of the server's time at rank 16 is what any server with our
interface does, `plain (back end)` included: it checks 2 N headers and N weight rows of N − 1 names,
digests the rows, and writes N headers. It grows with N², not with d.

Plain numpy does none of this, and spends most of its own time on the memory of its arrays when that is fresh:
three of 4·N·d bytes. `mask` keeps its working memory. So the ratio to plain numpy depends on whether the C
library keeps freed memory; both cases are in the table, and the limits are held against both. The third line,
against the same server without encryption, compares equal work.

Downloads of `mask` carry one nonce of 16 bytes per contributor, as the promise says "plus nonces".
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print or write its results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 128])
    parser.add_argument("--members", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of repetitions per operation")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--note", type=Path, help="write a Markdown page with all tables to this file")
    options = parser.parse_args(arguments)
    keep_memory()
    cells: list[Cell] = []
    for members in options.members:
        for rank in options.ranks:
            work = make_work(rank, members, options.budget)
            cells += [cell for peer in PEERS if (cell := peer(work)) is not None]
            cells += [ours(work, parameters) for parameters in OURS]
            print(f"measured rank {rank}, {members} members", flush=True)
    print(results(cells))
    if options.note:
        command = " ".join(["python -m benchmarks.encryption", *(arguments or sys.argv[1:])])
        options.note.write_text(note(cells, command), encoding="utf-8")
    if options.json:
        content: dict[str, Any] = {
            "machine": {"processor": platform.processor() or platform.machine(), "load": os.getloadavg()},
            "cells": [dataclasses.asdict(cell) for cell in cells],
            "bars": [dict(zip(("what", "value", "limit", "kept"), bar, strict=True)) for bar in bars(cells)],
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
