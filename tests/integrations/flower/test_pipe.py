"""Calls through a carrier that may read, change and lose all it carries; Flower itself is not needed."""

import asyncio
import itertools
import random
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import builders
from end_to_end import federation_of_vectors as fv
from fedmosaic.client.transport.grpc import GrpcTransport
from fedmosaic.integrations.flower import client as over_flower
from fedmosaic.integrations.flower import secured
from fedmosaic.integrations.flower.node import Node, methods_of
from fedmosaic.integrations.flower.secured import Kind, Secured, tls_context
from fedmosaic.privacy.federation import identity
from fedmosaic.privacy.mechanism.noise import SeededTestNoise
from fedmosaic.protos.errors import IdentityError, TransportError
from fedmosaic.protos.messages import KeyMessage
from fedmosaic.protos.refusal import Refusal
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
            **{name: kit / file for name, file in files.items()}
            | {"retry_seconds": 3.0, "wait_seconds": 2.0}
            | options,
            connect=over_flower.connector(self.socket(node or member)),
        )

    def socket(self, member: str) -> Path:
        return self.folder / f"{member}.sock"

    @contextmanager
    def running(self) -> Iterator[None]:
        settings = settings_from_kit(self.directory / "server").model_copy(update={"durable": False})
        server: Any = Server(settings)
        server.running = partial(server.running, beside=self._carry)
        with server.background():
            yield

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
            heard = await loop.run_in_executor(self.askers, secured.ask, str(self.socket(member)), said)
            self.seen.append(heard)
            said = self.meddle(member, await node.answer(heard))
            self.seen.append(said)


