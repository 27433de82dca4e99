"""`python -m benchmarks.waiting`: one server process under load, over gRPC and mutual TLS, with no model.

All members but one push and wait in `Pull`; the last one pushes, and the time from its receipt to every
answer is the round's overhead. With `--pushes`, so many members send adapters of `--mib` MiB at once instead.
Clients are coroutines of two processes, on the same machine as the server, which takes time from it.
"""

import asyncio
import contextlib
import multiprocessing
import os
import queue
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import tyro
from grpc import aio

from fedmosaic.experiments.scenario.metrics import markdown_table
from fedmosaic.privacy.encryption.ciphers import create_cipher
from fedmosaic.privacy.encryption.records import RoundContext
from fedmosaic.privacy.federation.consortium import create
from fedmosaic.privacy.federation.kits import FederationConfig, Kit, MemberEntry, open_kit
from fedmosaic.privacy.federation.roster import Roster
from fedmosaic.privacy.federation.terms import Terms
from fedmosaic.privacy.mechanism.profile import ProfileMechanism, Reduction
from fedmosaic.protos import bounds, wire
from fedmosaic.protos.messages import PROTOCOL_VERSION, Profile, Section
from fedmosaic.protos.signing import sign_upload
from fedmosaic.protos.v1 import federation_pb2 as pb
from fedmosaic.protos.v1.federation_pb2_grpc import FederationStub

_WORKERS: Final = 2
_SETTLE_SECONDS: Final = 3.0
_CALL_SECONDS: Final = 600.0
_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Arguments:
    """Put one server under load and tell how long rounds take and how much memory it needs."""

    clients: tuple[int, ...] = (50, 200, 1000)
    """Numbers of waiting members."""
    rounds: int = 4
    """Rounds of each federation; only the first one brings new profiles."""
    pushes: int = 0
    """Members that push at once, in place of rounds."""
    mib: int = 16
    """Size of each of these adapters."""


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark with its arguments."""
    parsed = tyro.cli(Arguments, args=list(arguments), prog="python -m benchmarks.waiting")
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    if parsed.pushes:
        rows = _measure(parsed.pushes, 1, parsed.mib << 20)
    else:
        rows = [row for count in parsed.clients for row in _measure(count, parsed.rounds, 0)]
    heads = ["members", "round", "push, s", "first, ms", "median, ms", "last, ms", "server's CPU, ms"]
    heads += ["memory at its peak, MB", "run.json, kB", "state, MB", "load"]
    print("\n".join(markdown_table(heads, rows, numbers=True)))
    return 0


def _measure(count: int, rounds: int, size: int) -> list[list[str]]:
    """One federation, founded and run; a row per round."""
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(_WORKERS + 1), context.Queue()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        members = tuple(f"m{number:04d}" for number in range(count))
        entries = tuple(MemberEntry(id=member) for member in members)
        config = FederationConfig(federation="waiting", members=entries, terms=_terms(rounds, size))
        create(config, place / "f")
        with _server(place) as (process, port):
            for index in range(_WORKERS):
                names = members[index::_WORKERS]
                settings = (place / "f", port, names, rounds, index == 0, barrier, answers)
                context.Process(target=_work, args=settings, daemon=True).start()
            return [
                [str(count), str(number), *_round(process.pid, place, barrier, answers)]
                for number in range(1, rounds + 1)
            ]


def _terms(rounds: int, size: int) -> Terms:
    """Plain adapters of `size` bytes, or of some hundred."""
    shape = {"rank": 4, "blocks": 2, "target_modules": ("a", "b")}
    if size:
        # blocks · modules · (r² + r) float32 numbers
        shape = {"rank": 256, "blocks": max(1, size // (4 * (256**2 + 256))), "target_modules": ("a",)}
    reduction = Reduction(hidden_size=8, intermediate_size=16, projection_dimensions=32)
    profile = ProfileMechanism(probe="none", probe_sha256="0" * 64, reduction=reduction, noise_multiplier=1.0)
    schedule = {"rounds": rounds + 1, "quorum": 4, "round_deadline_seconds": 3000}
    return Terms.model_validate(
        {
            "adapter": {**shape, "protection": "none"},
            "profile": profile,
            "schedule": schedule,
            "encryption": {"backend": "plain"},
            "allow_plaintext": True,
        }
    )


@contextmanager
def _server(place: Path) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    (place / "f/server/server.toml").write_text('listen = "127.0.0.1:0"\nstate_dir = "state"\n')
    log = place / "server.log"
    command = [sys.executable, "-m", "fedmosaic.server", "--kit", str(place / "f/server")]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)  # noqa: S603  # our own module
    try:
        while "listening on" not in log.read_text():
            if process.poll() is not None:
                raise RuntimeError(f"the server did not start: {log.read_text()[-500:]}")
            time.sleep(0.1)
        line = next(line for line in log.read_text().splitlines() if "listening on" in line)
        yield process, int(line.rpartition("port ")[2])
    finally:
        process.terminate()
        process.wait(60)


def _round(server: int, place: Path, barrier: Any, answers: Any) -> list[str]:
    peak = [0.0]
    pushed = max(_heard(answers, server, peak) for _ in range(_WORKERS))
    time.sleep(_SETTLE_SECONDS)
    before = _usage(server)
    barrier.wait()
    told = [_heard(answers, server, peak) for _ in range(_WORKERS)]
    after = _usage(server)
    receipt = max(seconds for seconds, _ in told)
    times = sorted(1000 * (when - receipt) for _, found in told for when in found)
    time.sleep(0.5)
    state = place / "f/server/state"
    size = sum(path.stat().st_size for path in state.rglob("*.*") if "spool" not in path.parts)
    barrier.wait()
    numbers = [times[0], statistics.median(times), times[-1], 1000 * (after[0] - before[0]), *peak]
    numbers.append((state / "run.json").stat().st_size / 1000)
    told_numbers = [f"{value:.0f}" for value in numbers]
    return [f"{pushed:.1f}", *told_numbers, f"{size / 1e6:.1f}", f"{os.getloadavg()[0]:.1f}"]


def _heard(answers: Any, server: int, peak: list[float]) -> Any:
    """What a worker tells; meanwhile the server's memory is watched."""
    while True:
        peak[0] = max(peak[0], _usage(server)[1])
        with contextlib.suppress(queue.Empty):
            return answers.get(timeout=0.05)


