"""The ledger: charge before noise, never forget, never charge twice for the same bytes, refuse in time."""

import datetime as dt
import json
import math
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from waiting import at_once

from builders import DIGEST, EPOCH, charge
from fedmosaic.privacy.accounting.epsilon import epsilon
from fedmosaic.privacy.accounting.events import UNPROTECTED, GaussianEvent
from fedmosaic.privacy.ledger.ledger import Ledger, LedgerParameters, data_epoch, parameters_of, read_ledger
from fedmosaic.privacy.ledger.rows import LedgerRow
from fedmosaic.privacy.ledger.store import LedgerStore
from fedmosaic.protos.errors import AccountingError, BudgetExceededError, LedgerError

DELTA = 1e-5
PROFILE = GaussianEvent(8.0, 1.0, 1)
STEP = GaussianEvent(10.0, 1.0, 5)
OTHER = "b" * 64


def open_ledger(path: Path, target: float | None = None, **options: Any) -> Ledger:
    # RDP is exact enough here and takes a millisecond for full-batch events.
    return Ledger.open(path, "clinic-a", DELTA, target, "rdp", **options)


def reserve(
    ledger: Ledger, channel: str = "adapter", round: int = 0, event: GaussianEvent = STEP, **changes: Any
) -> int:
    return charge(ledger, event, channel, round, **changes)


def unprotected(ledger: Ledger, channel: str = "adapter", round: int = 0, **changes: Any) -> int:
    fields = {"clipping_norm": None, "dimensions": None, "covered_by": "nothing"}
    return charge(ledger, UNPROTECTED, channel, round, **(fields | changes))


def rdp(*events: GaussianEvent) -> float:
    return epsilon(events, DELTA, "rdp")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with open_ledger(path) as opened:
        yield opened


def test_both_channels_compose_jointly_and_can_be_read_alone(ledger: Ledger) -> None:
    reserve(ledger, "profile", event=PROFILE)
    for round in range(3):
        reserve(ledger, "adapter", round)
    assert ledger.events("profile") == [PROFILE]
    assert ledger.events("adapter") == [STEP] * 3
    assert ledger.epsilon("profile") == rdp(PROFILE)
    assert ledger.epsilon("adapter") == rdp(STEP, STEP, STEP)
    assert (
        ledger.epsilon()
        == rdp(PROFILE, STEP, STEP, STEP)
        < ledger.epsilon("profile") + ledger.epsilon("adapter")
    )
    assert [row.epsilon for row in ledger.export()][-1] == ledger.epsilon()


def test_sending_the_same_bytes_again_costs_nothing(ledger: Ledger) -> None:
    sequence = reserve(ledger)
    ledger.released(sequence, DIGEST)
    before = ledger.epsilon()
    for round in (0, 1, 2):
        ledger.resent(sequence, DIGEST, round)
    assert ledger.epsilon() == before
    assert [(row.kind, row.round, row.attempt) for row in ledger.export()[3:]] == [
        ("RESENT", 0, 2),
        ("RESENT", 1, 3),
        ("RESENT", 2, 4),
    ]


def test_other_bytes_cannot_pass_as_resent(ledger: Ledger) -> None:
    sequence = reserve(ledger)
    with pytest.raises(LedgerError, match="nothing was released"):
        ledger.resent(sequence, DIGEST)
    ledger.released(sequence, DIGEST)
    with pytest.raises(LedgerError, match="fresh draw is a new release"):
        ledger.resent(sequence, OTHER)
    with pytest.raises(LedgerError, match="other bytes"):
        ledger.released(sequence, OTHER)
    ledger.released(sequence, DIGEST)
    assert len(ledger.export()) == 3


def test_a_fresh_draw_after_a_lost_one_is_a_new_charge(ledger: Ledger) -> None:
    lost = reserve(ledger)
    pending = ledger.pending("adapter", 0, EPOCH)
    assert pending is not None
    assert pending.sequence == lost
    again = reserve(ledger)
    assert ledger.epsilon() == rdp(STEP, STEP)
    assert [row.attempt for row in ledger.export() if row.kind == "RESERVED"] == [1, 2]
    ledger.released(again, DIGEST)
    assert ledger.pending("adapter", 0, EPOCH) is None
    with pytest.raises(LedgerError, match="recorded with other bytes"):
        ledger.released(lost, OTHER)


