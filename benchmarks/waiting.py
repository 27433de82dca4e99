"""`python -m benchmarks.waiting`: one server process under load, over gRPC and mutual TLS, with no model.

All members but one push and wait in `Pull`; the last one pushes, and the time from its receipt to every
answer is the round's overhead. With `--pushes`, so many members send adapters of `--mib` MiB at once instead,
with `--keys` all agree on a group key: messages of the right lengths, which nobody here verifies.
Clients are coroutines of one process, on the same machine as the server: its processor's time is told apart
from theirs. After each round all wait at a server of `grpc.aio` alone, which sends everybody one answer of
that round: what gRPC itself takes on this machine at this moment.
"""

import asyncio
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc
import numpy as np
import psutil
import tyro
from grpc import aio

from benchmarks.scale_server import enrolment, random_upload
from benchmarks.timing import in_own_process, resident_mib
from fedmosaic.client.round.protection import Identity, Protection
from fedmosaic.experiments.scenario.metrics import markdown_table
from fedmosaic.privacy.federation.consortium import create
from fedmosaic.privacy.federation.kits import FederationConfig, Kit, MemberEntry, open_kit
from fedmosaic.privacy.federation.terms import Terms
from fedmosaic.privacy.groupkey import messages
from fedmosaic.privacy.mechanism.profile import ProfileMechanism, Reduction
from fedmosaic.privacy.terminal import ending_children
from fedmosaic.protos import bounds, wire
from fedmosaic.protos.messages import KeyMessage
from fedmosaic.protos.v1 import federation_pb2 as pb
from fedmosaic.protos.v1.federation_pb2_grpc import FederationStub

if TYPE_CHECKING:
    from fedmosaic.protos.v1.federation_pb2_grpc import FederationAsyncStub

_CALL_SECONDS: Final = 600.0
_AT_ONCE: Final = 40
_HEADS: Final = (
    "members; round; push, s; first, ms; median, ms; last, ms; server's CPU, ms; clients' CPU, ms; "
    "bare: last, ms; server's CPU, ms; clients' CPU, ms; × bare; "
    "memory before, MB; waiting, MB; peak, MB; load"
).split("; ")
_KEY_HEADS: Final = (
    "members; posted; relayed; relayed, MB; wall clock, s; server's CPU, s; clients' CPU, s; peak, MB; load"
).split("; ")
"""× bare is of the servers' CPU.

Memory is the server's beside mapped files: before the uploads, after all have waited, at its peak.
"""


