"""What members, witness and server read of each other besides requests: answers, keys, sums, reviews."""

import copy
import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from end_to_end import federation_of_vectors as fv
from end_to_end.test_group_sums import group_terms
from fedmosaic.client.transport.grpc import _Download
from fedmosaic.client.witness import receive
from fedmosaic.privacy.audit import AuditLog
from fedmosaic.privacy.federation.kits import open_kit
from fedmosaic.privacy.federation.witness import WitnessBook
from fedmosaic.privacy.groupkey.agreement import KeyAgreement, check_confirmations, plan_epoch
from fedmosaic.privacy.policy import check_row
from fedmosaic.privacy.secureaggregation.collector import SumCollector
from fedmosaic.privacy.secureaggregation.masks import unpack
from fedmosaic.privacy.secureaggregation.member import SumMember
from fedmosaic.privacy.secureaggregation.messages import Opening, Unmasking
from fedmosaic.privacy.secureaggregation.partition import Partition, RoundTotals
from fedmosaic.privacy.secureaggregation.terms import SumTerms
from fedmosaic.protos import wire
from fedmosaic.protos.errors import WireError
from fedmosaic.protos.messages import (
    Enrolled,
    Receipt,
    ReceiptStatus,
    RelayedKeyMessage,
    RoundStatus,
    WeightRow,
)
from fedmosaic.protos.refusal import Refusal
from fedmosaic.protos.v1 import federation_pb2 as pb
from fedmosaic.protos.witnessing import AggregateClaim, ReviewHeader, SignedUpload, Verdict
from fedmosaic.server.coordinator import Coordinator

Reader = Callable[[bytes], object]
Targets = dict[str, tuple[bytes, Reader]]
_SIZE = 7


def received(directory: Path, run: Coordinator, kept: dict[str, list[bytes]], member: str) -> Targets:
    """Every one by name: an original, and what reads it."""
    kits = {name: open_kit(directory / "clients" / name) for name in fv.MEMBERS}
    return _answers(run, member) | _reviews(directory, run, kept, member) | _keys(kits) | _sums(kits)


def _parsed(kind: Any, content: bytes) -> Any:
    try:
        return kind.FromString(content)
    except DecodeError:
        raise WireError("no message of this kind, as gRPC says") from None


def _answers(run: Coordinator, member: str) -> Targets:
    """What a client is told by a server."""
    receipt = Receipt(ReceiptStatus.ACCEPTED, 2, bytes(32), bytes(32))
    enrolled = Enrolled(run.run_id, 2, 3, 1, fv.MEMBERS, bytes(32), bytes(32))
    state = wire.encode(run.status(member), pb.RoundState)
    told = wire.encode(receipt, pb.PushResponse)
    aggregate = run.pull(member, 2)
    assert aggregate is not None
    payload = b"".join(section.payload for section in aggregate.sections)
    sizes = [len(section.payload) for section in aggregate.sections]
    header = wire.encode_aggregate_header(aggregate, sizes, hashlib.sha256(payload).digest(), 0)

    def pulled(header: bytes, payload: bytes) -> None:
        download = _Download()
        download.begin(_parsed(pb.AggregateHeader, header))
        download.append(pb.Chunk(offset=0, data=payload))
        families = run.settings.roster.sharing_families()
        for section in download.aggregate().sections:
            if section.row is not None:
                check_row(member, section.row, run.settings.terms.policy, members=families, families=families)

    def decoded(kind: Any, message: Any, content: bytes) -> None:
        wire.decode(_parsed(kind, content), message)

    return {
        "EnrolResponse": (
            wire.encode(enrolled, pb.EnrolResponse).SerializeToString(),
            partial(decoded, pb.EnrolResponse, Enrolled),
        ),
        "RoundStatusResponse": (
            pb.RoundStatusResponse(state=state).SerializeToString(),
            lambda content: wire.decode(_parsed(pb.RoundStatusResponse, content).state, RoundStatus),
        ),
        "PushResponse": (told.SerializeToString(), partial(decoded, pb.PushResponse, Receipt)),
        "UploadStatusResponse": (
            pb.UploadStatusResponse(receipt=told).SerializeToString(),
            lambda content: wire.decode(_parsed(pb.UploadStatusResponse, content).receipt, Receipt),
        ),
        "PullResponse, header": (header, lambda content: pulled(content, payload)),
        "PullResponse, payload": (payload, lambda content: pulled(header, content)),
        "ReadKeyMessagesResponse": (
            pb.ReadKeyMessagesResponse(
                messages=[pb.RelayedKeyMessage(sender="ada", payload=b"box")]
            ).SerializeToString(),
            lambda content: [
                wire.decode(message, RelayedKeyMessage)
                for message in _parsed(pb.ReadKeyMessagesResponse, content).messages
            ],
        ),
    }


