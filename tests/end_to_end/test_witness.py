"""A server that lies about a row is caught by the witness; a recipient takes nothing without its word."""

import hashlib
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from end_to_end import federation_of_vectors as fv
from fedmosaic.client.round.protection import Identity, Protection
from fedmosaic.client.transport.connection import open_channel
from fedmosaic.client.witness import WitnessSettings, run
from fedmosaic.privacy.audit import AUDIT, read_audit
from fedmosaic.privacy.encryption.aggregators import create_aggregator
from fedmosaic.privacy.encryption.records import HEADER_BYTES, RoundContext
from fedmosaic.privacy.federation.kits import WitnessEntry, open_kit
from fedmosaic.protos.errors import IdentityError, WitnessError
from fedmosaic.protos.messages import AggregateSection, WeightRow
from fedmosaic.protos.refusal import Refusal, from_rpc_error
from fedmosaic.protos.v1 import federation_pb2 as pb
from fedmosaic.protos.v1 import federation_pb2_grpc as rpc
from fedmosaic.protos.witnessing import countersigned_digest
from fedmosaic.server import run as runs
from fedmosaic.server.round.aggregates import Offer
from fedmosaic.server.server import Server
from fedmosaic.server.settings import settings_from_kit

ROUNDS = 4
LIED_TO, ROBBED = ("ada", "dee"), "ben"
Rows = Mapping[str, WeightRow]


def found(directory: Path, backend: str, rounds: int, seconds: float = 60.0) -> Path:
    witness = WitnessEntry(id="notary", seconds=seconds)
    return fv.make_federation(directory, fv.terms(backend, rounds), witness=witness)


class LyingAggregator:
    """Announces one row to `LIED_TO` and applies another: in rounds 1 and 2, in a way of its own to each."""

    def __init__(self, *parameters: Any, **named: Any) -> None:
        self._honest = create_aggregator(*parameters, **named)
        self._last: dict[str, bytes] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._honest, name)

    def aggregate(self, uploads: Mapping[str, Any], rows: Rows, context: RoundContext) -> list[Any]:
        made: dict[str, Any] = dict(zip(rows, self._honest.aggregate(uploads, rows, context), strict=True))
        before, self._last = self._last, {name: bytes(made[name]) for name in LIED_TO}
        for name in LIED_TO if context.round < 3 else ():
            header, row = self._last[name][:HEADER_BYTES], rows[name]
            weights = list(row.weights)
            if (context.round, name) == (1, "ada"):  # another row than announced
                weights[0], weights[1] = weights[0] - 9, weights[1] + 9
            elif (context.round, name) == (1, "dee"):  # one upload swapped for another's
                first, second, *_ = row.contributors
                swapped = uploads[first][:HEADER_BYTES].tobytes() + uploads[second][HEADER_BYTES:]
                uploads = {**uploads, first: memoryview(swapped)}
            elif name == "ada":  # one left out
                weights[:3] = weights[0] + weights[1] // 2, 0, weights[2] + weights[1] - weights[1] // 2
            else:  # the sum of the round before, under this round's header
                made[name] = header + before[name][HEADER_BYTES:]
                continue
            other = replace(row, weights=tuple(weights))
            (lie,) = self._honest.aggregate(uploads, {name: other}, context)
            made[name] = header + bytes(lie)[HEADER_BYTES:]
        return list(made.values())


def rob(download_of: Any) -> Any:
    """What a server would have to do to hand out an aggregate past the witness."""
    seen: dict[int, AggregateSection] = {}

    def robbed(*arguments: Any) -> Any:
        download = download_of(*arguments)
        number = download.aggregate.round
        if arguments[3] != ROBBED or number not in (2, 3, 4):
            return download
        (section,) = download.aggregate.sections
        seen[number] = section
        if number == 2:
            changed = replace(section, uploads_sha256=b"", countersignature=b"")
        elif number == 3:
            foreign = Ed25519PrivateKey.generate().sign(bytes(32))
            changed = replace(section, countersignature=foreign)
        else:
            old = {name: getattr(seen[3], name) for name in ("uploads_sha256", "countersignature")}
            changed = replace(section, **old)
        return replace(download, aggregate=replace(download.aggregate, sections=(changed,)))

    return robbed


def serving(directory: Path) -> AbstractContextManager[int]:
    settings = settings_from_kit(directory / "server").model_copy(update={"durable": False})
    return Server(settings).background()


@contextmanager
def witnessed(directory: Path, port: int) -> Iterator[list[Any]]:
    """A witness in a thread; the list has what it returned, or raised."""
    settings = WitnessSettings(
        kit=directory / "clients" / "notary", server=f"localhost:{port}", state_dir=directory / "notes"
    )
    ended: list[Any] = []

    def live() -> None:
        try:
            ended.append(run(settings))
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    yield ended
    thread.join(60)