@dataclass(frozen=True)
class Arguments:
    """Put one server under load and tell how long rounds take and how much memory it needs."""

    clients: tuple[int, ...] = (50, 200, 1000)
    """Numbers of waiting members."""
    rounds: int = 4
    """Rounds of each federation; only the first one brings new profiles."""
    settle: float = 3.0
    """Seconds for which all wait before the last one pushes."""
    pushes: int = 0
    """Members that push at once, in place of rounds."""
    mib: int = 16
    """Size of each of these adapters."""
    keys: bool = False
    """Measure a key agreement of all members, of whom 64 are drawn for a round, in place of rounds."""


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark with its arguments."""
    parsed = tyro.cli(Arguments, args=list(arguments), prog="python -m benchmarks.waiting")
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    rows = [
        row
        for count in ((parsed.pushes,) if parsed.pushes else parsed.clients)
        for row in in_own_process(federation, parsed, count)
    ]
    heads = _KEY_HEADS if parsed.keys else _HEADS
    print("\n".join(markdown_table(list(heads), rows, numbers=True)))
    return 0


@ending_children()
def federation(parsed: Arguments, count: int) -> list[list[str]]:
    """Found one and run it; a row per round."""
    with tempfile.TemporaryDirectory() as name, socket.create_server(("127.0.0.1", 0)) as free:
        place, port = Path(name), free.getsockname()[1]
        members = tuple(MemberEntry(id=f"m{number:04d}") for number in range(count))
        create(FederationConfig(federation="waiting", members=members, terms=_terms(parsed)), place)
        free.close()
        (place / "server/server.toml").write_text(f'listen = "127.0.0.1:{port}"\nstate_dir = "state"\n')
        command = [sys.executable, "-m", "fedmosaic.server", "--kit", str(place / "server")]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:  # noqa: S603  # our own module
            try:
                return asyncio.run(_Load(parsed, place, server.pid, port).run())
            finally:
                server.terminate()


def _terms(parsed: Arguments) -> Terms:
    """Plain adapters of `mib` MiB where they are pushed at once, or of some hundred bytes."""
    shape = {"rank": 4, "blocks": 2, "target_modules": ("a", "b")}
    if parsed.pushes:
        # blocks · modules · (r² + r) float32 numbers
        blocks = max(1, (parsed.mib << 20) // (4 * (256**2 + 256)))
        shape = {"rank": 256, "blocks": blocks, "target_modules": ("a",)}
    reduction = Reduction(hidden_size=8, intermediate_size=16, projection_dimensions=32)
    profile = ProfileMechanism(probe="none", probe_sha256="0" * 64, reduction=reduction, noise_multiplier=1.0)
    schedule = {"rounds": parsed.rounds + 1, "quorum": 4, "round_deadline_seconds": 3000 + parsed.settle}
    # So many rounds that everybody has a turn, and therefore needs the key.
    sampled = {"sampled_clients": 64, "rounds": 1000, "gathering_seconds": 3000} if parsed.keys else {}
    return Terms.model_validate(
        {
            "adapter": {**shape, "protection": "encrypted" if parsed.keys else "none"},
            "profile": profile,
            "schedule": schedule | sampled,
            "encryption": {"backend": "mask" if parsed.keys else "plain"},
            "allow_plaintext": not parsed.keys,
        }
    )


class _Load:
    """All members of a federation, and what its server takes."""

    def __init__(self, parsed: Arguments, place: Path, server: int, port: int) -> None:
        self._server = psutil.Process(server)
        self._rounds, self._settle = 1 if parsed.pushes else parsed.rounds, parsed.settle
        self._at_once = parsed.pushes or _AT_ONCE
        self._clients, self._port, self._peak = place / "clients", port, 0.0
        self._members: list[_Member] = []
        self._place, self._keys = place, parsed.keys
        self._bare: psutil.Popen | None = None

    async def run(self) -> list[list[str]]:
        """Run the rounds; a row of the table for each."""
        roster = open_kit(next(self._clients.iterdir())).roster
        kits = [Kit(self._clients / member.id, roster) for member in roster.members]
        self._members = [_Member(kit, self._port) for kit in kits]
        await _all([member.enrol() for member in self._members], self._at_once)
        watching = asyncio.create_task(self._watch())
        numbers = range(1, self._rounds + 1)
        rows = [await self._agreement()] if self._keys else [await self._round(n) for n in numbers]
        watching.cancel()
        if self._bare is not None:
            self._bare.kill()
        for channel in (channel for member in self._members for channel in member.channels):
            await channel.close()
        return rows

    async def _watch(self) -> None:
        while True:
            self._peak = max(self._peak, self._memory())
            await asyncio.sleep(0.05)

    def _memory(self) -> float:
        return resident_mib("RssAnon", self._server.pid)

    def _seconds(self) -> float:
        """Processor seconds of the server so far."""
        return float(sum(self._server.cpu_times()[:2]))

    async def _round(self, number: int) -> list[str]:
        late, *early = self._members
        await _all([member.pull(number) for member in self._members], self._at_once)
        before, started = self._memory(), time.monotonic()
        await _all([member.push(number) for member in early], self._at_once)
        pushed = time.monotonic() - started
        waits = [asyncio.create_task(member.pull(number + 1)) for member in early]
        await asyncio.gather(*(member.waits.wait() for member in early))
        await asyncio.sleep(self._settle)
        waiting, server, clients = self._memory(), self._seconds(), time.process_time()
        receipt = await late.push(number)
        waits.append(asyncio.create_task(late.pull(number + 1)))
        answers = sorted(1000 * (when - receipt) for when in await asyncio.gather(*waits))
        spent = 1000 * (self._seconds() - server), 1000 * (time.process_time() - clients)
        *bare, ratio = await self._wait_at_bare(number, spent[0])
        told = [answers[0], statistics.median(answers), answers[-1], *spent, *bare]
        memory = before, waiting, self._peak
        start, end = [str(len(self._members)), str(number), f"{pushed:.1f}"], f"{os.getloadavg()[0]:.1f}"
        numbers = [*(f"{value:.0f}" for value in told), f"{ratio:.1f}", *(f"{value:.0f}" for value in memory)]
        return [*start, *numbers, end]

    async def _agreement(self) -> list[str]:
        """A row of the other table; the first member stands for the leader."""
        names = [member.name for member in self._members]
        started, server, clients = time.monotonic(), self._seconds(), time.process_time()
        await asyncio.gather(*(member.agree(names) for member in self._members))
        took = time.monotonic() - started, self._seconds() - server, time.process_time() - clients
        posted, relayed = 4 * len(names) - 1, sum(member.relayed for member in self._members)
        size = sum(member.relayed_bytes for member in self._members) / 1e6
        memory, load = f"{self._peak:.0f}", f"{os.getloadavg()[0]:.1f}"
        return [*map(str, (len(names), posted, relayed)), *(f"{v:.1f}" for v in (size, *took)), memory, load]

    async def _wait_at_bare(self, number: int, ours: float) -> list[float]:
        """Last answer there, its CPU, the clients', all in ms, and how many times the second `ours` is."""
        if self._bare is None:
            answer = b"".join(len(m).to_bytes(4, "big") + m for m in self._members[0].answer)
            (self._place / "answer").write_bytes(answer)
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = str(free.getsockname()[1])
            files = str(self._place / "server"), port, str(self._place / "answer")
            self._bare = psutil.Popen([sys.executable, "-m", "benchmarks.waiting_bare", *files])
            for member in self._members:
                member.dial_bare(int(port))
        waits = [asyncio.create_task(member.pull(number, bare=True)) for member in self._members]
        await asyncio.gather(*(member.waits.wait() for member in self._members))
        await asyncio.sleep(self._settle)
        server, clients = sum(self._bare.cpu_times()[:2]), time.process_time()
        await self._members[0].bare.RoundStatus(pb.RoundStatusRequest())
        receipt = time.monotonic()
        last = max(await asyncio.gather(*waits)) - receipt
        spent = sum(self._bare.cpu_times()[:2]) - server
        return [1000 * last, 1000 * spent, 1000 * (time.process_time() - clients), ours / (1000 * spent)]


