"""Calls through a carrier that may read, change and lose all it carries; Flower itself is not needed."""

import asyncio
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from end_to_end import federation_of_vectors as fv
from fedmosaic.client.transport.grpc import GrpcTransport
from fedmosaic.integrations.flower.client import connector
from fedmosaic.integrations.flower.node import Node, methods_of
from fedmosaic.integrations.flower.secured import ask, tls_context
from fedmosaic.privacy.mechanism.noise import SeededTestNoise
from fedmosaic.server.network.service import FederationService
from fedmosaic.server.server import Server
from fedmosaic.server.settings import settings_from_kit

Meddle = Callable[[str, bytes], bytes]


class Carrier:
    """A federation's server, and pipes to its members' sockets; `seen` is all that was carried."""

    def __init__(self, folder: Path, backend: str = "plain", rounds: int = 2) -> None:
        self.directory = fv.make_federation(folder / "federation", fv.terms(backend, rounds))
        self.folder = folder
        self.seen: list[bytes] = []
        self.askers = ThreadPoolExecutor(len(fv.MEMBERS))
        self.meddle: Meddle = lambda member, records: records
        self.node_members: dict[str, str] = {}

    def transport(self, member: str, node: str = "", **options: Any) -> GrpcTransport:
        """The member's transport over the socket of a node, by default its own."""
        kit = self.directory / "clients" / member
        files = {"authority": "authority.pem", "certificate": "tls.pem", "private_key": "tls.key"}
        return GrpcTransport(
            "localhost:1",
            **{name: kit / file for name, file in files.items()} | options,
            retry_seconds=3.0,
            wait_seconds=2.0,
            connect=connector(self.socket(node or member)),
        )

    def socket(self, member: str) -> Path:
        return self.folder / f"{member}.sock"

    @contextmanager
    def running(self) -> Iterator[None]:
        settings = settings_from_kit(self.directory / "server").model_copy(update={"durable": False})
        started: Future[Callable[[], object]] = Future()

        async def main() -> None:
            stop = asyncio.Event()
            loop = asyncio.get_running_loop()
            async with Server(settings).running(beside=self._carry):
                started.set_result(lambda: loop.call_soon_threadsafe(stop.set))
                await stop.wait()

        thread = threading.Thread(target=asyncio.run, args=(main(),))
        thread.start()
        stop = started.result(20)
        try:
            yield
        finally:
            stop()
            thread.join(30)

    @asynccontextmanager
    async def _carry(self, service: FederationService) -> AsyncIterator[None]:
        kit = self.directory / "server"
        context = tls_context(
            ssl.PROTOCOL_TLS_SERVER, kit / "authority.pem", kit / "tls.pem", kit / "tls.key"
        )
        methods = await methods_of(service)
        work = [asyncio.create_task(self._carry_for(m, context, methods)) for m in fv.MEMBERS]
        yield
        for task in work:
            task.cancel()
        await asyncio.wait(work)

    async def _carry_for(self, member: str, context: ssl.SSLContext, methods: Any) -> None:
        node, said = Node(context, methods, member, self.node_members.get(member, "")), b""
        while True:
            if not self.socket(member).exists():
                await asyncio.sleep(0.02)
                continue
            loop = asyncio.get_running_loop()
            heard = await loop.run_in_executor(self.askers, ask, str(self.socket(member)), said)
            self.seen.append(heard)
            said = self.meddle(member, await node.answer(heard))
            self.seen.append(said)


@pytest.fixture(autouse=True)
def _short_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmosaic.integrations.flower.secured.HOLD_SECONDS", 0.3)
    monkeypatch.setattr("fedmosaic.integrations.flower.client._PATIENCE_SECONDS", 5.0)


@pytest.fixture
def carrier(tmp_path: Path) -> Carrier:
    return Carrier(tmp_path)


class SeededClient(fv.Client):
    """Its noise repeats, so that its run does."""

    @property
    def noise(self) -> SeededTestNoise:
        return SeededTestNoise(self.seed)


def play(carrier: Carrier) -> dict[str, Any]:
    clients = fv.clients_of(carrier.directory, kind=SeededClient)
    with carrier.running():
        transports = {name: carrier.transport(name) for name in clients}
        errors = fv.run_all({name: client.session(transports[name]) for name, client in clients.items()})
    for client in clients.values():
        client.close()
    assert errors == {}
    return clients


@pytest.mark.parametrize("backend", ["plain", "mask"])
def test_a_run_ends_where_it_ends_without_the_pipe(tmp_path: Path, backend: str) -> None:
    carrier = Carrier(tmp_path, backend)
    clients = play(carrier)
    elsewhere = fv.make_federation(tmp_path / "direct", fv.terms(backend, 2))
    expected, _ = fv.finish(elsewhere, kind=SeededClient)
    for name, client in clients.items():
        assert np.array_equal(client.learner.local, expected[name].learner.local), name
        assert len(client.learner.received) == 1
