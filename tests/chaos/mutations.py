"""Mutated messages of every call to a live server, and mutated files to all that reads them.

The originals are those of a federation of vectors that stops in its second round: what its last member sent,
and what it and the server have on disk then.
"""

import dataclasses
import json
import logging
import random
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
from google.protobuf.message import Message

from end_to_end import federation_of_vectors as fv
from fedmosaic.client.records import ClippingRecord, read_average, read_profile, read_upload
from fedmosaic.client.settings import ClientSettings
from fedmosaic.client.state import read_record
from fedmosaic.client.statement import statement_inputs
from fedmosaic.client.transport.connection import open_channel
from fedmosaic.client.witness import WitnessSettings
from fedmosaic.privacy.audit import AUDIT, read_audit
from fedmosaic.privacy.configuration import parse_json, read_configuration
from fedmosaic.privacy.encryption.aggregators import create_aggregator
from fedmosaic.privacy.encryption.ciphers import create_cipher, generate_group_secret
from fedmosaic.privacy.encryption.parameters import CkksParameters, MaskParameters, PlainParameters
from fedmosaic.privacy.encryption.records import RoundContext
from fedmosaic.privacy.federation.identity import check_pair, read_certificate
from fedmosaic.privacy.federation.kits import REQUEST, FederationConfig, open_kit
from fedmosaic.privacy.federation.requests import make_request, read_request
from fedmosaic.privacy.groupkey.key import GroupKey
from fedmosaic.privacy.groupkey.nonces import NonceCounter
from fedmosaic.privacy.ledger.store import read_ledger
from fedmosaic.privacy.policy import AggregationPolicy
from fedmosaic.privacy.statement.check import check_received
from fedmosaic.privacy.statement.shareable import shareable
from fedmosaic.protos.errors import FedMosaicError
from fedmosaic.protos.messages import WeightRow
from fedmosaic.protos.v1 import federation_pb2 as pb
from fedmosaic.server.round.relations import unpack
from fedmosaic.server.server import Server
from fedmosaic.server.settings import settings_from_kit
from fedmosaic.server.storage.store import Store, default_url
from fedmosaic.server.summary import with_rounds

MEMBER = "eva"
_AT_ONCE = 1000
_SLOW = ("server.db", "session", "rows", "epoch")
_LARGEST_GROWTH = 64 * 2**20
"""Bytes that this process, server and caller together, may grow by over all calls."""
_EXTREMES = (None, True, -1, 0, 2**70, 1e308, "", "x" * 5000, [], {}, [[]], {"a": 1}, "../x", "f" * 64)


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
            self.found[_where(record.exc_info[1])] += 1


