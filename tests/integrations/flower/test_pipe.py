"""Calls through a carrier that may read, change and lose all it carries; Flower itself is not needed."""

import asyncio
import hashlib
import itertools
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import builders
from end_to_end import federation_of_vectors as fv
from fedmosaic.client.transport import connection
from fedmosaic.client.transport.grpc import GrpcTransport
from fedmosaic.integrations.flower import client as over_flower
from fedmosaic.integrations.flower import pipe
from fedmosaic.integrations.flower.node import Node
from fedmosaic.privacy.federation import identity
from fedmosaic.privacy.federation.terms import Terms
from fedmosaic.protos.errors import IdentityError, TransportError
from fedmosaic.protos.messages import KeyMessage
from fedmosaic.protos.refusal import Refusal
from fedmosaic.server.network.service import FederationService
from fedmosaic.server.server import Server
from fedmosaic.server.settings import settings_from_kit


class Carrier:
    """A federation's server, and pipes to its members' sockets; `seen` is all that was carried."""

    def __init__(self, folder: Path, agreed: Terms) -> None:
        self.directory = fv.make_federation(folder / "federation", agreed)
        self.folder = folder
        self.seen: list[bytes] = []
        self.meddle: Callable[[str, bytes], bytes] = lambda member, turn: turn
        self.node_members: dict[str, str] = {}
        self.settings = settings_from_kit(self.directory / "server").model_copy(update={"durable": False})

    def kit(self, member: str) -> Path:
        return self.directory / "clients" / member

    def socket(self, member: str) -> Path:
        return self.folder / f"{member}.sock"

    def transport(self, member: str, node: str = "", to: str = "localhost", **options: Any) -> GrpcTransport:
        """The member's transport over the socket of a node, by default its own."""
        carried = over_flower.Pipe(self.socket(node or member))
        carried.start()
        waits = {"retry_seconds": 3.0, "wait_seconds": 2.0} | options
        return fv.dial(self.directory, member, f"{to}:1", connect=carried.connect, **waits)

    @contextmanager
    def running(self) -> Iterator[None]:
        server: Any = Server(self.settings)
        server.running = partial(server.running, beside=self._carry)
        with server.background():
            yield

    @asynccontextmanager
    async def _carry(self, service: FederationService) -> AsyncIterator[None]:
        work = [asyncio.create_task(self._carry_for(member, service)) for member in fv.MEMBERS]
        yield
        for task in work:
            task.cancel()
        await asyncio.wait(work)

    async def _carry_for(self, member: str, service: FederationService) -> None:
        """As the ServerApp and a ClientApp do, which forget all that they knew when a message is lost."""
        socket, bound, tls = self.socket(member), self.node_members.get(member, ""), self.settings.tls
        assert tls is not None
        while True:
            node, said = Node(service, tls, str(self.folder), bound), b""
            await node.server.start()
            try:
                while True:
                    while not socket.exists():
                        await asyncio.sleep(0.02)
                    heard = await asyncio.to_thread(pipe.ask, str(socket), said, idle=not node.open)
                    said = self.meddle(member, await node.answer(self.meddle(member, heard)))
                    self.seen += heard, said
            except (OSError, EOFError):
                continue
            finally:
                await node.server.stop(None)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("HOLD", 0.3), ("BRIEF", 0.1), ("QUIET", 0.02)):
        monkeypatch.setattr(pipe, f"{name}_SECONDS", seconds)


@pytest.fixture
def carrier(tmp_path: Path) -> Carrier:
    return Carrier(tmp_path, fv.terms("plain", 2))


def test_lost_and_changed_messages_and_short_turns_change_no_result_and_tell_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine too, nobody is left out.
    patient = dict.fromkeys(("round_deadline_seconds", "gathering_seconds", "key_patience_seconds"), 900)
    agreed = fv.terms("mask", 2, quorum=len(fv.MEMBERS), **patient)
    undisturbed, _ = fv.finish(fv.make_federation(tmp_path / "direct", agreed), kind=fv.SeededClient)
    monkeypatch.setattr(pipe, "TURN_BYTES", 1000)
    carrier, number = Carrier(tmp_path, agreed), itertools.count()

    def meddle(member: str, turn: bytes) -> bytes:
        now = next(number) % 120 if len(turn) > 8 else 0
        if now == 37:
            raise ConnectionError
        return turn[:-1] + bytes([turn[-1] ^ 1]) if now == 71 else turn

    carrier.meddle = meddle
    clients = fv.clients_of(carrier.directory, kind=fv.SeededClient)
    with carrier.running():
        transports = {name: carrier.transport(name, retry_seconds=200.0) for name in clients}
        errors = fv.run_all({name: client.session(transports[name]) for name, client in clients.items()})
    assert errors == {}
    for name, client in clients.items():
        client.close()
        assert np.array_equal(client.learner.local, undisturbed[name].learner.local), name
        assert len(client.learner.received) == 1
    assert next(number) > 80, "nothing was disturbed"
    assert max(map(len, carrier.seen)) == 1000
    carried = b"".join(carrier.seen)
    assert not [word for word in (b"spiffe", b"vectors", b"ada", b"fedmosaic", b"roster") if word in carried]