def _usage(process: int) -> tuple[float, float]:
    """Processor seconds, and megabytes of memory beside mapped files, of a process."""
    stat = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return (int(stat[11]) + int(stat[12])) / _TICKS, int(status["RssAnon"].split()[0]) / 1024


def _work(*arguments: Any) -> None:
    asyncio.run(_clients(*arguments))


async def _clients(
    place: Path, port: int, names: Sequence[str], rounds: int, first: bool, barrier: Any, answers: Any
) -> None:
    """The members of one process; the first process has the member that pushes last."""
    roster = open_kit(place / "server").roster
    members = [_Member(open_kit(place / "clients" / name), roster, name, port) for name in names]
    await _all([member.enrol() for member in members], 40)
    for number in range(1, rounds + 1):
        await _all([member.pull(number) for member in members], 200)
        late, early = (members[:1], members[1:]) if first else ([], members)
        started = time.monotonic()
        await _all([member.push(number) for member in early], 40 if roster.terms.adapter.rank < 256 else 400)
        answers.put(time.monotonic() - started)
        waits = [asyncio.create_task(member.pull(number + 1)) for member in early]
        await asyncio.to_thread(barrier.wait)
        receipts = [await member.push(number) for member in late]
        waits += [asyncio.create_task(member.pull(number + 1)) for member in late]
        answers.put((max(receipts, default=0.0), await asyncio.gather(*waits)))
        await asyncio.to_thread(barrier.wait)
    for member in members:
        await member.channel.close()


async def _all(calls: Sequence[Any], at_once: int) -> None:
    gate = asyncio.Semaphore(at_once)

    async def one(call: Any) -> None:
        async with gate:
            await call

    await asyncio.gather(*map(one, calls))


class _Member:
    """One member with its own connection; sends random numbers."""

    def __init__(self, kit: Kit, roster: Roster, name: str, port: int) -> None:
        self._roster, self._name = roster, name
        self._signing = kit.signing_key()
        files = (kit.authority, kit.tls_key, kit.tls_certificate)
        credentials = grpc.ssl_channel_credentials(*(path.read_bytes() for path in files))
        options = (
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_receive_message_length", bounds.MAX_MESSAGE_BYTES),
        )
        self.channel = aio.secure_channel(f"localhost:{port}", credentials, options=options)
        self._stub = FederationStub(self.channel)
        self._run = ""

    async def enrol(self) -> None:
        terms = self._roster.terms
        request = pb.EnrolRequest(
            protocol_version=PROTOCOL_VERSION,
            federation=self._roster.federation,
            roster_hash=self._roster.hash,
            adapter_spec_hash=terms.adapter.spec_hash,
            software="waiting",
        )
        self._run = (await self._stub.Enrol(request, timeout=_CALL_SECONDS)).run_id

    async def pull(self, number: int) -> float:
        """When the aggregate was here, in seconds of the monotonic clock."""
        while True:
            request = pb.PullRequest(round=number, wait_milliseconds=60_000)
            parts = [
                part.WhichOneof("part") async for part in self._stub.Pull(request, timeout=_CALL_SECONDS)
            ]
            if "header" in parts:
                return time.monotonic()

    async def push(self, number: int) -> float:
        """When the receipt was here."""
        header, payload = await asyncio.to_thread(self._sealed, number)

        async def messages() -> AsyncIterator[pb.PushRequest]:
            yield pb.PushRequest(header=header)
            for chunk in wire.chunks([payload], 0):
                yield pb.PushRequest(chunk=chunk)

        await self._stub.Push(messages(), timeout=_CALL_SECONDS)
        return time.monotonic()

    def _sealed(self, number: int) -> tuple[pb.PushHeader, bytes]:
        terms, size = self._roster.terms, self._roster.terms.adapter.shared_dimensions
        cipher = create_cipher(terms.encryption, self._name, terms.policy, allow_plaintext=True)
        context = RoundContext(self._roster.federation, 0, number, "shared", size)
        random = np.random.default_rng(int(self._name[1:]))
        vector = random.normal(0, 0.3, size).astype(np.float32)
        payload = cipher.encrypt(vector, None, context, bytes(16))
        profile = None
        if number == 1:
            drawn = random.normal(0, 5.0, terms.profile.dimensions).astype(np.float32)
            profile = Profile(drawn, terms.profile.noise_variance, 1)
        upload = sign_upload(
            self._signing,
            federation=self._roster.federation,
            run_id=self._run,
            round_number=number,
            client_id=self._name,
            key_epoch=0,
            sections=(Section("shared", payload),),
            profile=profile,
            attempt_id="a",
        )
        return wire.encode_upload_header(upload.header()), payload


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
