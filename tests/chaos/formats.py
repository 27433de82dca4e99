"""Mutated contents of every request and every file format, and of what is in them, to all that reads them."""

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from chaos.mutations import MEMBER, mutate, mutate_json, mutate_messages, where
from chaos.received import received
from end_to_end import federation_of_vectors as fv
from fedmosaic.client.client import RESULT
from fedmosaic.client.ledger import SEEN, DataLedger
from fedmosaic.client.model.scoring import Score
from fedmosaic.client.planning import AdapterPlan
from fedmosaic.client.result.ending import ResultFile
from fedmosaic.client.result.saved import RECORD, SavedModel, read_saved
from fedmosaic.client.round.keyring import Keyring
from fedmosaic.client.round.records import ClippingRecord, read_average, read_profile, read_upload
from fedmosaic.client.settings import ClientSettings
from fedmosaic.client.state import ClientState, read_record
from fedmosaic.client.statement import STATEMENT, statement_inputs
from fedmosaic.client.transport.grpc import Traffic
from fedmosaic.client.witness import WitnessSettings
from fedmosaic.privacy.audit import AUDIT, read_audit
from fedmosaic.privacy.configuration import parse_json, read_configuration, read_own
from fedmosaic.privacy.encryption.aggregators import create_aggregator
from fedmosaic.privacy.encryption.ciphers import create_cipher, generate_group_secret
from fedmosaic.privacy.encryption.parameters import CkksParameters, MaskParameters, PlainParameters
from fedmosaic.privacy.encryption.records import RoundContext
from fedmosaic.privacy.federation.identity import check_pair, read_certificate
from fedmosaic.privacy.federation.kits import REQUEST, FederationConfig, Kit, open_kit
from fedmosaic.privacy.federation.requests import make_request, read_request
from fedmosaic.privacy.groupkey.key import GroupKey
from fedmosaic.privacy.groupkey.nonces import NonceCounter
from fedmosaic.privacy.ledger.ledger import LEDGER, Ledger
from fedmosaic.privacy.ledger.store import read_ledger
from fedmosaic.privacy.policy import AggregationPolicy
from fedmosaic.privacy.statement.build import statement
from fedmosaic.privacy.statement.check import check_received
from fedmosaic.privacy.statement.models import PrivacyStatement
from fedmosaic.protos import wire
from fedmosaic.protos.errors import FedMosaicError, WireError
from fedmosaic.protos.messages import Enrolment, KeyMessage, WeightRow
from fedmosaic.protos.refusal import Refusal
from fedmosaic.protos.v1 import federation_pb2 as pb
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.dashboard.records import Status
from fedmosaic.server.round.relations import unpack
from fedmosaic.server.settings import OperatorSettings
from fedmosaic.server.storage.store import Store, default_url
from fedmosaic.server.summary import STATUS, with_rounds

_AUDIT_BYTES = 2000
"""An audit log's first lines are mutated; the rest is more of the same."""
Reader = Callable[[bytes], object]
_CALLS: dict[str, Callable[[Coordinator, Any], object]] = {
    "Enrol": lambda run, asked: run.enrol(MEMBER, wire.decode(asked, Enrolment)),
    "RoundStatus": lambda run, _: run.status(MEMBER),
    "PostKeyMessage": lambda run, asked: run.post_key_message(MEMBER, wire.decode(asked, KeyMessage)),
    "ReadKeyMessages": lambda run, asked: run.read_key_messages(MEMBER, asked.epoch, asked.stage),
    "Pull": lambda run, asked: run.pull(MEMBER, asked.round),
    "UploadStatus": lambda run, asked: run.announce(MEMBER, wire.decode_upload_header(asked.header)),
    "Push": lambda run, asked: (
        run.announce(MEMBER, wire.decode_upload_header(asked.header))
        if asked.HasField("header")
        else wire.check_chunk(asked.chunk, 0, 1000)
    ),
    "Report": lambda run, asked: run.report(MEMBER, asked.statement),
}
"""What the server does with each request, after gRPC has handed its bytes over."""


class _Formats(dict[str, tuple[bytes, Reader]]):
    """Every format by name: an original, and what reads it."""

    def file(self, path: Path, read: Callable[[Path], object], most: int | None = None) -> None:
        """Add a file as it is, or its whole lines among the first bytes."""
        original = path.read_bytes()
        if most is not None:
            original = original[: original.rindex(b"\n", 0, most) + 1]

        def reading(content: bytes) -> None:
            path.write_bytes(content)
            read(path)

        self[path.name if path.name not in self else f"{path.parent.name}/{path.name}"] = original, reading


