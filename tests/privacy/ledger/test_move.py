"""A ledger that exists twice forgets: moves, joins and backups leave one that knows of everything."""

import shutil
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from builders import EPOCH, charge
from fedmosaic.privacy.accounting.epsilon import epsilon
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.ledger.ledger import LEDGER, Ledger, read_ledger
from fedmosaic.privacy.ledger.move import back_up, move
from fedmosaic.protos.errors import BudgetExceededError, LedgerError

DELTA = 1e-5
STEP = GaussianEvent(10.0, 1.0, 5)


def opened(directory: Path, client: str = "clinic-a") -> Ledger:
    return Ledger.open(directory / LEDGER, client, DELTA, None, "rdp")


def spend(ledger: Ledger, run: str, rounds: int = 1, first: int = 1) -> None:
    for number in range(first, first + rounds):
        charge(ledger, STEP, round=number, context=run, digest=f"{len(ledger.export()) + 1:064x}")


def cost(releases: int) -> float:
    return epsilon([STEP] * releases, DELTA, "rdp")


def copied_by_hand(directory: Path, to: Path) -> Path:
    to.mkdir()
    for file in directory.iterdir():
        shutil.copy(file, to / file.name)
    return to


@pytest.fixture
def old(tmp_path: Path) -> Path:
    with opened(tmp_path / "old") as ledger:
        spend(ledger, "first", 3)
    (tmp_path / "old" / "profile-1-2.npy").write_bytes(b"noise")
    return tmp_path / "old"


def test_a_moved_ledger_goes_on_in_its_new_place_and_refuses_to_open_in_the_old(
    old: Path, tmp_path: Path
) -> None:
    with opened(old) as ledger:
        anchor = ledger.anchor("server")
    new = tmp_path / "data" / "train.jsonl.ledger"
    assert move(old, new) == 0
    with pytest.raises(LedgerError, match=f"closed and moved to {new}"):
        opened(old)
    with opened(new) as ledger:
        assert ledger.epsilon() == cost(3)
        ledger.check_anchor("server", anchor, "the server")
        spend(ledger, "second")
        assert ledger.epsilon() == cost(4)
    assert (new / "profile-1-2.npy").read_bytes() == b"noise"
    with pytest.raises(LedgerError, match="closed and moved"):
        move(old, tmp_path / "elsewhere")
    assert move(new, tmp_path / "again") == 0
    with opened(tmp_path / "again") as ledger:
        assert ledger.epsilon() == cost(4)


def test_a_process_that_has_it_open_charges_nothing_to_a_ledger_that_was_moved(
    old: Path, tmp_path: Path
) -> None:
    with opened(old) as ledger:
        spend(ledger, "second")
        move(old, tmp_path / "new")
        with pytest.raises(LedgerError, match="closed and moved"):
            spend(ledger, "second", first=2)
    with opened(tmp_path / "new") as ledger:
        assert ledger.epsilon() == cost(4)


@pytest.mark.parametrize("step", ["closed", "resumed"])
def test_a_move_that_was_interrupted_charges_to_neither_and_is_finished_by_the_same_command(
    old: Path, tmp_path: Path, step: str
) -> None:
    program = textwrap.dedent(f"""
        import os, pathlib, signal
        from fedmosaic.privacy.ledger.move import move
        def die(step):
            if step == {step!r}:
                os.kill(os.getpid(), signal.SIGKILL)
        move(pathlib.Path({str(old)!r}), pathlib.Path({str(tmp_path / "new")!r}), die)
    """)
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=120).returncode < 0
    with pytest.raises(LedgerError, match="move was not finished"):
        opened(old)
    assert (tmp_path / "new").exists() == (step == "resumed")
    with pytest.raises(LedgerError, match="move was not finished"):
        move(old, tmp_path / "third")
    assert move(old, tmp_path / "new") == 0
    with pytest.raises(LedgerError, match="closed and moved"):
        opened(old)
    with opened(tmp_path / "new") as ledger:
        assert ledger.epsilon() == cost(3)
        ledger.verify()


