"""Every change to a written ledger shows, and the first wrong row is named."""

import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from builders import charge
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.ledger.ledger import Ledger, read_ledger
from fedmosaic.privacy.ledger.rows import LedgerRow
from fedmosaic.protos.errors import LedgerError

LAST = 9
# One value of the right type and one of a wrong type per column.
OTHER_VALUES: dict[str, tuple[object, object]] = {
    "time": ("2020-01-01T00:00:00.000000+00:00", 5),
    "kind": ("RESENT", "FORGOTTEN"),
    "channel": ("family", 7),
    "round": (41, "x"),
    "context": ("another run", 7),
    "attempt": (41, -1),
    "reference": (1, "x"),
    "mechanism": ('{"kind":"other"}', 1.5),
    "noise_multiplier": (80.0, -1.0),
    "sampling_rate": (0.001, 2.0),
    "steps": (1000, 1.5),
    "clipping_norm": (9.0, "x"),
    "dimensions": (9, 0),
    "unit": ("client", "world"),
    "neighbouring_relation": ("replace one", None),
    "covered_by": ("cryptography", "magic"),
    "secure_noise": (0, "x"),
    "data_epoch": ("0" * 64, "x"),
    "disjoint": (1, "x"),
    "payload_digest": ("1" * 64, "x"),
    "epsilon": (0.001, None),
    "accountant": ("pld", "gdp"),
    "previous_hash": ("2" * 64, "x"),
    "hash": ("3" * 64, "x"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "ledger.sqlite"
    with opened(path) as ledger:
        for round in range(3):
            digest = f"{round:064x}"
            sequence = charge(ledger, GaussianEvent(8.0, 1.0, 2), round=round, digest=digest)
            ledger.resent(sequence, digest)
    return path


@pytest.fixture
def path(written: Path, tmp_path: Path) -> Path:
    for source in written.parent.iterdir():
        shutil.copy(source, tmp_path / source.name)
    return tmp_path / written.name


def execute(path: Path, *statements: str, values: tuple[object, ...] = ()) -> None:
    """Change the file behind the ledger's back, as somebody with an SQLite shell can."""
    connection = sqlite3.connect(path)
    for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
        connection.execute(f"DROP TRIGGER {name}")
    for statement in statements:
        connection.execute(statement, values)
    connection.commit()
    connection.close()


def opened(path: Path) -> Ledger:
    return Ledger.open(path, "clinic-a", 1e-5, None, "rdp")


def reopen(path: Path) -> None:
    opened(path).close()


def test_the_untouched_copy_verifies(path: Path) -> None:
    assert len(read_ledger(path)) == LAST + 1
    reopen(path)


def test_every_column_is_tried() -> None:
    assert set(OTHER_VALUES) == set(LedgerRow.model_fields) - {"sequence"}


@pytest.mark.parametrize("column", OTHER_VALUES)
@pytest.mark.parametrize("row", [0, 1, 5, LAST])
def test_a_changed_value_names_its_row(path: Path, column: str, row: int) -> None:
    found = 0
    for value in OTHER_VALUES[column]:
        before = getattr(read_ledger(path)[row], column)
        if before == value:
            continue
        try:
            execute(path, f"UPDATE rows SET {column} = ? WHERE sequence = {row}", values=(value,))  # noqa: S608  # a test
        except sqlite3.IntegrityError:
            continue
        with pytest.raises(LedgerError, match=rf"row {row}\b"):
            reopen(path)
        found += 1
        execute(path, f"UPDATE rows SET {column} = ? WHERE sequence = {row}", values=(before,))  # noqa: S608  # a test
    assert found


@pytest.mark.parametrize(
    ("words", "statements"),
    [
        *((rf"row {row}\b", (f"DELETE FROM rows WHERE sequence = {row}",)) for row in range(LAST)),  # noqa: S608  # a test
        (
            r"row 4\b",
            (
                "DELETE FROM rows WHERE sequence = 4",
                "UPDATE rows SET sequence = sequence - 1 WHERE sequence > 4",
            ),
        ),
        (
            r"row 2\b",
            (
                "UPDATE rows SET sequence = 100 WHERE sequence = 2",
                "UPDATE rows SET sequence = 2 WHERE sequence = 5",
                "UPDATE rows SET sequence = 5 WHERE sequence = 100",
            ),
        ),
        *(
            (rf"first of them row {kept}\b", (f"DELETE FROM rows WHERE sequence >= {kept}",))  # noqa: S608  # a test
            for kept in (1, 4, LAST)
        ),
    ],
)
def test_removed_and_swapped_rows_and_a_cut_tail_are_found(
    path: Path, words: str, statements: tuple[str, ...]
) -> None:
    execute(path, *statements)
    with pytest.raises(LedgerError, match=words):
        reopen(path)


def test_the_whole_ledger_gone_is_found_while_its_head_remains(path: Path) -> None:
    for file in path.parent.iterdir():
        if not file.name.endswith(".head"):
            file.unlink()
    with pytest.raises(LedgerError, match="the ledger is missing although"):
        reopen(path)


def test_a_missing_or_unreadable_head_is_reported(path: Path) -> None:
    head = path.with_name(path.name + ".head")
    for content in (b"", b"{}", b'{"sequence": "x", "hash": ""}', b"\xff"):
        head.write_bytes(content)
        with pytest.raises(LedgerError, match="cannot be read"):
            reopen(path)
    head.unlink()
    with pytest.raises(LedgerError, match="is missing"):
        reopen(path)


def rewrite(path: Path, **changes: object) -> str:
    """Change row 1 and give every row after it a fitting hash, as an informed forger would; the last hash."""
    rows = read_ledger(path)
    previous = rows[0].hash
    for row in rows[1:]:
        fields = (
            row.model_dump()
            | {"previous_hash": previous, "hash": ""}
            | (changes if row.sequence == 1 else {})
        )
        forged = LedgerRow.sealed(**fields)
        columns = ", ".join(f"{name} = ?" for name in LedgerRow.model_fields)
        values = tuple(getattr(forged, name) for name in LedgerRow.model_fields)
        execute(path, f"UPDATE rows SET {columns} WHERE sequence = {row.sequence}", values=values)  # noqa: S608  # a test
        previous = forged.hash
    return previous


def test_a_rewritten_chain_is_found_through_the_head_file(path: Path) -> None:
    rewrite(path, noise_multiplier=80.0)
    with pytest.raises(LedgerError, match=rf"rewritten: row {LAST}\b"):
        reopen(path)


def test_a_rewritten_chain_with_its_head_is_found_through_an_anchor_only(path: Path) -> None:
    with opened(path) as ledger:
        anchor = ledger.anchor("keeper")
        ledger.check_anchor("keeper", anchor, "the keeper")
    forged = rewrite(path, noise_multiplier=80.0)
    last = {"sequence": LAST, "hash": forged}
    path.with_name(path.name + ".head").write_text(json.dumps(last))
    with opened(path) as ledger, pytest.raises(LedgerError, match="the keeper has seen last"):
        ledger.check_anchor("keeper", anchor, "the keeper")


def test_a_rolled_back_copy_is_found_through_an_anchor(path: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.mkdir()
    for file in (path, path.with_name(path.name + ".head")):
        shutil.copy(file, image / file.name)
    with opened(path) as ledger:
        ledger.resent(1, f"{0:064x}")
        anchor = ledger.anchor("keeper")
    with opened(image / path.name) as ledger:
        with pytest.raises(LedgerError, match="LEDGER_BEHIND"):
            ledger.check_anchor("keeper", anchor, "the keeper")


def test_an_anchor_holds_for_the_rows_after_it_and_for_its_own_keeper_only(path: Path) -> None:
    with opened(path) as ledger:
        one, other = ledger.anchor("federation/a"), ledger.anchor("federation/b")
        ledger.resent(1, f"{0:064x}")
        ledger.check_anchor("federation/a", one, "the keeper")
        assert one.hex() not in {row.hash for row in ledger.export()}, "no plain hash of a row"
        assert ledger.anchor("federation/a") != one != other, (
            "two keepers cannot tell that they keep one ledger"
        )
        for wrong in (other, bytes(32), b""):
            with pytest.raises(LedgerError, match="LEDGER_BEHIND"):
                ledger.check_anchor("federation/a", wrong, "the keeper")


def test_sqlite_itself_refuses_changes_and_deletions(path: Path) -> None:
    connection = sqlite3.connect(path)
    for statement in ("UPDATE rows SET epsilon = 0", "DELETE FROM rows", "DELETE FROM epoch_examples"):
        if "epoch" in statement:
            connection.execute("INSERT INTO epoch_examples VALUES ('x', 'y')")
        with pytest.raises(sqlite3.IntegrityError, match="only grows"):
            connection.execute(statement)
    connection.close()


def test_damaged_evidence_of_disjointness_is_found(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with opened(path) as ledger:
        for round, ids in enumerate((["a", "b"], ["c", "d"])):
            charge(ledger, GaussianEvent(8.0, 1.0, 1), round=round, ids=ids)
    reopen(path)
    execute(
        path, "DELETE FROM epoch_examples WHERE example_hash = (SELECT min(example_hash) FROM epoch_examples)"
    )
    with pytest.raises(LedgerError, match="evidence of disjoint data epochs is damaged"):
        reopen(path)


def test_impossible_stories_are_refused_even_with_fitting_hashes(path: Path) -> None:
    rewrite(path, kind="REFUSED")
    with pytest.raises(LedgerError, match=r"row 2\b.*reservation that does not exist"):
        reopen(path)


def test_a_name_in_the_file_that_is_no_text_is_damage_as_any_other(tmp_path: Path) -> None:
    """SQLite names it in its message, which Python cannot decode then."""
    path = tmp_path / "ledger.sqlite"
    Ledger.open(path, "ada", 1e-5, 8.0, accountant="rdp").close()
    content = path.read_bytes()
    assert b"sqlite_autoindex" in content
    path.write_bytes(content.replace(b"sqlite_autoindex", b"sqlite_aut\xff\xffndex"))
    with pytest.raises(LedgerError, match="cannot be read or written"):
        read_ledger(path)