def readers(directory: Path, kept: dict[str, list[bytes]]) -> dict[str, tuple[bytes, Reader]]:
    """Every format by name: an original, and what reads it."""
    found, kit, server = _Formats(), directory / "clients" / MEMBER, directory / "server"
    _in_kit(found, kit, (server / "server.toml").read_text())
    _of_client(found, kit)
    state, database = server / "state", server / "state" / "server.db"
    relations = state / "relations" / "000001" / "all.bin"
    found.file(relations, lambda path: unpack(path.read_bytes(), path))
    found.file(state / "rounds" / "000001.json", lambda _: with_rounds({}, state))
    found.file(state / AUDIT, read_audit, _AUDIT_BYTES)

    def all_of_it(_: Path) -> None:
        for name in ("server.db-wal", "server.db-shm"):
            database.with_name(name).unlink(missing_ok=True)
        with closing(Store(default_url(state), durable=False)) as store:
            store.results(), store.profiles(), store.uploads(1), store.reports(), store.get_json("run")

    found.file(database, all_of_it)
    found.file(state / STATUS, lambda path: read_own(path, Status.model_validate, ""))
    found["statement"] = pb.ReportRequest.FromString(kept["Report"][0]).statement, _statement
    key = next((kit / "state" / "keys").glob("epoch-*.json")).read_bytes()
    return found | _records(GroupKey.load(json.loads(key)["key"].encode()))


def _in_kit(found: _Formats, kit: Path, listening: str) -> None:
    """What the consortium hands out, and the settings beside it."""
    opened = open_kit(kit)
    roster = opened.roster
    for name in ("roster.json", "consortium.pub"):
        found.file(kit / name, lambda _: open_kit(kit))
    found.file(kit / "authority.pem", read_certificate)
    for name in ("tls.pem", "tls.key"):
        found.file(kit / name, lambda _: (opened.member_id(), check_pair(kit / "tls.pem", kit / "tls.key")))
    found.file(kit / "identity.key", lambda _: opened.signing_key())
    members, terms = [{"id": member.id} for member in roster.members], roster.terms.model_dump(mode="json")
    founding = json.dumps({"federation": roster.federation, "members": members, "terms": terms})
    told = 'kit = "kit"\nserver = "fl.example.org:7443"\nstate_dir = "state"\n'
    more = '[model]\npath = "m"\n[probe]\npath = "m"\n[data]\ntrain = "train.jsonl"\n'
    kinds: dict[str, tuple[str, Any]] = {
        "server.toml": (listening, OperatorSettings),
        "witness.toml": (told, WitnessSettings),
        "client.toml": (told + more, ClientSettings),
        "federation.json": (founding, FederationConfig),
    }
    for name, (content, kind) in kinds.items():
        (kit / name).write_text(content)
        found.file(kit / name, partial(_configuration, kind))
    make_request(kit / "new", "vectors", "zed")
    found.file(next((kit / "new").rglob(REQUEST)), read_request)


def _configuration(kind: Any, path: Path) -> None:
    read_configuration(path, kind)


def _of_client(found: _Formats, kit: Path) -> None:
    """What a client keeps."""
    opened, state = open_kit(kit), kit / "state"
    key, roster, keys = opened.signing_key(), opened.roster, state / "keys"

    def record(_: Path) -> None:
        kept = read_record(state)
        if kept is not None and kept.roster is not None:
            kept.roster.check(roster)

    found.file(state / "session.json", record)
    held = ClientState(state, "vectors", MEMBER)
    found.file(state / "rows.json", lambda _: held.smallest_row())
    nobody: Any = None
    for path in keys.glob("epoch-*.json"):
        found.file(path, lambda _: Keyring(MEMBER, key, roster, nobody, keys).key(1))
    found.file(keys / "counter.json", lambda path: NonceCounter(path, "vectors"))
    found.file(next(state.glob("upload-*.bin")), read_upload)
    found.file(next(state.glob("profile-*.npy")), lambda path: read_profile(path, 32))
    found.file(state / "profile-average.npz", lambda path: read_average(path, 32))
    found.file(state / "clipping.json", lambda path: ClippingRecord(path).shares())
    held.give_up(1)
    found.file(state / "given-up.json", lambda _: held.gave_up(1))
    Traffic(state / "traffic.json").save()
    found.file(state / "traffic.json", Traffic)
    _of_result(found, opened, held)
    ledger = state / "ledger.sqlite"
    charged = read_ledger(ledger)

    def same_ledger(_: Path) -> None:
        if read_ledger(ledger) != charged:
            raise AssertionError("another ledger was read, and nothing noticed")

    found.file(ledger, same_ledger)
    found.file(state / "ledger.sqlite.head", same_ledger)
    found.file(state / AUDIT, read_audit, _AUDIT_BYTES)


