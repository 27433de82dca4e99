"""Mutated messages of every call to a live server.

The originals are those of a federation of vectors that stops in its second round: what its last member sent,
and what it and the server have on disk then.
"""

import json
import logging
import random
import traceback
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import psutil
from google.protobuf.message import Message

from end_to_end import federation_of_vectors as fv
from fedmosaic.client.statement import statement_inputs
from fedmosaic.client.transport.connection import open_channel
from fedmosaic.privacy.federation.kits import open_kit
from fedmosaic.privacy.statement.shareable import shareable
from fedmosaic.protos.v1 import federation_pb2 as pb
from fedmosaic.server.server import Server
from fedmosaic.server.settings import settings_from_kit

MEMBER = "eva"
_AT_ONCE = 1000
_OVER_GRPC = 3000
"""Mutations of each call that go over the wire; what reads them there is given all of them in `formats`."""
_LARGEST_GROWTH = 64 * 2**20
"""Bytes that this process, server and caller together, may grow by over all calls."""
_EXTREMES: tuple[object, ...] = (
    None, True, -1, 0, 2**70, 1e308, "", "x" * 5000, [], {}, [[]], {"a": 1}, "../x", "f" * 64,
)  # fmt: skip


def mutate(content: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    """Flip, cut, repeat, insert, and splice with another original."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at, kind = draw.randrange(len(data) + 1), draw.randrange(7)
        if kind <= 1 and data:
            data[at % len(data)] ^= 1 << draw.randrange(8)
        elif kind == 2:
            del data[at : at + draw.choice((1, 8, 64, len(data)))]
        elif kind == 3:
            data[at:at] = data[at // 2 : at] * draw.choice((1, 1, 30))
        elif kind == 4:  # a field of any number and type, or a huge number
            value = draw.choice((b"\xff" * 9 + b"\x01", draw.randbytes(6)))
            data[at:at] = bytes([draw.randrange(160)]) + value
        elif kind == 5:
            data[at:] = draw.choice(others)[at:]
        elif kind == 6:
            data[at:at] = draw.randbytes(draw.choice((1, 8, 4096)))
    return bytes(data[: 1 << 19])


def mutate_json(content: bytes, draw: random.Random) -> bytes:
    """JSON of another shape or with another value somewhere; what is none is returned as it is."""
    try:
        data = json.loads(content)
    except ValueError:
        return content
    spots, left = [], [data]
    while left:
        value = left.pop()
        if isinstance(value, dict | list):
            keys = list(value if isinstance(value, dict) else range(len(value)))
            spots += [(value, key) for key in keys]
            left += [value[key] for key in keys]
    if spots:
        container, key = draw.choice(spots)
        if draw.random() < 0.8:
            container[key] = draw.choice(_EXTREMES)
        else:
            container.pop(key)
    return json.dumps(data).encode()


class _Recorder:
    """A stub that keeps the bytes of all requests; its process dies at the push of round 2."""

    def __init__(self, stub: Any, kept: dict[str, list[bytes]]) -> None:
        self._stub, self._kept = stub, kept

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._stub, name)

        def call(request: Any, **named: Any) -> Any:
            one = isinstance(request, Message)
            messages = [request] if one else list(request)
            for message in messages:
                kept = type(message).FromString(message.SerializeToString())
                if hasattr(kept, "wait_milliseconds"):
                    kept.wait_milliseconds = 1
                self._kept[name].append(kept.SerializeToString())
            if name == "Push" and messages[0].header.round == 2:
                raise fv.Killed
            return method(request if one else iter(messages), **named)

        return call


def record(directory: Path, port: int) -> dict[str, list[bytes]]:
    """Play until the last member is about to send in round 2; the bytes it sent, by call."""
    kept: dict[str, list[bytes]] = defaultdict(list)
    clients, sessions = fv.clients_of(directory), {}
    for name, client in clients.items():
        line: Any = fv.dial(directory, name, port)
        if name == MEMBER:
            line._stub = _Recorder(line._stub, kept)
            line.status()
        else:
            line = fv.Dying(line, pull=3)
        sessions[name] = client.session(line)
    errors = fv.run_all(sessions)
    assert {type(error) for error in errors.values()} == {fv.Killed}, errors
    member = clients[MEMBER]
    roster = open_kit(directory / "clients" / MEMBER).roster
    facts = statement_inputs(roster, member.state, member.ledger, member.plan)
    told = shareable(facts).model_dump_json().encode()
    kept["Report"] = [pb.ReportRequest(statement=told).SerializeToString()]
    for client in clients.values():
        client.close()
    kept["UploadStatus"] = [
        pb.UploadStatusRequest(header=message.header).SerializeToString()
        for message in map(pb.PushRequest.FromString, kept["Push"])
        if message.HasField("header")
    ]
    return dict(kept)


class _Tracebacks(logging.Handler):
    """Keeps what was logged with a traceback."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        """Count one."""
        if record.exc_info and record.exc_info[1] is not None:
            self.found[where(record.exc_info[1])] += 1


def where(error: BaseException) -> str:
    """Where an error came from."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {frame.filename}:{frame.lineno}"


def _call(channel: grpc.Channel, name: str, messages: list[bytes]) -> str:
    """Send raw bytes; returns the status, and what was said with one that tells of a fault."""
    path = f"/fedmosaic.v1.Federation/{name}"
    try:
        if name == "Push":
            stream: grpc.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(path)
            stream(iter(messages), timeout=60)
        elif name in ("Pull", "ReadKeyMessages"):
            answers: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(path)
            list(answers(messages[0], timeout=0.5))
        else:
            single: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
            single(messages[0], timeout=60)
    except grpc.RpcError as error:
        fault = error.code().name in ("UNKNOWN", "INTERNAL", "UNAVAILABLE")
        return f"{error.code().name}: {error.details()}" if fault else str(error.code().name)
    return "OK"


def mutate_messages(directory: Path, seed: int, count: int) -> tuple[int, list[str], Any]:
    """Send mutated requests of every call with a member's certificate; each call has draws of its own.

    Returns:
        How many were sent, the faults, and the bytes that were recorded.
    """
    settings = settings_from_kit(directory / "server").model_copy(update={"durable": False})
    kit = directory / "clients" / MEMBER
    seen, faults, sent = _Tracebacks(), list[str](), 0
    count = min(count, _OVER_GRPC)
    logging.getLogger().addHandler(seen)
    try:
        with Server(settings).background() as port:
            kept = record(directory, port)
            rest = (kit / "authority.pem", kit / "tls.pem", kit / "tls.key")
            with open_channel(f"localhost:{port}", *rest) as channel, ThreadPoolExecutor(8) as pool:
                before, draws = 0, {name: random.Random(f"{seed} {name}") for name in kept}
                for part in (count // 10, count - count // 10):
                    for name, originals in kept.items():
                        # A second push of a member ends the first, so these come one after the other.
                        order, answers = map if name == "Push" else pool.map, Counter[str]()
                        for start in range(0, part, _AT_ONCE):
                            few = range(start, min(start + _AT_ONCE, part))
                            work = [_mutated(name, originals, draws[name]) for _ in few]
                            answers.update(order(partial(_call, channel, name), work))
                        sent += part
                        faults += [
                            f"{name}: {text} ({n} times)" for text, n in answers.items() if ":" in text
                        ]
                        if before:
                            print(f"{name:20s} {dict(answers)}", flush=True)
                    growth = psutil.Process().memory_info().rss - before
                    before = before or growth
                if _call(channel, "RoundStatus", [b""]) != "OK":
                    faults.append("the server does not answer any more")
    finally:
        logging.getLogger().removeHandler(seen)
    print(f"memory grew by {growth / 2**20:.1f} MiB over the last {sent - sent // 10} calls", flush=True)
    if growth > _LARGEST_GROWTH:
        faults.append(f"memory grew by {growth / 2**20:.0f} MiB over {sent} calls")
    faults += [f"traceback in the log, {number} times: {where}" for where, number in seen.found.items()]
    return sent, faults, kept


def _mutated(name: str, originals: list[bytes], draw: random.Random) -> list[bytes]:
    if name != "Push":
        return [mutate(draw.choice(originals), originals, draw)]
    stream = [draw.choice(originals)] if draw.random() < 0.5 else originals[-2:]
    at = draw.randrange(len(stream))
    return [mutate(part, originals, draw) if n == at else part for n, part in enumerate(stream)]
