"""The coordinator: whole runs without a network, faults, restarts."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from waiting import at_once

from fedmosaic.privacy.encryption.records import HEADER_BYTES
from fedmosaic.privacy.mechanism.profile import Reduction
from fedmosaic.privacy.policy import AggregationPolicy
from fedmosaic.protos.errors import StateError
from fedmosaic.protos.messages import PROTOCOL_VERSION, LedgerHead, Phase, Profile, ReceiptStatus, Section
from fedmosaic.protos.refusal import Refusal, RefusalKind
from fedmosaic.protos.signing import ledger_digest
from fedmosaic.server import summary as summary_module
from fedmosaic.server.round import state as rounds
from fedmosaic.server.round.relevance import relevance
from fedmosaic.server.round.weights import Group, plan
from fedmosaic.server.summary import with_rounds, write_summary

ACCEPTED, DUPLICATE, LATE = ReceiptStatus.ACCEPTED, ReceiptStatus.DUPLICATE, ReceiptStatus.LATE


def refused(reason: str) -> Any:
    return pytest.raises(Refusal, check=lambda error: error.reason == reason)


def test_a_run_gives_the_weighted_sums_of_the_uploads(federation: Any, coordinator: Any) -> None:
    for number in (1, 2, 3):
        federation.play(coordinator, number)
        profiles = [federation.profile(c, number) for c in federation.clients]
        everybody = frozenset(federation.clients)
        planned = plan(
            Group("shared", "", federation.dimensions, everybody, everybody),
            federation.clients,
            relevance(profiles, "corrected"),
            temperature=0.5,
            policy=AggregationPolicy(),
            bits=federation.parameters.weight_bits,
        )
        uploads = np.stack([federation.vector(c, number) for c in federation.clients])
        for client in federation.clients:
            aggregate = coordinator.pull(client, number + 1)
            assert aggregate.round == number + 1
            (section,) = aggregate.sections
            assert client not in section.row.contributors
            row = planned.rows[client]
            assert (section.row.contributors, section.row.weights) == (row.contributors, row.weights)
            shares = np.zeros(5)
            for name, weight in zip(section.row.contributors, section.row.weights, strict=True):
                shares[federation.clients.index(name)] = weight / 2**section.row.bits
            np.testing.assert_allclose(federation.values(section.payload), shares @ uploads, atol=1e-6)
    status = coordinator.status("clinic-a")
    assert (status.phase, status.round) == (Phase.FINISHED, 4)


def test_before_round_one_there_is_nothing_and_before_a_round_opens_one_waits(
    federation: Any, coordinator: Any
) -> None:
    first = coordinator.pull("clinic-a", 1)
    assert (first.round, first.sections, first.upload_key_epoch) == (1, (), 0)
    assert coordinator.pull("clinic-a", 2) is None
    federation.play(coordinator, 1)
    assert coordinator.pull("clinic-a", 2).round == 2
    # A client that asks for a round that is over gets the one that is open.
    assert coordinator.pull("clinic-a", 1).round == 2
    with refused("ROUND_OUT_OF_RANGE"):
        coordinator.pull("clinic-a", 5)


def test_a_round_is_open_before_anything_is_written_about_the_one_before(
    federation: Any, coordinator: Any
) -> None:
    state = coordinator.settings.state_dir
    federation.play(coordinator, 1)
    federation.push(coordinator, 2, federation.clients)
    before = json.loads((state / "run.json").read_text())
    assert coordinator.move()
    assert coordinator.available_round == 3
    assert json.loads((state / "run.json").read_text()) == before
    coordinator.tidy()
    assert json.loads((state / "run.json").read_text())["open_round"] == 3
    assert sorted(path.name for path in (state / "uploads").iterdir()) == ["000002"]


def test_repeated_late_and_changed_pushes(federation: Any, coordinator: Any, clock: Any) -> None:
    run = coordinator.run_id
    upload = federation.upload(run, "clinic-a", 1)
    assert coordinator.push("clinic-a", upload).status is ACCEPTED
    assert coordinator.push("clinic-a", upload).status is DUPLICATE
    changed = federation.upload(run, "clinic-a", 1, profile=federation.profile("clinic-a", 9))
    with refused("UPLOAD_DIFFERS"):
        coordinator.push("clinic-a", changed)
    with refused("ROUND_NOT_OPEN"):
        coordinator.push("clinic-a", federation.upload(run, "clinic-a", 2))
    federation.push(coordinator, 1, federation.clients[1:4])
    clock.now += 60
    assert coordinator.advance()
    late = coordinator.push("clinic-e", federation.upload(run, "clinic-e", 1))
    assert (late.status, late.round) == (LATE, 2)
    assert coordinator.push("clinic-a", upload).status is DUPLICATE


def test_below_the_quorum_the_round_goes_on_and_says_so(
    federation: Any, coordinator: Any, clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator.push("clinic-a", federation.upload(coordinator.run_id, "clinic-a", 1))
    clock.now += 60
    with caplog.at_level(logging.WARNING):
        coordinator.advance()
    assert "deadline passed with 1 contributions, the quorum is 4" in caplog.text
    assert "missing clinic-b, clinic-c, clinic-d, clinic-e" in caplog.text
    status = coordinator.status("clinic-a")
    assert status.round == 1
    assert status.seconds_left == 60.0
    assert "deadline extended 1 ×" in status.message


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        ({"protocol_version": PROTOCOL_VERSION + 1}, "PROTOCOL_VERSION", r"4, the server 3.*the server"),
        ({"protocol_version": 1}, "PROTOCOL_VERSION", "update the client"),
        ({"federation": "other"}, "FEDERATION_DIFFERS", "'other', this is 'fed'"),
        ({"roster_hash": bytes(32)}, "ROSTER_DIFFERS", "newest roster"),
        ({"adapter_spec_hash": bytes(32)}, "ADAPTER_DIFFERS", "rank, blocks and modules"),
        ({"family": "llama"}, "FAMILY_DIFFERS", "'llama', the roster says ''"),
    ],
)
def test_enrolment_compares_the_terms(
    federation: Any, coordinator: Any, change: Any, reason: str, words: str
) -> None:
    with pytest.raises(Refusal, match=words) as error:
        coordinator.enrol("clinic-a", federation.enrolment(**change))
    assert (error.value.reason, error.value.kind) == (reason, RefusalKind.PRECONDITION)


def test_a_client_that_only_checks_is_not_there(federation: Any, coordinator: Any, clock: Any) -> None:
    enrolled = coordinator.enrol("clinic-e", federation.enrolment(check_only=True))
    assert (enrolled.round, enrolled.run_id) == (1, coordinator.run_id)
    with pytest.raises(Refusal, match="roster"):
        coordinator.enrol("clinic-e", federation.enrolment(check_only=True, roster_hash=bytes(32)))
    federation.play(coordinator, 1, federation.clients[:4])
    clock.now += 60
    coordinator.advance()
    assert "had not enrolled" in coordinator.pull("clinic-e", 2).sections[0].refusal


def _enrolment(federation: Any, head: bytes, key: str = "clinic-a") -> Any:
    digest = ledger_digest(federation="fed", client_id="clinic-a", head=head)
    return federation.enrolment(ledger_head=head, ledger_signature=federation.keys[key].sign(digest))


def _head(number: int) -> bytes:
    return bytes([number]) * 32


def test_the_newest_head_of_a_ledger_is_kept_and_handed_back(
    federation: Any, begin: Any, coordinator: Any
) -> None:
    assert coordinator.enrol("clinic-a", federation.enrolment()).ledger_head == b""
    assert coordinator.enrol("clinic-a", _enrolment(federation, _head(1))).ledger_head == _head(1)
    # Only the client can tell whether another head is a later one; it pushes if it is.
    assert coordinator.enrol("clinic-a", _enrolment(federation, _head(2))).ledger_head == _head(1)
    for follows in (b"", _head(2)):
        upload = federation.upload(coordinator.run_id, "clinic-a", 1, ledger=LedgerHead(_head(3), follows))
        with refused("LEDGER_BEHIND"):
            coordinator.push("clinic-a", upload)
    with refused("LEDGER_BEHIND"):
        coordinator.push("clinic-a", federation.upload(coordinator.run_id, "clinic-a", 1))
    upload = federation.upload(coordinator.run_id, "clinic-a", 1, ledger=LedgerHead(_head(3), _head(1)))
    assert coordinator.push("clinic-a", upload).status is ACCEPTED
    assert coordinator.push("clinic-a", upload).status is DUPLICATE, "sent again, it follows what it replaced"
    assert coordinator.enrol("clinic-b", federation.enrolment()).ledger_head == b"", "each member's own"
    federation.crash(coordinator)
    assert begin().enrol("clinic-a", federation.enrolment()).ledger_head == _head(3)


def test_the_head_of_a_ledger_is_signed_by_its_client(federation: Any, coordinator: Any) -> None:
    with refused("SIGNATURE_INVALID"):
        coordinator.enrol("clinic-a", _enrolment(federation, _head(1), key="clinic-b"))
    with refused("SIGNATURE_INVALID"):
        upload = federation.upload(coordinator.run_id, "clinic-a", 1, ledger=LedgerHead(_head(1)))
        coordinator.push("clinic-a", replace(upload, ledger=LedgerHead(_head(2))))
    assert coordinator.enrol("clinic-a", federation.enrolment()).ledger_head == b""


def test_a_late_upload_leaves_no_profile_and_moves_no_head(
    federation: Any, coordinator: Any, clock: Any
) -> None:
    coordinator.enrol("clinic-e", federation.enrolment())
    federation.push(coordinator, 1, federation.clients[:4])
    clock.now += 60
    coordinator.advance()
    late = federation.upload(coordinator.run_id, "clinic-e", 1, ledger=LedgerHead(_head(9)))
    assert coordinator.push("clinic-e", late).status is LATE
    assert set(coordinator._run.store.profiles()) == set(federation.clients[:4])
    assert coordinator.enrol("clinic-e", federation.enrolment()).ledger_head == b""


def test_strangers_are_refused_everywhere(federation: Any, coordinator: Any) -> None:
    upload = federation.upload(coordinator.run_id, "clinic-a", 1)
    calls: list[Callable[[], object]] = [
        lambda: coordinator.enrol("mallory", federation.enrolment()),
        lambda: coordinator.push("mallory", upload),
        lambda: coordinator.pull("mallory", 1),
        lambda: coordinator.status("mallory"),
        lambda: coordinator.report("mallory", b"{}"),
        lambda: coordinator.read_key_messages("mallory", 1, "opening"),
    ]
    for call in calls:
        with refused("NOT_ON_ROSTER"):
            call()


@pytest.mark.parametrize(
    "forge",
    [
        lambda f, run: f.upload(run, "clinic-a", 1, key=f.keys["clinic-b"]),
        lambda f, run: f.upload(run, "clinic-b", 1),
        lambda f, run: f.upload("0" * 32, "clinic-a", 1),
        lambda f, run: f.upload(run, "clinic-a", 1, federation="other"),
        lambda f, run: replace(f.upload(run, "clinic-a", 1), signature=bytes(64)),
    ],
    ids=["another key", "another client", "another run", "another federation", "no signature"],
)
def test_an_upload_must_be_signed_by_its_client_for_this_run(
    federation: Any, coordinator: Any, forge: Callable[..., Any]
) -> None:
    with refused("SIGNATURE_INVALID"):
        coordinator.push("clinic-a", forge(federation, coordinator.run_id))
    federation.push(coordinator, 1, ("clinic-a",))


def test_the_size_of_a_section_is_known_beforehand(federation: Any, coordinator: Any) -> None:
    upload = federation.upload(
        coordinator.run_id, "clinic-a", 1, sections=(Section("shared", bytes(HEADER_BYTES + 4 * 12 + 4)),)
    )
    with refused("WRONG_SIZE"):
        coordinator.push("clinic-a", upload)
    family = federation.upload(coordinator.run_id, "clinic-a", 1, sections=(Section("family", b"x"),))
    with refused("UNEXPECTED_SECTION"):
        coordinator.push("clinic-a", family)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_vector_that_cannot_be_used_is_refused_and_the_others_finish(
    federation: Any, coordinator: Any, bad: float, tmp_path: Path, clock: Any
) -> None:
    vector = federation.vector("clinic-a", 1)
    vector[3] = bad
    sections = (Section("shared", federation.record("clinic-a", 1, vector)),)
    with refused("PAYLOAD_UNUSABLE"):
        coordinator.push("clinic-a", federation.upload(coordinator.run_id, "clinic-a", 1, sections=sections))
    assert not list((tmp_path / "state" / "spool").iterdir())
    federation.push(coordinator, 1, federation.clients[1:])
    clock.now += 60
    coordinator.advance()
    section = coordinator.pull("clinic-b", 2).sections[0]
    assert "clinic-a" not in section.row.contributors
    assert np.isfinite(federation.values(section.payload)).all()


@pytest.mark.parametrize(
    ("label", "client", "number", "epoch"),
    [
        ("family:x", "clinic-a", 1, 0),
        ("shared", "clinic-b", 1, 0),
        ("shared", "clinic-a", 2, 0),
        ("shared", "clinic-a", 1, 1),
    ],
)
def test_a_record_made_for_another_place_is_refused(
    federation: Any, coordinator: Any, label: str, client: str, number: int, epoch: int
) -> None:
    record = federation.record(client, number, federation.vector("clinic-a", 1), label, epoch)
    upload = federation.upload(coordinator.run_id, "clinic-a", 1, sections=(Section("shared", record),))
    with refused("PAYLOAD_UNUSABLE"):
        coordinator.push("clinic-a", upload)


def test_bytes_other_than_announced_are_refused(federation: Any, coordinator: Any) -> None:
    header = federation.upload(coordinator.run_id, "clinic-a", 1).header()
    ticket = coordinator.announce("clinic-a", header)
    ticket.spool.write_bytes(bytes(ticket.size))
    with refused("PAYLOAD_DIFFERS"):
        coordinator.commit("clinic-a", header, ticket)
    assert not ticket.spool.exists()


def test_profiles_must_be_those_of_the_agreed_mechanism(federation: Any, begin: Any) -> None:
    coordinator = begin(profile={"noise_multiplier": 2.0})

    def push(variance: float, releases: int, size: int = 8) -> Any:
        profile = Profile(np.ones(size, dtype=np.float32), variance, releases)
        upload = federation.upload(coordinator.run_id, "clinic-a", 1, profile=profile)
        return coordinator.push("clinic-a", upload)

    with refused("PROFILE_DIMENSIONS"):
        push(4.0, 1, size=9)
    for variance, releases in ((4.1, 1), (0.0, 1), (1.9, 2), (3.9, 1)):
        with refused("PROFILE_NOISE"):
            push(variance, releases)
    # An exponential average with decay ½ over two releases: (¼ + ¼) · 4.
    assert push(2.0, 2).status is ACCEPTED


def test_who_sends_no_profile_receives_uniform_weights_and_is_reported(
    federation: Any, coordinator: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for client in federation.clients:
        coordinator.enrol(client, federation.enrolment())
        changes = {"profile": None} if client == "clinic-a" else {}
        coordinator.push(client, federation.upload(coordinator.run_id, client, 1, **changes))
    with caplog.at_level(logging.WARNING):
        coordinator.advance()
    assert "uniform weights for: clinic-a" in caplog.text
    assert set(coordinator.pull("clinic-a", 2).sections[0].row.weights) == {2**13}
    assert coordinator.summary()["results"][0]["uniform_weights_for"] == ["clinic-a"]


def test_an_abstaining_client_receives_but_does_not_contribute(federation: Any, coordinator: Any) -> None:
    for client in federation.clients:
        coordinator.enrol(client, federation.enrolment())
        changes = {"sections": ()} if client == "clinic-e" else {}
        receipt = coordinator.push(client, federation.upload(coordinator.run_id, client, 1, **changes))
        assert receipt.status is ACCEPTED
    coordinator.advance()
    assert coordinator.status("clinic-a").round == 2
    assert len(coordinator.pull("clinic-e", 2).sections[0].row.contributors) == 4
    assert "clinic-e" not in coordinator.pull("clinic-a", 2).sections[0].row.contributors


def test_where_the_policy_cannot_be_kept_the_recipient_is_told_and_trains_alone(
    make_federation: Any, begin: Any, clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    federation = make_federation(clients=("a", "b", "c", "d"))
    coordinator = begin(federation, schedule={"quorum": 3})
    for client in ("a", "b", "c", "d"):
        coordinator.enrol(client, federation.enrolment())
    for client in ("a", "b", "c"):
        coordinator.push(client, federation.upload(coordinator.run_id, client, 1))
    clock.now += 60
    with caplog.at_level(logging.WARNING):
        coordinator.advance()
    section = coordinator.pull("a", 2).sections[0]
    assert (section.row, section.payload) == (None, b"")
    assert "2 contributors other than the recipient" in section.refusal
    assert coordinator.pull("d", 2).sections[0].row is not None
    assert "a trains alone" in caplog.text


def test_families_share_a_second_section(make_federation: Any, begin: Any) -> None:
    names = ("a", "b", "c", "d", "e", "f")
    federation = make_federation(clients=names)
    families = {name: "llama" for name in "abcd"} | {"e": "qwen"}
    terms = {"adapter": {"family_dimensions": {"llama": 5}}, "relevance": {"across_families": True}}
    coordinator = begin(federation, families=families, schedule={"quorum": 6}, **terms)
    for name in names:
        coordinator.enrol(name, federation.enrolment(family=families.get(name, "")))
        sections = [Section("shared", federation.record(name, 1, federation.vector(name, 1)))]
        if name in "abcd":
            vector = federation.vector(name + "f", 1, 5)
            sections.append(Section("family", federation.record(name, 1, vector, "family:llama")))
        coordinator.push(name, federation.upload(coordinator.run_id, name, 1, sections=tuple(sections)))
    coordinator.advance()
    shared, family = coordinator.pull("a", 2).sections
    assert set(shared.row.contributors) == set("bcdef")
    assert set(family.row.contributors) == set("bcd")
    vectors = np.stack([federation.vector(n + "f", 1, 5) for n in family.row.contributors])
    expected = np.array(family.row.weights) / 2**family.row.bits @ vectors
    np.testing.assert_allclose(federation.values(family.payload), expected, atol=1e-6)
    assert [s.name for s in coordinator.pull("e", 2).sections] == ["shared"]


def test_a_killed_server_goes_on_with_its_round(federation: Any, store_url: str, begin: Any) -> None:
    before = begin(store_url=store_url)
    federation.play(before, 1)
    aggregate = before.pull("clinic-a", 2)
    uploads = {c: federation.upload(before.run_id, c, 2) for c in federation.clients}
    before.push("clinic-a", uploads["clinic-a"])
    before.push("clinic-b", uploads["clinic-b"])
    federation.crash(before)
    after = begin(store_url=store_url)
    assert after.run_id == before.run_id
    status = after.status("clinic-a")
    assert (status.round, status.arrived, status.seconds_left) == (2, ("clinic-a", "clinic-b"), 60.0)
    assert after.pull("clinic-a", 2) == aggregate
    assert after.push("clinic-a", uploads["clinic-a"]).status is DUPLICATE
    for client in federation.clients[2:]:
        assert after.push(client, uploads[client]).status is ACCEPTED
    after.advance()
    assert after.pull("clinic-e", 3).sections[0].row is not None
    assert len(after.summary()["results"]) == 2


def test_a_kill_while_a_round_is_aggregated_repeats_it_with_the_same_result(
    federation: Any, begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = begin()
    federation.push(before, 1)

    class Killed(BaseException):
        pass

    def killed(*_: object, **__: object) -> None:
        raise Killed

    # The payloads of the aggregates are on disk, the row that names them is not.
    monkeypatch.setattr(before._run.store, "close_round", killed)
    with pytest.raises(Killed):
        before.advance()
    written = sorted((tmp_path / "state" / "aggregates").rglob("*.bin"))
    (first,) = (path.read_bytes() for path in written)
    federation.crash(before)
    after = begin()
    assert after.pull("clinic-a", 2) is None
    after.advance()
    pulled = [after.pull(client, 2).sections[0].payload for client in federation.clients]
    assert b"".join(pulled) == first


@pytest.mark.parametrize(
    "part", [("blobs", "write"), ("blobs", "write_pieces"), ("store", "close_round")], ids=str
)
def test_a_round_that_cannot_be_aggregated_stays_open_and_is_tried_again(
    federation: Any, coordinator: Any, monkeypatch: pytest.MonkeyPatch, part: tuple[str, str]
) -> None:
    federation.push(coordinator, 1)
    with monkeypatch.context() as patch:
        patch.setattr(getattr(coordinator._run, part[0]), part[1], _no_space)
        with pytest.raises(OSError, match="No space left"):
            coordinator.advance()
    assert coordinator.status("clinic-a").round == 1
    coordinator.advance()
    assert coordinator.status("clinic-a").round == 2


def test_a_description_that_fails_stops_no_round(
    federation: Any, coordinator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(rounds.Round, "message", _no_space)
        federation.play(coordinator, 1)
    assert coordinator.status("clinic-a").round == 2


def _no_space(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_state_of_other_terms_is_refused(begin: Any) -> None:
    begin().close()
    reduction = Reduction(hidden_size=4, intermediate_size=4, projection_dimensions=9)
    with pytest.raises(StateError, match="whose adapter and profile differ"):
        begin(adapter={"alpha": 1.0}, profile={"reduction": reduction})


def test_a_new_roster_goes_on_with_the_run_without_the_revoked_member(federation: Any, begin: Any) -> None:
    before = begin()
    federation.push(before, 1)
    federation.crash(before)
    del federation.keys["clinic-e"]
    after = begin(serial=2)
    after.advance()
    after.enrol("clinic-a", federation.enrolment())
    section = after.pull("clinic-a", 2).sections[0]
    assert "clinic-e" not in section.row.contributors
    with refused("NOT_ON_ROSTER"):
        after.pull("clinic-e", 2)


def test_old_payloads_are_removed(federation: Any, coordinator: Any, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        federation.play(coordinator, number)
    left = sorted(str(p.relative_to(tmp_path / "state")) for p in (tmp_path / "state").rglob("*.bin"))
    assert {name.split("/")[1] for name in left if name.startswith("uploads")} == {"000003"}
    assert {name.split("/")[1] for name in left if name.startswith("aggregates")} == {"000004"}


def test_pushes_from_many_threads_are_each_stored_once(federation: Any, coordinator: Any) -> None:
    uploads = {c: federation.upload(coordinator.run_id, c, 1) for c in federation.clients}

    def push(client: str) -> list[ReceiptStatus]:
        return [coordinator.push(client, uploads[client]).status for _ in range(4)]

    assert at_once(push, federation.clients) == [[ACCEPTED, DUPLICATE, DUPLICATE, DUPLICATE]] * 5
    assert coordinator.advance()


def test_reports_are_statements_and_stand_in_the_summary(
    federation: Any, coordinator: Any, tmp_path: Path
) -> None:
    statement = federation.statement(coordinator.run_id, "clinic-a")
    coordinator.report("clinic-a", statement)
    assert coordinator.summary()["statements"] == {"clinic-a": json.loads(statement)}
    for bad in (b"[ ", b"{1", b"[" * 100_000, b"\xff\xfe{}", b'{"epsilon": NaN}'):
        with refused("NOT_JSON"):
            coordinator.report("clinic-a", bad)


def test_a_statement_is_about_its_sender_this_run_and_this_roster_and_can_be_printed(
    federation: Any, coordinator: Any
) -> None:
    run_id = coordinator.run_id
    honest = json.loads(federation.statement(run_id, "clinic-a"))
    others = [
        b"[]",
        b'{"hello": 1}',
        b'{"a":' * 150 + b"1" + b"}" * 150,
        federation.statement("another", "clinic-a"),
        federation.statement(run_id, "clinic-b"),
        federation.statement(run_id, "clinic-a", warnings=("\x1b[2Jeverything is fine",)),
        federation.statement(run_id, "clinic-a", guarantees=()),
        federation.statement(run_id, "clinic-a", channels=()),
        federation.statement(run_id, "clinic-a", delta=5e-324),
        json.dumps(honest | {"clients": honest["clients"] * 2}).encode(),
        json.dumps(honest | {"clients": []}).encode(),
        json.dumps(honest | {"leaks": ["\x1b]0;owned\x07"]}).encode(),
        json.dumps(honest | {"\x1b[2J": 1}).encode(),
    ]
    for other in others:
        with refused("STATEMENT_UNUSABLE") as error:
            coordinator.report("clinic-a", other)
        assert str(error.value).isprintable()
    with refused("ROSTER_DIFFERS"):
        coordinator.report("clinic-a", json.dumps(honest | {"roster_sha256": "0" * 64}).encode())
    assert coordinator.summary()["statements"] == {}


def test_what_an_older_server_took_spoils_no_summary(
    federation: Any, coordinator: Any, tmp_path: Path
) -> None:
    coordinator._run.store.add_report("clinic-b", b'{"a":' * 970 + b"1" + b"}" * 970, 0.0)
    coordinator.report("clinic-a", federation.statement(coordinator.run_id, "clinic-a"))
    federation.play(coordinator, 1)
    written = json.loads((tmp_path / "state" / "run.json").read_text())
    assert set(written["statements"]) == {"clinic-a"}
    assert written["unreadable_statements"] == ["clinic-b"]


def test_the_summary_is_written_once_for_many_reports_and_none_is_lost(
    federation: Any, begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = begin()
    written: list[int] = []

    def noting(place: Path, summary: dict[str, Any]) -> None:
        written.append(len(summary["statements"]))
        write_summary(place, summary)

    monkeypatch.setattr(summary_module, "write_summary", noting)
    before.advance()
    for client in federation.clients[:3]:
        before.report(client, federation.statement(before.run_id, client))
    assert written == [0]
    before.advance()
    before.advance()
    assert written == [0, 3]
    before.report("clinic-d", federation.statement(before.run_id, "clinic-d"))
    federation.crash(before)
    after = begin()
    after.advance()
    assert written == [0, 3, 4]
    after.report("clinic-e", federation.statement(after.run_id, "clinic-e"))
    after.close()
    assert set(json.loads((tmp_path / "state" / "run.json").read_text())["statements"]) == set(
        federation.clients
    )


def test_a_summary_that_cannot_be_written_stops_no_round(
    federation: Any, coordinator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(summary_module, "write_summary", _no_space)
        federation.play(coordinator, 1)
    assert "run.json cannot be written, trying again" in caplog.text
    assert coordinator.status("clinic-a").round == 2
    coordinator.advance()
    assert len(with_rounds({}, tmp_path / "state")["results"]) == 1


@pytest.mark.parametrize("relations", ["[1]", "null", '"1"', "-1", "1" + 300 * "0", 20_000 * "["])
def test_the_file_of_a_round_that_names_no_round_is_refused_by_its_name(
    relations: str, tmp_path: Path
) -> None:
    (tmp_path / "rounds").mkdir()
    (tmp_path / "rounds" / "000001.json").write_text(f'{{"relations": {relations}}}')
    with pytest.raises(StateError, match=r"000001\.json cannot be read"):
        with_rounds({}, tmp_path)


def test_the_summary_tells_relevance_weights_and_traffic(federation: Any, coordinator: Any) -> None:
    federation.play(coordinator, 1)
    coordinator.pull("clinic-a", 2)
    summary = json.loads(json.dumps(coordinator.summary(), allow_nan=False))
    (result,) = summary["results"]
    assert np.array(result["similarity"]).shape == (5, 5)
    np.testing.assert_allclose(np.diag(result["similarity"]), 1.0)
    shares = result["weights"]["shared"]["clinic-a"]
    assert sum(shares.values()) == pytest.approx(1.0)
    size = HEADER_BYTES + 4 * federation.dimensions
    assert summary["traffic"]["clinic-a"] == {"received": size, "sent": size}


def test_nothing_secret_or_private_is_in_the_summary(federation: Any, coordinator: Any) -> None:
    federation.play(coordinator, 1)
    text = json.dumps(coordinator.summary())
    for client in federation.clients:
        for value in federation.vector(client, 1)[:3]:
            assert f"{value:.5f}" not in text


def test_the_server_refuses_settings_under_which_nobody_could_receive(
    federation: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="cannot receive anything"):
        federation.settings(tmp_path, policy={"minimum_contributors": 5})
    with pytest.raises(ValueError, match="quorum is 6 with 5 members"):
        federation.settings(tmp_path, schedule={"quorum": 6})