def test_a_join_that_was_interrupted_brings_the_profiles_when_it_is_finished(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its bytes a released profile can only be drawn, and paid for, once more."""
    with opened(tmp_path / "new") as ledger:
        spend(ledger, "second")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr("fedmosaic.privacy.ledger.move._copy_profiles", killed)
        with pytest.raises(KeyboardInterrupt):
            move(old, tmp_path / "new")
    assert move(old, tmp_path / "new") == 0
    assert (tmp_path / "new" / "profile-1-2.npy").read_bytes() == b"noise"
    with opened(tmp_path / "new") as ledger:
        assert ledger.epsilon() == cost(4)


def test_nothing_is_closed_where_nothing_can_be_made(old: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other").write_text("something")
    for place in (tmp_path / "file", tmp_path / "full", tmp_path / "file" / "below", old):
        with pytest.raises(LedgerError, match=r"not free|cannot be made"):
            move(old, place)
    with pytest.raises(LedgerError, match="holds no"):
        move(tmp_path / "nowhere", tmp_path / "new")
    with opened(old) as ledger:
        assert ledger.epsilon() == cost(3)


def test_ledgers_that_were_copied_are_joined_with_every_draw_counted_once(old: Path, tmp_path: Path) -> None:
    copies = [copied_by_hand(old, tmp_path / f"copy{number}") for number in (1, 2)]
    for number, place in enumerate((old, *copies)):
        with opened(place) as ledger:
            spend(ledger, f"run {number}", number + 1)
    with opened(copies[1]) as ledger:
        seen = ledger.anchor("server")
    new = tmp_path / "new"
    assert [move(place, new) for place in (old, *copies)] == [0, 2, 3]
    with opened(new) as ledger:
        assert ledger.epsilon() == cost(3 + 1 + 2 + 3)
        assert ledger.release_of("adapter", 3, EPOCH, "run 2") is not None
        ledger.check_anchor("server", seen, "the server")
        ledger.verify()


def test_who_has_seen_an_empty_ledger_finds_it_in_the_one_that_it_was_joined_to(
    old: Path, tmp_path: Path
) -> None:
    """A client notes the opening row of a ledger, and its server keeps it, before anything is released."""
    with opened(tmp_path / "begun") as ledger:
        seen = ledger.anchor("server")
        spend(ledger, "begun")
    assert move(tmp_path / "begun", old) == 1
    assert move(old, tmp_path / "last") == 0
    with opened(tmp_path / "last") as ledger:
        ledger.check_anchor("server", seen, "the server")


@pytest.mark.parametrize("joined", [False, True])
def test_who_has_seen_a_ledger_after_its_move_finds_it_where_it_goes_on(
    old: Path, tmp_path: Path, joined: bool
) -> None:
    """A run that sends nothing more of its own, in receive-only mode, goes on while the ledger is moved."""
    new = tmp_path / "new"
    if joined:
        opened(new).close()
    with opened(old) as running:
        before = running.anchor("server")
        move(old, new)
        after = running.anchor("server")
    with opened(new) as ledger:
        for seen in (before, after):
            ledger.check_anchor("server", seen, "the server")


def test_a_reservation_that_two_copies_both_released_is_two_draws(old: Path, tmp_path: Path) -> None:
    with opened(old) as ledger:
        pending = charge(ledger, STEP, "profile", 1)
    copy = copied_by_hand(old, tmp_path / "copy")
    for place, digest in ((old, "a" * 64), (copy, "b" * 64)):
        with opened(place) as ledger:
            ledger.released(pending, digest)
    move(old, tmp_path / "new")
    assert move(copy, tmp_path / "new") == 1
    with opened(tmp_path / "new") as ledger:
        assert ledger.epsilon() == cost(5)


def test_a_draw_that_was_lost_and_then_refused_is_no_pending_one_after_a_join(tmp_path: Path) -> None:
    """Or what is in the model of that round, where nothing was drawn again, would be sent as that draw."""
    with Ledger.open(tmp_path / "old" / LEDGER, "clinic-a", DELTA, 1.2 * cost(1), "rdp") as ledger:
        charge(ledger, STEP, context="first")
        with pytest.raises(BudgetExceededError):
            charge(ledger, STEP, context="first")
    with opened(tmp_path / "new") as ledger:
        spend(ledger, "second")
    assert move(tmp_path / "old", tmp_path / "new") == 1
    with opened(tmp_path / "new") as ledger:
        assert ledger.refused("adapter", 0, EPOCH, "first")
        assert ledger.epsilon() == cost(2)
        ledger.verify()


def test_joining_twice_or_a_copy_that_knows_nothing_more_charges_nothing(old: Path, tmp_path: Path) -> None:
    copy = copied_by_hand(old, tmp_path / "copy")
    twin = copied_by_hand(old, tmp_path / "twin")
    with opened(copy) as ledger:
        spend(ledger, "second")
    shutil.rmtree(twin)
    move(old, tmp_path / "new")
    crashed = copied_by_hand(copy, tmp_path / "crashed")
    assert move(copy, tmp_path / "new") == 1
    assert move(crashed, tmp_path / "new") == 0, "the same rows from another copy"
    with opened(tmp_path / "new") as ledger:
        assert ledger.epsilon() == cost(4)


def test_another_client_of_the_same_data_is_charged_to_the_same_ledger(old: Path) -> None:
    with opened(old, "north-of-another-federation") as ledger:
        spend(ledger, "elsewhere")
        assert ledger.epsilon() == cost(4)
    with pytest.raises(LedgerError, match="only data that share no example") as refused:
        Ledger.open(old / LEDGER, "north", 1e-4, None, "rdp")
    assert "right for another client" not in str(refused.value)


def test_a_backup_is_whole_while_runs_go_on_and_is_put_back_by_moving_it(old: Path, tmp_path: Path) -> None:
    out = tmp_path / "backup"
    with opened(old) as ledger:
        spend(ledger, "second")  # in the write-ahead log, not in the file
        back_up(old, out)
        spend(ledger, "second", first=2)
        after = ledger.anchor("server")
    with pytest.raises(LedgerError, match="is a backup"):
        opened(out)
    with pytest.raises(LedgerError, match="exists already"):
        back_up(old, out)
    shutil.rmtree(old)
    assert move(out, old) == 0
    with opened(old) as ledger:
        assert ledger.epsilon() == cost(4)
        assert (old / "profile-1-2.npy").exists()
        with pytest.raises(LedgerError, match="LEDGER_BEHIND"):
            ledger.check_anchor("server", after, "the server")
    with pytest.raises(LedgerError, match="closed and moved"):
        move(out, tmp_path / "second-life")


def test_a_row_after_the_closing_one_is_found(old: Path, tmp_path: Path) -> None:
    move(old, tmp_path / "new")
    rows = read_ledger(old / LEDGER)
    assert [row.kind for row in rows[-2:]] == ["CLOSED", "MOVED"]
    with sqlite3.connect(old / LEDGER) as connection:
        connection.execute("DROP TRIGGER rows_keep_delete")
        connection.execute("DELETE FROM rows WHERE sequence >= ?", (len(rows) - 2,))
    with pytest.raises(LedgerError, match="rows were cut off"):
        opened(old)