def _reviews(directory: Path, run: Coordinator, kept: dict[str, list[bytes]], member: str) -> Targets:
    """What the witness reads of the server, and the server of the witness."""
    kit = open_kit(directory / "clients" / member)
    place = directory / "witness"
    place.mkdir(exist_ok=True)
    book = WitnessBook(kit.roster, kit.signing_key(), place, AuditLog(place))
    message = pb.PushRequest.FromString(kept["Push"][0])
    signed = wire.encode(SignedUpload.of(member, wire.decode_upload_header(message.header)), pb.SignedUpload)
    row = WeightRow(("ben", "cid", "dee", "eva"), (1024,) * 4, 12)
    head = wire.encode(ReviewHeader(run.run_id, 1, 1, 1, 1), pb.ReviewHeader)
    claim = wire.encode(AggregateClaim("ada", "shared", row, bytes(32)), pb.AggregateClaim)
    chunks = [pb.PushRequest.FromString(part).chunk for part in kept["Push"][1:2]]
    originals = {"header": head, "upload": signed, "aggregate": claim}

    def reviewing(name: str, content: bytes) -> None:
        parts: dict[str, Any] = dict(originals)
        parts[name] = _parsed(type(originals[name]), content)
        header, upload, aggregate = parts.values()
        first = [pb.ReviewResponse(header=header), pb.ReviewResponse(upload=upload)]
        pieces = [pb.ReviewResponse(chunk=chunk) for chunk in chunks]
        review = receive([*first, *pieces, pb.ReviewResponse(aggregate=aggregate)], book)
        for path in place.glob("run-*.json"):
            path.unlink()  # a later round than this one may have been judged
        if review.header is not None and review.complete:
            book.judge(review.header, review.uploads, review.claims)

    def countersigned(content: bytes) -> None:
        try:
            run.witnessing.take(wire.decode(_parsed(pb.CountersignRequest, content), Verdict))
        except Refusal as refusal:
            if refusal.reason != "NOT_UNDER_REVIEW":
                raise

    verdict = Verdict(run.run_id, 1, "ada", "shared", bytes(32), bytes(64), "")
    found: Targets = {
        f"ReviewResponse, {name}": (original.SerializeToString(), partial(reviewing, name))
        for name, original in originals.items()
    }
    content = wire.encode(verdict, pb.CountersignRequest).SerializeToString()
    return found | {"Countersign": (content, countersigned)}


def _keys(kits: dict[str, Any]) -> Targets:
    """What members send each other of a group key, through a server that may change it."""
    roster = kits["ada"].roster
    digest = roster.terms.encryption.digest()
    epoch = plan_epoch(roster.federation, 7, fv.MEMBERS, roster.identity_keys(), roster.hash, digest)
    sides = {n: KeyAgreement(kit.signing_key(), n, epoch, lambda: b"", 0) for n, kit in kits.items()}
    openings = {name: side.opening() for name, side in sides.items()}
    (boxes,) = filter(None, [side.accept_openings(openings) for side in sides.values()])
    name, box = next(iter(boxes.items()))
    waiting = dict(vars(sides[name]))

    def boxed(content: bytes) -> None:
        vars(sides[name]).update(waiting)
        sides[name].accept_box(content)

    def opened(content: bytes) -> None:
        side = KeyAgreement(kits["eva"].signing_key(), "eva", epoch, lambda: b"", 0)
        side.accept_openings(openings | {"ada": content, "eva": side.opening()})

    for each, sealed in boxes.items():
        sides[each].accept_box(sealed)
    confirmed = {each: side.confirmation() for each, side in sides.items()}
    key = sides[name].unconfirmed()
    return {
        "key opening": (openings["ada"], opened),
        "key box": (box, boxed),
        "key confirmation": (
            confirmed["ada"],
            lambda content: check_confirmations(epoch, key, confirmed | {"ada": content}),
        ),
    }