def test_a_released_round_must_be_resent_not_drawn_again(ledger: Ledger) -> None:
    ledger.released(reserve(ledger), DIGEST)
    with pytest.raises(LedgerError, match="send the stored bytes again"):
        reserve(ledger)
    assert ledger.epsilon() == rdp(STEP)
    assert getattr(ledger.release_of("adapter", 0, EPOCH), "payload_digest", None) == DIGEST
    assert ledger.release_of("adapter", 1, EPOCH) is None


def test_the_profile_is_released_once_per_data_epoch_whatever_the_round(ledger: Ledger) -> None:
    ledger.released(reserve(ledger, "profile", 0, PROFILE), DIGEST)
    with pytest.raises(LedgerError, match="made already"):
        reserve(ledger, "profile", 7, PROFILE)
    assert ledger.release_of("profile", 9, EPOCH) is not None
    reserve(ledger, "profile", 7, PROFILE, data_epoch=data_epoch(["a", "b", "c", "d"]))
    assert ledger.epsilon("profile") == rdp(PROFILE, PROFILE)


def test_a_release_beyond_the_budget_is_refused_recorded_and_not_charged(path: Path) -> None:
    target = rdp(STEP, STEP) * 1.001
    with open_ledger(path, target) as ledger:
        reserve(ledger, round=0)
        reserve(ledger, round=1)
        with pytest.raises(
            BudgetExceededError, match=r"above the target .* nothing was charged.*receive-only"
        ):
            reserve(ledger, round=2)
        refusal = ledger.export()[-1]
        assert refusal.kind == "REFUSED"
        assert refusal.epsilon == rdp(STEP, STEP, STEP)
        assert ledger.epsilon() == rdp(STEP, STEP) <= target
        small = reserve(ledger, round=3, event=GaussianEvent(1000.0, 1.0, 1))
        ledger.released(small, DIGEST)
        assert ledger.export()[-1].epsilon == ledger.epsilon(), "a refusal's figure is not carried on"


def test_budget_parameters_are_fixed_by_the_first_opening(path: Path) -> None:
    open_ledger(path, 3.0).close()
    with pytest.raises(LedgerError, match=r"target_epsilon was 3\.0 and is now 8\.0"):
        open_ledger(path, 8.0)
    with pytest.raises(LedgerError, match="delta was"):
        Ledger.open(path, "clinic-a", 1e-4, 3.0, "rdp")
    with pytest.raises(LedgerError, match="unit was 'example' and is now 'person'"):
        open_ledger(path, 3.0, unit="person")
    with pytest.raises(LedgerError, match="budgeted_channels was"):
        open_ledger(path, 3.0, budgeted_channels=("profile",))
    with pytest.raises(LedgerError, match="target_epsilon was"):
        open_ledger(path, None)
    open_ledger(path, 3.0).close()


def test_a_stricter_budget_goes_on_and_binds(path: Path) -> None:
    with open_ledger(path, 8.0, budgeted_channels=("profile",)) as ledger:
        reserve(ledger, "profile", event=PROFILE)
    spent = rdp(PROFILE)
    with open_ledger(path, spent * 1.01) as ledger:
        assert ledger.epsilon() == spent
        with pytest.raises(BudgetExceededError):
            reserve(ledger)


def test_a_release_in_another_context_is_another_release_and_charged(ledger: Ledger) -> None:
    ledger.released(reserve(ledger, round=1, context="run 1"), DIGEST)
    with pytest.raises(LedgerError, match="made already"):
        reserve(ledger, round=1, context="run 1")
    assert ledger.release_of("adapter", 1, EPOCH, "run 2") is None
    ledger.released(reserve(ledger, round=1, context="run 2"), OTHER)
    assert ledger.epsilon() == rdp(STEP, STEP)
    found = ledger.release_of("adapter", 1, EPOCH, "run 1")
    assert getattr(found, "payload_digest", None) == DIGEST


