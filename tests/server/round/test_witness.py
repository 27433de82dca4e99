"""A server that waits for its witness: what it hands out, when it stops waiting, and after a crash."""

from typing import Any

import pytest

from fedmosaic.privacy.federation.roster import Witness
from fedmosaic.protos import wire
from fedmosaic.protos.messages import Phase, ReceiptStatus
from fedmosaic.protos.refusal import Refusal
from fedmosaic.protos.witnessing import AggregateClaim, ReviewHeader, SignedUpload, Verdict
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.storage.blobs import WHOLE

NOTARY = Witness(id="notary", identity_key="a" * 64, tls_key_sha256="b" * 64, seconds=30.0)


def shown(coordinator: Coordinator) -> tuple[ReviewHeader, dict[str, Any], list[AggregateClaim]]:
    """What the witness sees."""
    header: ReviewHeader | None = None
    uploads: dict[str, tuple[SignedUpload, bytes]] = {}
    claims, now = list[AggregateClaim](), ""
    for part in coordinator.witnessing.parts():
        if part.HasField("header"):
            header = wire.decode(part.header, ReviewHeader)
        elif part.HasField("upload"):
            now = part.upload.client
            uploads[now] = wire.decode(part.upload, SignedUpload), b""
        elif part.HasField("chunk"):
            uploads[now] = uploads[now][0], uploads[now][1] + part.chunk.data
        else:
            claims.append(wire.decode(part.aggregate, AggregateClaim))
    assert header is not None
    assert (header.uploads, header.aggregates) == (len(uploads), len(claims))
    return header, uploads, claims


def verdict(header: ReviewHeader, claim: AggregateClaim, refusal: str = "") -> Verdict:
    signed = (b"", b"", refusal) if refusal else (b"u" * 32, b"s" * 64, "")
    return Verdict(header.run_id, header.round, claim.recipient, claim.section, *signed)


def test_nothing_is_handed_out_before_the_witness_has_spoken_of_all(
    federation: Any, begin: Any, clock: Any
) -> None:
    coordinator = begin(witness=NOTARY)
    federation.play(coordinator, 1)
    header, uploads, claims = shown(coordinator)
    for client, (signed, payload) in uploads.items():
        upload = federation.upload(coordinator.run_id, client, 1)
        assert signed.digest("fed", coordinator.run_id, 1) == coordinator._run.store.content_hash(1, client)
        assert payload == upload.sections[0].payload
    for claim in claims:
        assert coordinator.pull("clinic-a", 2) is None
        assert f"{claims.index(claim)} of 5 done, 30 s left" in coordinator.describe().message
        coordinator.witnessing.take(verdict(header, claim, "lie" if claim.recipient == "clinic-b" else ""))
        coordinator.advance()
    for claim in claims:
        found = coordinator.pull(claim.recipient, 2)
        (section,) = found.sections
        if claim.recipient == "clinic-b":
            assert section.refusal == "round 1: the witness notary refused it: lie"
        else:
            assert (section.uploads_sha256, section.countersignature) == (b"u" * 32, b"s" * 64)
            assert section.row == claim.row
    with pytest.raises(Refusal, match="does not wait for a countersignature"):
        coordinator.witnessing.take(verdict(header, claims[0]))


def test_what_is_not_countersigned_in_time_is_withheld_and_the_run_goes_on(
    federation: Any, begin: Any, clock: Any
) -> None:
    coordinator = begin(witness=NOTARY)
    federation.play(coordinator, 1)
    header, _, claims = shown(coordinator)
    coordinator.witnessing.take(verdict(header, claims[0]))
    clock.now += 29.0
    coordinator.advance()
    assert coordinator.available_round == 0
    clock.now += 2.0
    coordinator.advance()
    refusals = [coordinator.pull(c.recipient, 2).sections[0].refusal for c in claims]
    assert refusals == ["", *["round 1: the witness notary did not countersign it in time"] * 4]
    federation.play(coordinator, 2)
    coordinator.witnessing.take(verdict(shown(coordinator)[0], claims[0]))
    clock.now += 31.0
    coordinator.advance()
    # What the last round makes is handed to nobody, so nobody waits for it.
    federation.play(coordinator, 3)
    assert coordinator.describe().phase is Phase.FINISHED


def test_a_server_that_was_killed_shows_the_same_again_and_takes_no_other_upload(
    federation: Any, begin: Any, clock: Any
) -> None:
    coordinator = begin(witness=NOTARY)
    early = federation.clients[:4]
    federation.push(coordinator, 1, early)
    coordinator.advance()
    clock.now += 61.0
    coordinator.advance()
    before = shown(coordinator)
    federation.crash(coordinator)
    again = begin(witness=NOTARY)
    late = again.push("clinic-e", federation.upload(again.run_id, "clinic-e", 1))
    assert late.status is ReceiptStatus.LATE
    assert shown(again) == before
    assert set(before[1]) == set(early)


def test_an_aggregate_that_is_made_anew_keeps_its_countersignature(
    federation: Any, begin: Any, clock: Any
) -> None:
    coordinator = begin(witness=NOTARY)
    federation.play(coordinator, 1)
    header, _, claims = shown(coordinator)
    for claim in claims:
        coordinator.witnessing.take(verdict(header, claim))
    coordinator.advance()
    coordinator._run.blobs.path("aggregates", 2, WHOLE).write_bytes(b"damaged")
    found = coordinator.pull("clinic-a", 2)
    assert found.sections[0].countersignature == b"s" * 64
    assert len(found.sections[0].payload) > 7