def test_each_side_is_who_its_certificate_says_and_nobody_else(
    carrier: Carrier, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = identity.read_certificate(carrier.directory / "authority.pem")
    key: Any = identity.read_private_key(carrier.directory / "consortium" / "authority.key")
    ours = identity.Authority(certificate, key, Ed25519PrivateKey.generate())
    foreign = identity.create_authority("vectors")

    def shows(member: str, authority: identity.Authority) -> GrpcTransport:
        """The member's transport with a new key and certificate; it trusts who issued that."""
        issued, kit = builders.issue_client(authority, "vectors", member), carrier.kit(member)
        trusted = authority.certificate.public_bytes(serialization.Encoding.PEM)
        files = {"tls.pem": issued.certificate_pem, "tls.key": issued.key_pem, "authority.pem": trusted}
        for name, content in files.items():
            (kit / name).write_bytes(content)
        return carrier.transport(member)

    with carrier.running():
        assert carrier.transport("ada").status().round == 1
        with pytest.raises(IdentityError, match=r"127.0.0.9:1: the server's certificate is for"):
            carrier.transport("ada", to="127.0.0.9").status()
        with pytest.raises(Refusal, match="another key than the roster pins"):
            shows("ben", ours).status()
        with pytest.raises(IdentityError, match="no certificate of this federation's authority"):
            shows("dee", foreign).status()
        # It trusts the right server now, and shows what that does not accept.
        (carrier.kit("dee") / "authority.pem").write_bytes((carrier.directory / "authority.pem").read_bytes())
        monkeypatch.setattr(connection, "check_certificate", lambda *_: None)
        with pytest.raises(TransportError, match="it refuses this client's certificate"):
            carrier.transport("dee").status()


def test_a_node_of_one_member_brings_no_calls_of_another(carrier: Carrier) -> None:
    carrier.node_members = {"ada": identity.spiffe_id("vectors", "ada")}
    with carrier.running():
        assert carrier.transport("ada").status().round == 1
        with pytest.raises(Refusal, match="this SuperNode is another member's"):
            carrier.transport("ben", node="ada").status()
        assert carrier.transport("ben").status().round == 1


def test_after_a_refusal_the_connection_goes_on_and_after_a_restart_another_is_heard_at_once(
    carrier: Carrier,
) -> None:
    with carrier.running():
        transport = carrier.transport("ada")
        with pytest.raises(Refusal, match="needs no group key"):
            transport.post_key_message(KeyMessage(1, "no-such-stage", "", b"x"))
        before = len({turn[:8] for turn in carrier.seen})
        assert transport.status().round == 1
        assert len({turn[:8] for turn in carrier.seen}) == before, "there was a second connection"
        started = time.monotonic()
        assert carrier.transport("ada").status().round == 1
        assert time.monotonic() - started < over_flower._PATIENCE_SECONDS / 2


def test_without_anybody_who_asks_the_client_says_what_to_look_at(
    carrier: Carrier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(over_flower, "_PATIENCE_SECONDS", 0.1)
    with caplog.at_level(logging.WARNING, "fedmosaic"):
        carrier.transport("ada")
        time.sleep(0.3)
    assert "check that run, SuperLink and this client's SuperNode are up" in caplog.text


def test_turns_that_a_node_makes_up_harm_no_connection_but_its_own(carrier: Carrier) -> None:
    draw = random.Random(0)

    def meddle(member: str, turn: bytes) -> bytes:
        return draw.randbytes(draw.randrange(1, 200)) if member == "ada" else turn

    carrier.meddle = meddle
    with carrier.running():
        ada = carrier.transport("ada", retry_seconds=0.0)
        with pytest.raises(TransportError):
            ada.status()
        assert carrier.transport("ben").status().round == 1
        carrier.meddle = lambda member, turn: turn
        assert carrier.transport("ada").status().round == 1


def test_what_nodes_answer_loses_no_more_than_a_turn_and_nodes_without_a_member_are_not_asked(
    carrier: Carrier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app = pytest.importorskip("flwr.app", reason="Flower is not installed; `make test-flower` does that")
    from flwr.supercore.task_identity import TaskIdentity

    from fedmosaic.integrations.flower import server_app

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr(server_app, "_NODES_SECONDS", 0.1)
    huge, asked = {"turn": bytes(pipe.TURN_BYTES + 1)}, list[Any]()
    answers: list[Any] = ["no app", huge, {"turn": [b"x"]}, {"turn": "x"}, {"other": b"x"}, {"turn": b"x"}]

    def push(messages: list[Any]) -> None:
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"m{len(asked)}"
            asked.append(message)

    def reply(message: Any) -> Any:
        turn = message.content.config_records[pipe.RECORD]
        answer = answers.pop(0) if answers else None
        if isinstance(answer, str):
            return app.Message(app.Error(1, answer), reply_to=message)
        said = answer or {"turn": pipe.ask(str(carrier.socket("ada")), turn["turn"], idle=turn["idle"])}
        return app.Message(app.RecordDict({pipe.RECORD: app.ConfigRecord(said)}), reply_to=message)

    grid = SimpleNamespace(
        get_nodes=lambda: [SimpleNamespace(node_id=i, public_key=b"key %d" % i) for i in (1, 2)],
        push_messages=push,
        pull_messages=lambda ids: [reply(sent) for sent in asked if sent.metadata.message_id in ids],
    )
    members = {hashlib.sha256(b"key 1").hexdigest(): identity.spiffe_id("vectors", "ada")}

    @asynccontextmanager
    async def carry(service: FederationService) -> AsyncIterator[None]:
        assert carrier.settings.tls is not None
        over, make = asyncio.Event(), partial(Node, service, carrier.settings.tls, str(carrier.folder))
        work = asyncio.create_task(server_app.carry(grid, make, members, over))
        yield
        answers.extend(["the client has left"] * 2)
        over.set()
        await work

    monkeypatch.setattr(carrier, "_carry", carry)
    transport = carrier.transport("ada", retry_seconds=30.0)
    with carrier.running(), caplog.at_level(logging.WARNING, "fedmosaic"):
        assert transport.status().round == 1
    assert {sent.metadata.dst_node_id for sent in asked} == {1}
    assert caplog.text.count("SuperNode 1: ") == 5, "at the end clients leave, which is no problem to tell"