def test_what_the_budget_refused_is_remembered(path: Path) -> None:
    with open_ledger(path, 0.1) as ledger:
        assert not ledger.refused("adapter", 0, EPOCH)
        with pytest.raises(BudgetExceededError):
            reserve(ledger)
        assert ledger.refused("adapter", 0, EPOCH)
        assert not ledger.refused("adapter", 1, EPOCH)
        assert not ledger.refused("adapter", 0, EPOCH, "another run")
    # Charged, the draw lost in a crash, and then refused: what is there now is of no draw.
    with open_ledger(path.with_name("crashed"), rdp(STEP) * 1.001) as ledger:
        reserve(ledger)
        assert not ledger.refused("adapter", 0, EPOCH)
        with pytest.raises(BudgetExceededError):
            reserve(ledger)
        assert ledger.refused("adapter", 0, EPOCH)


def test_releases_without_dp_cost_infinity_and_say_what_covers_them(path: Path) -> None:
    with open_ledger(path, 1.0, budgeted_channels=("profile",)) as ledger:
        reserve(ledger, "profile", event=PROFILE)
        for round, covered_by in enumerate(("nothing", "cryptography")):
            unprotected(ledger, round=round, covered_by=covered_by)
        assert ledger.epsilon("adapter") == ledger.epsilon() == math.inf
        assert ledger.epsilon("profile") == rdp(PROFILE)
        last = ledger.export()[-1]
        assert (last.covered_by, last.noise_multiplier, last.epsilon) == ("cryptography", 0.0, rdp(PROFILE))
    with open_ledger(path.with_name("no-budget")) as ledger:
        unprotected(ledger)
    with open_ledger(path.with_name("no-budget")) as ledger:
        assert ledger.epsilon() == ledger.export()[-1].epsilon == math.inf
        assert json.loads(ledger.export()[-1].model_dump_json())["epsilon"] == "infinity"


def test_a_budget_over_a_channel_without_dp_refuses_it_with_the_remedy(path: Path) -> None:
    with (
        open_ledger(path, 8.0) as ledger,
        pytest.raises(BudgetExceededError, match="budgeted_channels by name"),
    ):
        unprotected(ledger)