def take_part(directory: Path, port: int) -> dict[str, fv.Client]:
    clients = fv.clients_of(directory)
    lines = [fv.dial(directory, name, port) for name in clients]
    try:
        sessions = {c.name: c.session(line) for c, line in zip(clients.values(), lines, strict=True)}
        assert fv.run_all(sessions) == {}
    finally:
        for client, line in zip(clients.values(), lines, strict=True):
            client.close()
            line.close()
    return clients


def test_lies_about_rows_are_caught_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Over gRPC, CKKS: four lies to one recipient, and three countersignatures that are none to another."""
    caplog.set_level(logging.INFO, "fedmosaic")
    monkeypatch.setattr(runs, "create_aggregator", LyingAggregator)
    monkeypatch.setattr(Offer, "download", rob(Offer.download))
    directory = found(tmp_path / "f", "ckks", ROUNDS)
    with serving(directory) as port, witnessed(directory, port) as ended:
        clients = take_part(directory, port)
    exchanges = ROUNDS - 1
    assert ended == [(len(fv.MEMBERS) * exchanges - 4, 4)]
    taken = {name: len(client.learner.received) for name, client in clients.items()}
    assert taken == dict.fromkeys(fv.MEMBERS, exchanges) | {"ada": 1, "dee": 1, ROBBED: 0}
    for number in (1, 2):
        for name in LIED_TO:
            said = f"round {number}, {name}: NOT countersigned: the aggregate is not this row applied to the"
            assert any(line.startswith(said) for line in caplog.messages)
        told = f"round {number + 1}: no shared aggregate: round {number}: the witness notary refused it: the"
        assert sum(line.startswith(told) for line in caplog.messages) == 2
    absent = "the aggregate has no countersignature of the witness 'notary'"
    other = "the countersignature is not that of the witness 'notary' over this aggregate"
    for number, words in ((2, absent), (3, other), (4, other)):
        told = f"round {number}: no shared aggregate: {words}"
        assert any(line.startswith(told) for line in caplog.messages)
    lines, _ = read_audit(directory / "notes" / AUDIT)
    assert [line.event for line in lines].count("countersigned") == ended[0][0]
    assert {line.fields["wrong"] for line in lines if line.event == "not-countersigned"} == {"sum"}


def test_only_the_witness_may_look_and_it_is_no_member(tmp_path: Path) -> None:
    directory = found(tmp_path / "f", "mask", 3)
    with serving(directory) as port:
        for kit, reason in (("ada", "NOT_THE_WITNESS"), ("notary", "NOT_ON_ROSTER")):
            with pytest.raises(Refusal) as refused:
                ask(directory / "clients" / kit, port, witness=kit == "ada")
            assert refused.value.reason == reason
        settings = WitnessSettings(
            kit=directory / "clients/ada", server=f"localhost:{port}", state_dir=tmp_path / "notes"
        )
        with pytest.raises(IdentityError, match="is not the kit of the witness that its roster names"):
            run(settings)


def ask(kit: Path, port: int, *, witness: bool) -> None:
    opened = open_channel(f"localhost:{port}", kit / "authority.pem", kit / "tls.pem", kit / "tls.key")
    with opened as channel:
        try:
            if witness:
                list(rpc.WitnessStub(channel).Review(pb.ReviewRequest(), timeout=30))
            else:
                rpc.FederationStub(channel).RoundStatus(pb.RoundStatusRequest(), timeout=30)
        except grpc.RpcError as error:
            raise from_rpc_error(error, "call") from None


def test_a_countersignature_is_of_one_aggregate_alone(tmp_path: Path) -> None:
    directory = found(tmp_path / "f", "ckks", 3)
    kit, witness = open_kit(directory / "clients" / "ada"), open_kit(directory / "clients" / "notary")
    ada = Protection(Identity.of(kit), kit.roster, "", None)
    row = WeightRow(("ben", "cid", "dee"), (16384, 8192, 8192), 15)
    said: dict[str, Any] = {
        "federation": "vectors",
        "run_id": "0" * 32,
        "round_number": 2,
        "key_epoch": 1,
        "section": "shared",
        "recipient": "ada",
        "row": row,
        "aggregate_sha256": hashlib.sha256(b"sum").digest(),
        "uploads_sha256": bytes(32),
    }

    def check(key: Ed25519PrivateKey, **changes: Any) -> None:
        signature = key.sign(countersigned_digest(**(said | changes)))
        section = AggregateSection("shared", row, b"sum", "", bytes(32), signature)
        ada.check_countersigned("0" * 32, section, row, 1, 2)

    check(witness.signing_key())
    other = {
        "federation": "vector",
        "run_id": "1" * 32,
        "round_number": 1,
        "key_epoch": 2,
        "section": "family:",
        "recipient": "ben",
        "row": replace(row, weights=(8192, 16384, 8192)),
        "aggregate_sha256": bytes(32),
        "uploads_sha256": bytes([1] * 32),
    }
    for name, value in other.items():
        with pytest.raises(WitnessError, match="is not that of the witness 'notary'"):
            check(witness.signing_key(), **{name: value})
    with pytest.raises(WitnessError, match="is not that of the witness 'notary'"):
        check(kit.signing_key())