async def _all(calls: Sequence[Coroutine[Any, Any, Any]], at_once: int) -> None:
    gate = asyncio.Semaphore(at_once)

    async def one(call: Coroutine[Any, Any, Any]) -> None:
        async with gate:
            await call

    await asyncio.gather(*map(one, calls))


class _Member:
    """One member with its own connection; sends random numbers."""

    def __init__(self, kit: Kit, port: int) -> None:
        self.name, self._roster, self._run = kit.directory.name, kit.roster, ""
        self.relayed = self.relayed_bytes = 0
        self.channels: list[aio.Channel] = []
        self._protection = Protection(Identity.of(kit), kit.roster, "", None)
        files = (kit.authority, kit.tls_key, kit.tls_certificate)
        self._credentials = grpc.ssl_channel_credentials(*(path.read_bytes() for path in files))
        self.answer: list[bytes] = []
        self.waits = asyncio.Event()
        self._stub = self._dialled(port)

    def dial_bare(self, port: int) -> None:
        """Be ready to wait at the bare server too."""
        self.bare = self._dialled(port)

    def _dialled(self, port: int) -> "FederationAsyncStub":
        options = (
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_receive_message_length", bounds.MAX_MESSAGE_BYTES),
        )
        self.channels.append(aio.secure_channel(f"localhost:{port}", self._credentials, options=options))
        return FederationStub(self.channels[-1])

    async def enrol(self) -> None:
        """Join, as soon as the server is there."""
        request = wire.encode(enrolment(self._roster), pb.EnrolRequest)
        self._run = (await self._stub.Enrol(request, timeout=_CALL_SECONDS, wait_for_ready=True)).run_id

    async def pull(self, number: int, *, bare: bool = False) -> float:
        """When the aggregate was here, in seconds of the monotonic clock."""
        self.waits.clear()
        while True:
            request, parts = pb.PullRequest(round=number, wait_milliseconds=60_000), []
            stub = self.bare if bare else self._stub
            async for part in stub.Pull(request, timeout=_CALL_SECONDS, wait_for_ready=True):
                self.waits.set()
                if not part.HasField("waiting"):
                    parts.append(part)
            if parts:
                arrived = time.monotonic()
                self.answer = self.answer if bare else [part.SerializeToString() for part in parts]
                return arrived

    async def agree(self, names: Sequence[str]) -> None:
        """Take part in the first key epoch, as `Keyring` does."""
        await self._post("join", b"here")
        await self._read("join", 4)
        await self._post("opening", bytes(messages.OPENING_BYTES))
        await self._read("opening", len(names))
        leader, box = names[0], bytes(messages.CONFIRMATION_BYTES + 48)  # 32 bytes, sealed
        if self.name == leader:
            for recipient in names[1:]:
                await self._post("box", box, recipient)
        else:
            await self._read("box", 1)
        await self._post("confirmation", bytes(messages.CONFIRMATION_BYTES))
        await self._read("confirmation", len(names))

    async def _post(self, stage: str, payload: bytes, recipient: str = "") -> None:
        request = wire.encode(KeyMessage(1, stage, recipient, payload), pb.PostKeyMessageRequest)
        await self._stub.PostKeyMessage(request, timeout=_CALL_SECONDS)

    async def _read(self, stage: str, expected: int) -> None:
        request = pb.ReadKeyMessagesRequest(epoch=1, stage=stage, expected=expected, wait_milliseconds=20_000)
        found = 0
        while found < expected:
            found = 0
            async for batch in self._stub.ReadKeyMessages(request, timeout=_CALL_SECONDS):
                found += len(batch.messages)
                self.relayed_bytes += batch.ByteSize()
            self.relayed += found

    async def push(self, number: int) -> float:
        """When the receipt was here."""
        random = np.random.default_rng(int(self.name[1:]))
        upload = await asyncio.to_thread(
            random_upload, self._protection, self._roster.terms, random, self._run, number, new=number == 1
        )

        header, offset = upload.header(), 0

        async def requests() -> AsyncIterator[pb.PushRequest]:
            yield pb.PushRequest(header=wire.encode_upload_header(header, offset))
            for chunk in wire.chunks([section.payload for section in upload.sections], offset):
                yield pb.PushRequest(chunk=chunk)

        while True:
            try:
                await self._stub.Push(requests(), timeout=_CALL_SECONDS)
                return time.monotonic()
            except aio.AioRpcError as error:
                # As a client does: nothing came from it for 30 s, since so many share this process.
                if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise
            status = pb.UploadStatusRequest(header=wire.encode_upload_header(header))
            offset = (await self._stub.UploadStatus(status, timeout=_CALL_SECONDS)).received


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