def test_a_profile_without_noise_is_refused_outside_tests(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="differential privacy only"):
        unprotected(ledger, "profile")
    unprotected(ledger, "profile", secure_noise=False)
    assert ledger.epsilon() == math.inf


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"covered_by": "nothing"}, "has noise"),
        ({"event": UNPROTECTED}, "no noise"),
        ({"event": GaussianEvent(1.0, 1.0, 0)}, "without steps"),
        ({"clipping_norm": None}, "clipping_norm"),
        ({"dimensions": None}, "dimensions"),
        ({"clipping_norm": math.nan}, "clipping_norm"),
        ({"clipping_norm": -1.0}, "clipping_norm"),
        ({"dimensions": 0}, "dimensions"),
        ({"channel": "gossip"}, "channel"),
        ({"round": -1}, "round"),
        ({"data_epoch": "not a hash"}, "data_epoch"),
        ({"mechanism": {"norm": math.inf}}, "JSON"),
        ({"mechanism": {"object": object()}}, "JSON"),
        ({"mechanism": {"text": "x" * 70_000}}, "characters"),
    ],
)
def test_contradictory_reservations_are_refused_and_leave_no_trace(
    ledger: Ledger, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(LedgerError, match=words):
        reserve(ledger, **changes)
    assert len(ledger.export()) == 1
    assert reserve(ledger) == 1


def test_released_needs_a_reservation_and_a_digest(ledger: Ledger) -> None:
    for sequence in (-1, 0, 1, 99):
        with pytest.raises(LedgerError, match="no reservation"):
            ledger.released(sequence, DIGEST)
    with pytest.raises(LedgerError, match="payload_digest"):
        ledger.released(reserve(ledger), "short")


def test_disjoint_epochs_compose_in_parallel(ledger: Ledger) -> None:
    for round, ids in enumerate((["a", "b"], ["c", "d"], ["e"])):
        reserve(ledger, "adapter", round, ids=ids) if len(ids) > 1 else None
        reserve(ledger, "profile", round, PROFILE, ids=ids)
    assert ledger.epsilon("profile") == rdp(PROFILE), "the largest, not the sum"
    assert ledger.epsilon() == rdp(PROFILE, STEP)
    reserve(ledger, "adapter", 9, ids=["a", "b"])
    assert ledger.epsilon() == rdp(PROFILE, STEP, STEP), "within an epoch releases still add up"


def test_a_release_without_evidence_composes_with_everything(ledger: Ledger) -> None:
    reserve(ledger, "adapter", 0, ids=["a"])
    reserve(ledger, "adapter", 1, data_epoch=data_epoch(["b"]))
    reserve(ledger, "adapter", 2, ids=["c"])
    assert ledger.epsilon() == rdp(STEP, STEP)


def test_overlapping_epochs_do_not_pass_as_disjoint(ledger: Ledger) -> None:
    reserve(ledger, "adapter", 0, ids=["a", "b"])
    with pytest.raises(LedgerError, match="also in an earlier one"):
        reserve(ledger, "adapter", 1, ids=["b", "c"])
    assert len(ledger.export()) == 2
    reserve(ledger, "adapter", 1, ids=["c"])
    assert ledger.epsilon() == rdp(STEP)


def test_evidence_must_be_that_of_the_epoch_and_list_examples_once(ledger: Ledger) -> None:
    for ids, words in (
        (["x"], "not those of this data epoch"),
        (["a", "a"], "only once"),
        ([], "at least one"),
    ):
        with pytest.raises(LedgerError, match=words):
            reserve(ledger, data_epoch=EPOCH, example_ids=ids)


def test_a_refused_release_leaves_no_evidence_behind(path: Path) -> None:
    with open_ledger(path, rdp(STEP) * 1.01) as ledger:
        with pytest.raises(BudgetExceededError):
            reserve(ledger, "adapter", 0, GaussianEvent(1.0, 1.0, 5), ids=["a", "b"])
        reserve(ledger, "adapter", 0, ids=["b", "c"])


def test_parallel_composition_counts_toward_the_budget_by_its_maximum(path: Path) -> None:
    with open_ledger(path, rdp(STEP) * 1.01) as ledger:
        for round, name in enumerate("abcdef"):
            reserve(ledger, "adapter", round, ids=[name])
        with pytest.raises(BudgetExceededError):
            reserve(ledger, "adapter", 9, ids=["a"])


def test_data_epochs_name_the_set_of_ids() -> None:
    assert data_epoch(["a", "b"]) == data_epoch(["b", "a"]) != data_epoch(["a"])
    assert data_epoch(["a\nb"]) != data_epoch(["a", "b"])
    assert data_epoch(["ab", "c"]) != data_epoch(["a", "bc"])
    with pytest.raises(LedgerError):
        data_epoch([])
    with pytest.raises(LedgerError):
        data_epoch(["a", "a"])


def test_delta_above_one_over_n_is_refused_at_opening_and_with_evidence(path: Path) -> None:
    with pytest.raises(AccountingError, match="1/n"):
        Ledger.open(path, "clinic-a", 0.01, None, "rdp", examples=1000)
    assert not path.exists()
    with (
        Ledger.open(path, "clinic-a", 0.3, None, "rdp", examples=3) as ledger,
        pytest.raises(AccountingError),
    ):
        reserve(ledger, ids=["a", "b", "c", "d"])


def test_gdp_and_impossible_parameters_are_refused(path: Path) -> None:
    with pytest.raises(AccountingError, match="refused"):
        Ledger.open(path, "clinic-a", DELTA, 1.0, "gdp")
    for target in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(LedgerError, match="target"):
            open_ledger(path, target)
    with pytest.raises(LedgerError, match="client_id"):
        Ledger.open(path, "", DELTA, 1.0, "rdp")
    with pytest.raises(LedgerError, match="channels"):
        open_ledger(path, 1.0, budgeted_channels=("gossip",))


def test_every_row_holds_what_an_auditor_needs(path: Path) -> None:
    moment = dt.datetime(2026, 5, 4, 12, 30, tzinfo=dt.timezone(dt.timedelta(hours=2)))
    with open_ledger(path, 3.0, clock=lambda: moment) as ledger:
        reserve(ledger, "profile", 4, PROFILE, mechanism={"kind": "test"})
        row = ledger.export()[1]
    assert row.time == "2026-05-04T10:30:00.000000+00:00"
    assert row.event() == PROFILE
    assert (row.channel, row.round, row.attempt, row.clipping_norm) == ("profile", 4, 1, 1.0)
    assert (row.unit, row.neighbouring_relation, row.accountant) == ("example", "add or remove one", "rdp")
    assert (row.data_epoch, row.covered_by, row.secure_noise, row.disjoint) == (EPOCH, "dp", True, False)
    assert json.loads(row.mechanism or "") == {"kind": "test"}
    assert LedgerRow.model_validate_json(row.model_dump_json()) == row


def test_reading_needs_no_parameters_and_writes_nothing(path: Path) -> None:
    with open_ledger(path, 3.0) as ledger:
        reserve(ledger)
        expected = ledger.export()
    before = path.read_bytes()
    rows = read_ledger(path)
    assert rows == expected
    assert parameters_of(rows) == LedgerParameters("clinic-a", DELTA, 3.0, "rdp")
    assert path.read_bytes() == before
    with pytest.raises(LedgerError, match="missing"):
        read_ledger(path.with_name("other.sqlite"))


def test_files_are_readable_by_their_owner_only(path: Path) -> None:
    with open_ledger(path):
        assert {p.stat().st_mode & 0o077 for p in path.parent.iterdir()} == {0}


def test_a_file_that_is_no_ledger_is_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("these are not rows of a ledger, whatever SQLite may think of them" * 20)
    with pytest.raises(LedgerError):
        open_ledger(text)
    assert text.read_text().startswith("these are not rows")


def test_threads_share_one_ledger_without_losing_a_charge(ledger: Ledger) -> None:
    def work(start: int) -> None:
        for round in range(start, start + 5):
            ledger.released(reserve(ledger, round=round), DIGEST)

    at_once(work, range(0, 400, 100))
    assert len(ledger.events()) == 20
    ledger.verify()


def test_two_openings_see_each_others_charges(path: Path) -> None:
    with open_ledger(path, rdp(STEP, STEP) * 1.001) as one, open_ledger(path, rdp(STEP, STEP) * 1.001) as two:
        reserve(one, round=0)
        reserve(two, round=1)
        assert one.epsilon() == two.epsilon() == rdp(STEP, STEP)
        with pytest.raises(BudgetExceededError):
            reserve(one, round=2)


def test_the_head_never_lags_behind_a_row_of_another_process(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process commits row 1 and is slow to say so; another commits row 2 meanwhile. Then row 2 is cut."""
    write, slow = LedgerStore.write_head, threading.get_ident()
    with open_ledger(path) as one, open_ledger(path) as two:
        other = threading.Thread(target=reserve, args=(two,), kwargs={"round": 2})

        def late(store: LedgerStore, row: LedgerRow) -> None:
            if threading.get_ident() == slow:
                other.start()
                other.join(0.5)  # it waits for the lock, unless there is none
            write(store, row)

        monkeypatch.setattr(LedgerStore, "write_head", late)
        reserve(one, round=1)
        other.join()
        rows = one.export()
    assert json.loads(path.with_name(f"{path.name}.head").read_text())["sequence"] == rows[-1].sequence == 2
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DROP TRIGGER rows_keep_delete")
        connection.execute("DELETE FROM rows WHERE sequence = 2")
    with pytest.raises(LedgerError, match="rows were cut off"):
        read_ledger(path)


def test_a_ledger_that_another_process_begins_meanwhile_has_lost_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = LedgerStore.read_head
    with open_ledger(path) as ledger:
        reserve(ledger)
    answers = [None]  # as it was before the other had written it
    monkeypatch.setattr(LedgerStore, "read_head", lambda store: answers.pop() if answers else read(store))
    assert len(read_ledger(path)) == 2


def test_the_default_accountant_is_prv_and_a_fallback_is_named(path: Path) -> None:
    with Ledger.open(path, "clinic-a", DELTA, None) as ledger:
        reserve(ledger, "profile", event=PROFILE)
        reserve(ledger, "adapter", 0, GaussianEvent(0.03, 1.0, 1))
        rows = ledger.export()
    assert [row.accountant for row in rows] == ["prv", "prv", "rdp"]
    assert rows[1].epsilon == epsilon([PROFILE], DELTA, "prv")