def _sums(kits: dict[str, Any]) -> Targets:
    """What members and the server send each other of a secure sum."""
    names, keys = fv.MEMBERS, kits["ada"].roster.identity_keys()
    terms = SumTerms(bytes(32), names, keys, 4, 1, _SIZE, 32)
    members = {name: SumMember(terms, name, kit.signing_key(), os.urandom) for name, kit in kits.items()}
    steps, server = [], SumCollector(terms)

    def next_step(do: Callable[[str], object]) -> None:
        """Everybody but ada has done it, whose message comes now; then ada as well."""
        for name in names[1:]:
            do(name)
        steps.append(copy.deepcopy(server))
        do("ada")

    opening = {name: member.open() for name, member in members.items()}
    next_step(lambda name: server.add_opening(name, opening[name]))
    everybody = server.close_openings()
    sealed = {name: member.share(everybody) for name, member in members.items()}
    envelopes = {name: b"".join(given[other] for other in sorted(given)) for name, given in sealed.items()}
    next_step(lambda name: server.add_envelopes(name, envelopes[name]))
    given = server.envelopes_for("eva")
    before = {name: copy.copy(value) for name, value in vars(members["eva"]).items()}
    for name, member in members.items():
        member.accept(server.envelopes_for(name))
    vectors = {name: member.mask(np.arange(_SIZE)) for name, member in members.items()}
    next_step(lambda name: server.add_vector(name, vectors[name]))
    signed = {name: member.agree(server.close_vectors()) for name, member in members.items()}
    steps.append(copy.deepcopy(server))
    for name in names:
        server.add_signature(name, signed[name])
    shares = {name: member.unmask(server.signatures()).encoded() for name, member in members.items()}
    next_step(lambda name: server.add_unmasking(name, Unmasking.decoded(shares[name], names)))

    def accepted(content: bytes) -> None:
        eva = copy.copy(members["eva"])
        vars(eva).update({name: copy.copy(value) for name, value in before.items()})
        eva.accept(given | {"ada": content})

    def unmasked(content: bytes) -> None:
        collector = copy.deepcopy(steps[4])
        collector.add_unmasking("ada", Unmasking.decoded(content, names))
        collector.finish()

    def at(step: int, name: str) -> Reader:
        return lambda content: getattr(copy.deepcopy(steps[step]), name)("ada", content)

    agreed = group_terms(minimum=5)
    partition = Partition(groups=(names,), mixing=dict.fromkeys(names, (1.0,)))
    families = dict.fromkeys(names, "")
    totals = RoundTotals(2, (names,), (vectors["ada"],)).messages()["group-0"]

    def total(content: bytes) -> None:
        found = RoundTotals.from_messages(2, {"group-0": content}, 1)
        if found.contributors[0]:
            unpack(found.vectors[0], _SIZE, agreed.group_sums.bits)

    return {
        "sum opening": (
            opening["ada"].encoded(),
            lambda c: copy.deepcopy(steps[0]).add_opening("ada", Opening.decoded(c)),
        ),
        "sum envelopes": (envelopes["ada"], at(1, "add_envelopes")),
        "sum envelope": (given["ada"], accepted),
        "sum vector": (vectors["ada"], at(2, "add_vector")),
        "sum signature": (signed["ada"], at(3, "add_signature")),
        "sum shares": (shares["ada"], unmasked),
        "groups": (
            partition.model_dump_json().encode(),
            lambda content: Partition.decoded(content).check("ada", families, 5, 1),
        ),
        "sum of a group": (totals, total),
    }