@pytest.fixture(autouse=True)
def _short_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secured, "HOLD_SECONDS", 0.3)
    monkeypatch.setattr(over_flower, "_PATIENCE_SECONDS", 5.0)


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
        transports = {name: carrier.transport(name, retry_seconds=60.0) for name in clients}
        errors = fv.run_all({name: client.session(transports[name]) for name, client in clients.items()})
    for client in clients.values():
        client.close()
    assert errors == {}
    return clients


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The clients of the same federation without a pipe, after the run."""
    directory = fv.make_federation(tmp_path_factory.mktemp("direct") / "f", fv.terms("mask", 2))
    return fv.finish(directory, kind=SeededClient)[0]


def same(clients: dict[str, Any], others: dict[str, Any]) -> None:
    for name, client in clients.items():
        assert np.array_equal(client.learner.local, others[name].learner.local), name
        assert len(client.learner.received) == 1


def test_lost_and_changed_messages_and_short_turns_change_no_result_and_tell_nothing(
    tmp_path: Path, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secured, "TURN_BYTES", 700)
    monkeypatch.setattr(over_flower, "TURN_BYTES", 700)
    carrier = Carrier(tmp_path, "mask")
    number = itertools.count()

    def meddle(member: str, records: bytes) -> bytes:
        turn = next(number) % 60 if records else 0
        if turn == 17:
            return b""
        return records[:-1] + bytes([records[-1] ^ 1]) if turn == 31 else records

    carrier.meddle = meddle
    same(play(carrier), undisturbed)
    assert next(number) > 40, "nothing was disturbed"
    assert max(map(len, carrier.seen)) == 700
    carried = b"".join(carrier.seen)
    for private in (b"spiffe", b"vectors", b"ada", b"fedmosaic", b"roster"):
        assert private not in carried


def authority_of(carrier: Carrier) -> identity.Authority:
    certificate = identity.read_certificate(carrier.directory / "authority.pem")
    key = identity.read_private_key(carrier.directory / "consortium" / "authority.key")
    assert isinstance(key, EllipticCurvePrivateKey)
    return identity.Authority(certificate, key, Ed25519PrivateKey.generate())


def files(folder: Path, issued: builders.TlsIdentity, authority: x509.Certificate) -> dict[str, Path]:
    """Certificate and key, and the authority to trust, as arguments of a transport."""
    folder.mkdir()
    (folder / "tls.pem").write_bytes(issued.certificate_pem)
    identity.write_private(folder / "tls.key", issued.key_pem)
    (folder / "authority.pem").write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    names = {"authority": "authority.pem", "certificate": "tls.pem", "private_key": "tls.key"}
    return {name: folder / file for name, file in names.items()}


def test_a_caller_is_who_its_certificate_says_and_nobody_else(
    carrier: Carrier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, foreign = authority_of(carrier), identity.create_authority("vectors")
    remade = builders.issue_client(ours, "vectors", "ben")
    outsider = builders.issue_client(ours, "vectors", "zoe")
    stranger = builders.issue_client(foreign, "vectors", "dee")
    with carrier.running():
        assert carrier.transport("ada").status().round == 1
        with pytest.raises(Refusal, match="another key than the roster pins"):
            carrier.transport("ben", **files(tmp_path / "remade", remade, ours.certificate)).status()
        with pytest.raises(Refusal, match="'zoe' has a valid certificate but is not on the roster"):
            carrier.transport("cid", **files(tmp_path / "outsider", outsider, ours.certificate)).status()
        own = files(tmp_path / "stranger", stranger, foreign.certificate)
        with pytest.raises(IdentityError, match="no certificate of this federation's authority"):
            carrier.transport("dee", **own).status()
        # It trusts the right server now, and shows what that does not accept.
        own["authority"].write_bytes(ours.certificate.public_bytes(serialization.Encoding.PEM))
        monkeypatch.setattr(over_flower, "check_certificate", lambda *_: None)
        with pytest.raises(TransportError, match=r"(?i)alert"):
            carrier.transport("dee", **own).status()


def test_a_member_cannot_stand_for_the_server(carrier: Carrier) -> None:
    ada, ben = (carrier.directory / "clients" / name for name in ("ada", "ben"))
    impostor = tls_context(ssl.PROTOCOL_TLS_SERVER, ada / "authority.pem", ada / "tls.pem", ada / "tls.key")
    caller = tls_context(ssl.PROTOCOL_TLS_CLIENT, ben / "authority.pem", ben / "tls.pem", ben / "tls.key")
    theirs, ours = Secured(impostor), Secured(caller, "localhost")
    theirs.receive(ours.take())
    with pytest.raises(ssl.SSLCertVerificationError):
        ours.receive(theirs.take())
    assert not ours.agreed


def test_a_node_of_one_member_brings_no_calls_of_another(carrier: Carrier) -> None:
    carrier.node_members = {"ada": identity.spiffe_id("vectors", "ada")}
    with carrier.running():
        assert carrier.transport("ada").status().round == 1
        with pytest.raises(Refusal, match="this SuperNode is another member's"):
            carrier.transport("ben", node="ada").status()
        assert carrier.transport("ben").status().round == 1


def test_a_refusal_comes_with_its_reason_and_the_session_goes_on(carrier: Carrier) -> None:
    with carrier.running():
        transport = carrier.transport("ada")
        with pytest.raises(Refusal) as caught:
            transport.post_key_message(KeyMessage(1, "no-such-stage", "", b"x"))
        assert caught.value.reason
        before = len([message for message in carrier.seen if b"\x16\x03" in message[:2]])
        assert transport.status().round == 1
        after = len([message for message in carrier.seen if b"\x16\x03" in message[:2]])
        assert before == after, "there was a second handshake"


def test_a_client_that_is_started_again_is_heard_at_once(carrier: Carrier) -> None:
    with carrier.running():
        assert carrier.transport("ada").status().round == 1
        started = time.monotonic()
        assert carrier.transport("ada").status().round == 1
        assert time.monotonic() - started < over_flower._PATIENCE_SECONDS


def test_without_anybody_who_asks_the_client_says_what_to_look_at(
    carrier: Carrier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(over_flower, "_PATIENCE_SECONDS", -30.0)
    with pytest.raises(TransportError, match="check that the run, the SuperLink and this client's"):
        carrier.transport("ada", retry_seconds=0.0).status()


def test_bytes_that_a_node_makes_up_end_its_session_alone(carrier: Carrier) -> None:
    kit, own = carrier.directory / "server", carrier.directory / "clients" / "ada"
    server = tls_context(ssl.PROTOCOL_TLS_SERVER, kit / "authority.pem", kit / "tls.pem", kit / "tls.key")
    caller = tls_context(ssl.PROTOCOL_TLS_CLIENT, own / "authority.pem", own / "tls.pem", own / "tls.key")

    async def attack(say: Callable[[Secured], object]) -> bytes:
        node, ours = Node(server, {}, "n", ""), Secured(caller, "localhost")
        ours.receive(await node.answer(ours.take()))
        say(ours)
        await node.answer(ours.take())
        fresh = Secured(caller, "localhost")
        return await node.answer(fresh.take())

    def nonsense(ours: Secured) -> None:
        ours._tls.write(b"\x09\x00\x00\x00\x00")

    def huge(ours: Secured) -> None:
        ours._tls.write(b"\x01\xff\xff\xff\xff")

    def status(ours: Secured) -> None:
        ours.send(Kind.STATUS, b"")

    def unknown(ours: Secured) -> None:
        ours.send(Kind.CALL, b"/no/such\xff")
        ours.send(Kind.MESSAGE, b"")

    for say in (nonsense, huge, status, unknown):
        assert asyncio.run(attack(say))[:1] == b"\x16", f"{say.__name__}: no new handshake"

    async def garbage() -> None:
        node, draw = Node(server, {}, "n", ""), random.Random(0)
        for _ in range(100):
            assert len(await node.answer(draw.randbytes(draw.randrange(1, 200)))) < 100

    asyncio.run(garbage())
