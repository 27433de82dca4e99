"""Another roster in the middle of a run: who is refused until when, and which roster is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from builders import founding, with_schedule
from fedmosaic.privacy.federation import consortium
from fedmosaic.privacy.federation.identity import public_hex
from fedmosaic.protos.errors import ConfigurationError, IdentityError, StateError
from fedmosaic.protos.messages import Phase, ReceiptStatus
from fedmosaic.protos.refusal import Refusal
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.settings import ServerSettings, settings_from_kit

LEAVER = "clinic-e"


def changed(federation: Any, settings: ServerSettings, serial: int = 2, **members: Any) -> ServerSettings:
    """The next roster: without the leaver, and with other keys or families of members."""
    left = [m.model_copy(update=members.get(m.id)) for m in settings.roster.members if m.id != LEAVER]
    changes = {"serial": serial, "members": tuple(left)}
    federation.roster = settings.roster.model_copy(update=changes)
    return settings.model_copy(update={"roster": federation.roster})


@pytest.fixture
def first(federation: Any, tmp_path: Path) -> ServerSettings:
    made: ServerSettings = federation.settings(tmp_path / "state")
    return made


@pytest.fixture
def running(first: ServerSettings, clock: Any) -> Any:
    made = Coordinator(first, clock)
    yield made
    made.close()


def refused(reason: str, call: Any, *arguments: Any) -> None:
    with pytest.raises(Refusal) as refusal:
        call(*arguments)
    assert refusal.value.reason == reason


def test_everybody_enrols_again_and_whoever_left_is_out(running: Coordinator, federation: Any) -> None:
    federation.push(running, 1, ("clinic-a", LEAVER))
    old = federation.enrolment()
    late = federation.upload(running.run_id, "clinic-b", 1)
    running.enrol("clinic-b", old)
    statement = federation.statement(running.run_id, "clinic-a")
    ticket = running.announce(LEAVER, federation.upload(running.run_id, LEAVER, 1, attempt_id="b").header())
    assert running.renew(changed(federation, running.settings))
    for call in (running.announce, running.push):
        refused("ROSTER_CHANGED", call, "clinic-b", late)
    refused("ROSTER_CHANGED", running.arrive, "clinic-b", 1)
    refused("ROSTER_DIFFERS", running.enrol, "clinic-b", old)
    refused("NOT_ON_ROSTER", running.enrol, LEAVER, federation.enrolment())
    refused("NOT_ON_ROSTER", running.arrive, LEAVER, 1)
    assert not hasattr(ticket, "spool")
    running.enrol("clinic-b", federation.enrolment())
    assert running.push("clinic-b", late).status is ReceiptStatus.ACCEPTED
    running.report("clinic-a", statement)  # made under the roster before, which the run has had
    assert running.describe().arrived == ("clinic-a", "clinic-b")


def test_an_upload_on_its_way_when_its_member_leaves_is_not_stored(
    running: Coordinator, federation: Any
) -> None:
    running.enrol(LEAVER, federation.enrolment())
    upload = federation.upload(running.run_id, LEAVER, 1)
    ticket: Any = running.announce(LEAVER, upload.header())
    ticket.spool.write_bytes(upload.sections[0].payload)
    assert running.renew(changed(federation, running.settings))
    refused("NOT_ON_ROSTER", running.commit, LEAVER, upload.header(), ticket)
    assert running.describe().arrived == ()


def test_a_new_key_of_a_member_holds_at_once(running: Coordinator, federation: Any) -> None:
    new = Ed25519PrivateKey.generate()
    key: dict[str, Any] = {"clinic-a": {"identity_key": public_hex(new.public_key())}}
    assert running.renew(changed(federation, running.settings, **key))
    running.enrol("clinic-a", federation.enrolment())
    refused("SIGNATURE_INVALID", running.push, "clinic-a", federation.upload(running.run_id, "clinic-a", 1))
    federation.keys["clinic-a"] = new
    assert running.push("clinic-a", federation.upload(running.run_id, "clinic-a", 1)).round == 1


def test_who_is_behind_is_known_after_a_restart(running: Coordinator, federation: Any, clock: Any) -> None:
    federation.push(running, 1, ("clinic-a",))
    settings = changed(federation, running.settings)
    running.renew(settings)
    federation.crash(running)
    again = Coordinator(settings, clock)
    refused("ROSTER_CHANGED", again.arrive, "clinic-a", 1)
    again.enrol("clinic-a", federation.enrolment())
    federation.crash(again)
    once_more = Coordinator(settings, clock)
    assert once_more.open_download("clinic-a", 1) is not None
    once_more.close()


@pytest.mark.parametrize("restarted", [False, True], ids=["running", "restarted"])
@pytest.mark.parametrize(
    ("serial", "rounds", "words"),
    [(2, 3, ""), (1, 3, "signed two"), (2, 4, r"other terms than roster 1 \(schedule\)")],
)
def test_which_roster_may_follow(
    running: Coordinator, federation: Any, clock: Any, serial: int, rounds: int, words: str, restarted: bool
) -> None:
    settings = changed(federation, running.settings, serial)
    settings = settings.model_copy(update={"roster": with_schedule(settings.roster, rounds=rounds)})
    if restarted:
        federation.crash(running)

    def take_up() -> None:
        if restarted:
            Coordinator(settings, clock).close()
        else:
            running.renew(settings)

    if not words:
        take_up()
        return
    with pytest.raises(IdentityError, match=words):
        take_up()
    if not restarted:
        assert LEAVER in running.settings.members


def test_a_roster_is_never_rolled_back(
    running: Coordinator, first: ServerSettings, federation: Any, clock: Any
) -> None:
    second = changed(federation, first)
    running.renew(second)
    with pytest.raises(IdentityError, match="roster 1 of federation 'fed' is older than roster 2"):
        running.renew(first)
    federation.crash(running)
    with pytest.raises(IdentityError, match="roster 1 of federation 'fed' is older than roster 2"):
        Coordinator(first, clock)
    Coordinator(second, clock).close()


@pytest.mark.parametrize("restarted", [False, True], ids=["running", "restarted"])
@pytest.mark.parametrize(
    "terms", [{"adapter": {"family_dimensions": {"llama": 4}}, "relevance": {"across_families": True}}, {}]
)
def test_a_member_keeps_its_family_in_a_run(
    begin: Any, federation: Any, clock: Any, terms: dict[str, Any], restarted: bool
) -> None:
    running = begin(**terms)
    running.enrol("clinic-a", federation.enrolment())
    # clinic-b has not enrolled, so it has shared nothing.
    llama: dict[str, Any] = {name: {"family": "llama"} for name in ("clinic-a", "clinic-b")}
    settings = changed(federation, running.settings, **llama)
    if restarted:
        federation.crash(running)
    with pytest.raises(StateError, match="'clinic-a' is of family 'llama' on the new roster, and of ''"):
        Coordinator(settings, clock) if restarted else running.renew(settings)


def test_groups_that_are_formed_keep_their_roster(running: Coordinator, federation: Any, clock: Any) -> None:
    running._run.store.put({"partition": "{}"})
    settings = changed(federation, running.settings)
    with pytest.raises(StateError, match="a run of group sums goes on under the roster"):
        running.renew(settings)
    federation.crash(running)
    with pytest.raises(StateError, match="a run of group sums goes on under the roster"):
        Coordinator(settings, clock)


def test_nothing_changes_while_a_round_is_aggregated_or_when_all_are_over(
    running: Coordinator, federation: Any
) -> None:
    settings, before = changed(federation, running.settings), running.settings
    running._run.round = replace(running._run.round, phase=Phase.CLOSED)
    assert not running.renew(settings)
    running._run.round = replace(running._run.round, phase=Phase.FINISHED)
    assert running.renew(settings)
    assert running.settings is before


def test_nobody_waits_for_the_statement_of_a_member_that_left(running: Coordinator, federation: Any) -> None:
    federation.push(running, 1)
    running.renew(changed(federation, running.settings))
    for number in (1, 2, 3):
        for name in sorted(running.settings.members):
            running.enrol(name, federation.enrolment())
        federation.play(running, number, tuple(sorted(running.settings.members)))
    assert running.silent_members() == tuple(sorted(running.settings.members))


def test_a_roster_below_its_quorum_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "f"
    consortium.create(founding(*"abcde", schedule={"quorum": 5}), place)
    assert settings_from_kit(place / "server").terms.schedule.quorum == 5
    # As an older program issued it.
    monkeypatch.setattr(consortium, "too_few", lambda members, terms: "")
    consortium.revoke_member(place, "d")
    message = f"the roster of {place / 'server'} is not a valid ServerSettings:"
    with pytest.raises(ConfigurationError) as error:
        settings_from_kit(place / "server")
    assert str(error.value) == f"{message}\n  (whole file): terms.schedule.quorum is 5 with 4 members"


@pytest.mark.parametrize(
    ("entry", "value", "named"),
    [
        ("roster_mark", '{"serial": 1, "sha256": "x", "terms": {}}', "the roster before"),
        ("head", "1f", "'head'"),
    ],
)
def test_a_damaged_entry_of_the_database_is_named(
    entry: str, value: str, named: str, first: ServerSettings, clock: Any, federation: Any
) -> None:
    running = Coordinator(first, clock)
    running._run.store.put({entry: value})
    running.close()
    with pytest.raises(StateError, match=rf"database is damaged: .*{named}.* restore a backup"):
        Coordinator(changed(federation, first), clock)