def _where(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {frame.filename}:{frame.lineno}"


def _call(channel: grpc.Channel, name: str, messages: list[bytes]) -> str:
    """Send raw bytes; returns the status, and what was said with one that tells of a fault."""
    path = f"/fedmosaic.v1.Federation/{name}"
    try:
        if name == "Push":
            channel.stream_unary(path)(iter(messages), timeout=60)
        elif name in ("Pull", "ReadKeyMessages"):
            list(channel.unary_stream(path)(messages[0], timeout=0.5))
        else:
            channel.unary_unary(path)(messages[0], timeout=60)
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
    seen, faults, sent = _Tracebacks(), [], 0
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
                            answers.update(order(lambda m, n=name: _call(channel, n, m), work))
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


Reader = Callable[[bytes], object]


def readers(directory: Path, kept: dict[str, list[bytes]]) -> dict[str, tuple[bytes, Reader]]:
    """Every format by name: an original, and what reads it."""
    kit, server = directory / "clients" / MEMBER, directory / "server"
    state = kit / "state"
    found: dict[str, tuple[bytes, Reader]] = {}

    def file(path: Path, read: Callable[[], object]) -> None:
        original = path.read_bytes()

        def reading(content: bytes) -> None:
            path.write_bytes(content)
            try:
                read()
            finally:
                path.write_bytes(original)

        found[path.name if path.name not in found else f"{path.parent.name}/{path.name}"] = original, reading

    def whole_kit() -> None:
        opened = open_kit(kit)
        opened.member_id(), opened.signing_key(), opened.expires
        read_certificate(kit / "authority.pem")
        check_pair(kit / "tls.pem", kit / "tls.key")

    for name in ("roster.json", "consortium.pub", "authority.pem", "tls.pem", "tls.key", "identity.key"):
        file(kit / name, whole_kit)
    file(server / "server.toml", lambda: settings_from_kit(server))
    told = 'kit = "kit"\nserver = "fl.example.org:7443"\nstate_dir = "state"\n'
    (kit / "witness.toml").write_text(told)
    file(kit / "witness.toml", lambda: read_configuration(kit / "witness.toml", WitnessSettings).located(kit))
    more = '[model]\npath = "m"\n[probe]\npath = "m"\n[data]\ntrain = "train.jsonl"\n'
    (kit / "client.toml").write_text(told + more)
    file(kit / "client.toml", lambda: read_configuration(kit / "client.toml", ClientSettings).located(kit))
    config = directory / "federation.json"
    roster = open_kit(kit).roster
    members = [{"id": member.id} for member in roster.members]
    terms = roster.terms.model_dump(mode="json")
    config.write_text(json.dumps({"federation": roster.federation, "members": members, "terms": terms}))
    file(config, lambda: read_configuration(config, FederationConfig))
    make_request(directory / "new", "vectors", "zed")
    request = next((directory / "new").rglob(REQUEST))
    file(request, lambda: read_request(request))
    client = fv.Client(directory, MEMBER, 0)

    def session() -> None:
        try:
            keyring = client.session(None)._protection._keyring
            assert client.state is not None
            client.state.smallest_row(), client.state.gave_up(2), keyring.has(1), read_record(state)
        finally:
            client.close()

    for path in (state / "session.json", state / "rows.json", *sorted((state / "keys").glob("epoch-*.json"))):
        file(path, session)
    file(state / "keys" / "counter.json", lambda: NonceCounter(state / "keys" / "counter.json", "vectors"))
    upload = next(state.glob("upload-*.bin"))
    file(upload, lambda: read_upload(upload))
    profile = next(state.glob("profile-*.npy"))
    file(profile, lambda: read_profile(profile, 32))
    file(state / "profile-average.npz", lambda: read_average(state / "profile-average.npz", 32))
    file(state / "clipping.json", lambda: ClippingRecord(state / "clipping.json").shares())
    ledger = state / "ledger.sqlite"
    rows = read_ledger(ledger)

    def same_ledger() -> None:
        if read_ledger(ledger) != rows:
            raise AssertionError("another ledger was read, and nothing noticed")

    file(ledger, same_ledger)
    file(state / "ledger.sqlite.head", same_ledger)
    relations = server / "state" / "relations" / "000001" / "all.bin"
    file(relations, lambda: unpack(relations.read_bytes(), relations))
    result = server / "state" / "rounds" / "000001.json"
    file(result, lambda: with_rounds({}, server / "state"))
    for log in (state / AUDIT, server / "state" / AUDIT):
        file(log, lambda log=log: read_audit(log))
    database = server / "state" / "server.db"

    def all_of_it() -> None:
        for name in ("server.db-wal", "server.db-shm"):
            database.with_name(name).unlink(missing_ok=True)
        store = Store(default_url(database.parent), durable=False)
        try:
            store.results(), store.profiles(), store.uploads(1), store.reports(), store.get_json("run")
        finally:
            store.close()

    file(database, all_of_it)
    told = pb.ReportRequest.FromString(kept["Report"][0]).statement
    found["statement"] = told, _statement
    key = GroupKey.load(json.loads(next((state / "keys").glob("epoch-*.json")).read_bytes())["key"].encode())
    return found | _records(key)


def _statement(content: bytes) -> None:
    try:
        data = parse_json(content)
    except ValueError:
        return
    check_received(data, MEMBER)


def _records(group_key: GroupKey) -> dict[str, tuple[bytes, Reader]]:
    """Uploads as the server checks them and aggregates as a client opens them, of every back end."""
    found: dict[str, tuple[bytes, Reader]] = {}
    policy, context = AggregationPolicy(), RoundContext("vectors", group_key.epoch, 1, "shared", 80)
    for parameters in (PlainParameters(), MaskParameters(), CkksParameters()):
        name, total = parameters.backend, 1 << parameters.weight_bits
        secret = generate_group_secret(parameters)
        key = dataclasses.replace(group_key, parameters_hash=parameters.digest(), ckks_secret=secret)
        key = None if name == "plain" else key
        ciphers = {m: create_cipher(parameters, m, policy, allow_plaintext=True) for m in fv.MEMBERS}
        uploads = {
            m: cipher.encrypt(np.full(80, 0.1), key, context, bytes([n] * 16))
            for n, (m, cipher) in enumerate(ciphers.items())
        }
        row = WeightRow(fv.MEMBERS[1:], (total // 4,) * 4, parameters.weight_bits)
        server = create_aggregator(parameters, policy, allow_plaintext=True)
        aggregate = bytes(server.aggregate(uploads, {"ada": row}, context)[0])
        found[f"{name} upload"] = (
            uploads["ben"],
            lambda content, server=server: server.check_upload(content, context, "ben"),
        )
        found[f"{name} aggregate"] = (
            aggregate,
            lambda content, c=ciphers["ada"], key=key, row=row: c.decrypt(content, key, context, row),
        )
    return found


def mutate_files(
    directory: Path, kept: dict[str, list[bytes]], seed: int, count: int
) -> tuple[int, list[str]]:
    """Read mutated contents of every format; returns how many, and whatever was no FedMosaicError.

    Each has draws of its own. Those that take milliseconds to read get a fifth.
    """
    faults: Counter[str] = Counter()
    tried = 0
    for name, (original, read) in readers(directory, kept).items():
        read(original)
        draw, slow = random.Random(f"{seed} {name}"), name.startswith(_SLOW)
        outcomes: Counter[str] = Counter()
        for number in range(count // 5 if slow else count):
            content = mutate_json(original, draw) if number % 2 else original
            if content == original:
                content = mutate(original, [original], draw)
            tried += 1
            try:
                read(content)
                outcomes["read"] += 1
            except FedMosaicError as error:
                outcomes[type(error).__name__] += 1
            except Exception as error:
                fault = f"{name}: {_where(error)}: {' '.join(str(error).split())[:120]}"
                faults[fault] += 1
                if faults[fault] == 1:
                    (directory / f"fault-{len(faults)}").write_bytes(content)
        print(f"{name:45s} {dict(outcomes)}", flush=True)
    return tried, [f"{fault} ({number} times)" for fault, number in faults.items()]


def mutate_everything(directory: Path, seed: int, count: int) -> tuple[int, list[str]]:
    """Both, `count` times each call and format; returns how many mutations were tried, and the faults."""
    schedule = {"round_deadline_seconds": 36_000, "gathering_seconds": 300, "key_patience_seconds": 300}
    federation = fv.make_federation(directory / "f", fv.terms("mask", 3, **schedule))
    sent, faults, kept = mutate_messages(federation, seed, count)
    tried, more = mutate_files(federation, kept, seed, count)
    return sent + tried, faults + more