def _of_result(found: _Formats, kit: Kit, held: ClientState) -> None:
    """What a client keeps for its own people, and where its ledger is."""
    state = held.directory
    ResultFile(state / RESULT).put_scores("before", {"self": Score((True, False), "accuracy", None)})
    found.file(state / RESULT, lambda path: ResultFile(path).score("before", "self"))
    settings = read_configuration(kit.directory / "client.toml", ClientSettings)
    SavedModel.of(settings, kit.roster, MEMBER).write(state)
    found.file(state / RECORD, lambda path: read_saved(path.parent))
    books = DataLedger(state, True, state, held.record)
    with Ledger.open(state / LEDGER, MEMBER, 1e-5, 8.0, "rdp", budgeted_channels=("profile",)) as ledger:
        books.remember(ledger)
        inputs = statement_inputs(kit.roster, held, ledger, AdapterPlan(0.0, 0.1))
    found.file(state / SEEN, lambda _: books.check(()))
    (state / STATEMENT).write_text(statement(inputs).model_dump_json())
    found.file(state / STATEMENT, lambda path: read_own(path, PrivacyStatement.model_validate, ""))


def calls(run: Coordinator, kept: dict[str, list[bytes]]) -> dict[str, tuple[bytes, Reader]]:
    """Every call by name: a request, and what answers it; a request of before may be refused now."""

    def answering(name: str, content: bytes) -> None:
        try:
            request = getattr(pb, f"{name}Request").FromString(content)
        except DecodeError:
            raise WireError("no request of this call") from None
        with suppress(*([Refusal] if content == kept[name][-1] else ())):
            _CALLS[name](run, request)

    return {name: (contents[-1], partial(answering, name)) for name, contents in kept.items()}


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
        own = dataclasses.replace(group_key, parameters_hash=parameters.digest(), ckks_secret=secret)
        key = None if name == "plain" else own
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
            partial(server.check_upload, context=context, client="ben"),
        )
        found[f"{name} aggregate"] = (
            aggregate,
            partial(ciphers["ada"].decrypt, key=key, context=context, row=row),
        )
    return found


def mutate_contents(
    directory: Path, found: dict[str, tuple[bytes, Reader]], seed: int, count: int
) -> tuple[int, list[str]]:
    """Read mutated contents of each kind; returns how many, and whatever was no FedMosaicError.

    Each has draws of its own.
    """
    faults: Counter[str] = Counter()
    tried = 0
    for name, (original, read) in found.items():
        read(original)
        draw, outcomes = random.Random(f"{seed} {name}"), Counter[str]()
        for number in range(count):
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
                fault = f"{name}: {where(error)}: {' '.join(str(error).split())[:120]}"
                faults[fault] += 1
                if faults[fault] == 1:
                    (directory / f"fault-{len(faults)}").write_bytes(content)
        read(original)
        print(f"{name:45s} {dict(outcomes)}", flush=True)
    return tried, [f"{fault} ({number} times)" for fault, number in faults.items()]


def found_federation(directory: Path) -> Path:
    """One whose round does not close while it is mutated."""
    schedule = {"round_deadline_seconds": 36_000, "gathering_seconds": 300, "key_patience_seconds": 300}
    return fv.make_federation(directory, fv.terms("mask", 3, **schedule))


def mutate_everything(directory: Path, seed: int, count: int) -> tuple[int, list[str]]:
    """Both, `count` times each call and format; returns how many mutations were tried, and the faults."""
    federation = found_federation(directory / "f")
    sent, faults, kept = mutate_messages(federation, seed, count)
    with closing(fv.coordinator_of(federation)) as run:
        parts = calls(run, kept) | received(federation, run, kept, MEMBER)
        asked, refused = mutate_contents(federation, parts, seed, count)
    tried, more = mutate_contents(federation, readers(federation, kept), seed, count)
    return sent + asked + tried, [*faults, *refused, *more]
