"""Where a client's ledger stands, that no fresh one forgets what was spent, and its δ while data change."""

import shutil
from pathlib import Path

import pytest

from builders import charge, tiny_mechanism
from fedmosaic.client.ledger import DataLedger, ledger_delta, main
from fedmosaic.client.settings import DataSettings
from fedmosaic.client.state import SessionRecord
from fedmosaic.privacy.accounting.epsilon import default_delta
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.federation.terms import AdapterTerms, Terms
from fedmosaic.privacy.ledger.ledger import LEDGER, Ledger, data_epoch, read_ledger
from fedmosaic.privacy.ledger.move import back_up, move
from fedmosaic.protos.errors import LedgerError

IDS = [f"e{index}" for index in range(400)]
EPOCH = data_epoch(IDS)
TERMS = Terms(
    adapter=AdapterTerms(rank=4, protection="dp"),
    allow_plaintext=True,
    encryption={"backend": "plain"},
    profile=tiny_mechanism(noise_multiplier=8.0),
)
PROFILE = GaussianEvent(8.0, 1.0, 1)


class Site:
    """One member's machine: a data file, and state directories of its runs."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.train = place / "train.jsonl"
        self.train.write_text("")

    def books(
        self, state: str = "state", *, named: Path | None = None, run: str = "", train: Path | None = None
    ) -> DataLedger:
        directory = self.place / state
        directory.mkdir(exist_ok=True)
        record = SessionRecord(federation="clinics", client="north", run_id=run)
        return DataLedger.of(DataSettings(train=train or self.train, ledger=named), directory, record)

    def open(self, state: str = "state", **options: object) -> Ledger:
        return self.books(state, **options).open(TERMS, IDS, 8.0)  # type: ignore[arg-type]  # by keyword


def of_before(state: Path) -> Ledger:
    """A ledger as it stood in the state directory."""
    channels = ("profile", "adapter")
    return Ledger.open(state / LEDGER, "north", default_delta(400), 8.0, budgeted_channels=channels)  # type: ignore[arg-type]  # literals


def spend(ledger: Ledger, run: str) -> None:
    charge(ledger, PROFILE, data_epoch=EPOCH, context=run)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_every_state_directory_opens_the_ledger_beside_the_data(site: Site) -> None:
    for run in ("first", "second"):
        with site.open(run) as ledger:
            spend(ledger, run)
    with site.open("third") as ledger:
        assert ledger.directory == site.place / "train.jsonl.ledger"
        assert ledger.events() == [PROFILE, PROFILE]
    assert {path.parent.name for path in site.place.glob("*/*.sqlite*")} == {"train.jsonl.ledger"}


@pytest.mark.parametrize("name", ["train.jsonl", "other.jsonl"])
def test_a_ledger_that_a_kill_or_another_process_left_unbegun_is_none(site: Site, name: str) -> None:
    place = site.place / f"{name}.ledger"
    place.mkdir()
    (place / LEDGER).touch()
    with site.open() as ledger:
        assert ledger.events() == []
    if name == "train.jsonl":
        # With a head beside it, it was more.
        (place / LEDGER).write_bytes(b"")
        for left in place.glob(f"{LEDGER}-*"):
            left.unlink()
        with pytest.raises(LedgerError, match="train"):
            site.open()


def test_two_names_of_one_file_are_one_data_set(site: Site) -> None:
    link = site.place / "link.jsonl"
    link.symlink_to(site.train)
    with site.open() as ledger:
        spend(ledger, "first")
    with site.open("second", train=link) as ledger:
        assert ledger.events() == [PROFILE]


def test_a_ledger_in_a_state_directory_is_joined_by_the_command_that_is_named(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    with of_before(site.place / "first") as ledger:
        spend(ledger, "first")
    shutil.copytree(site.place / "first", site.place / "second")
    with of_before(site.place / "second") as ledger:
        spend(ledger, "second")
    (site.place / "second" / "profile-1-2.npy").write_bytes(b"noise")
    for number, name in enumerate(("first", "second"), 1):
        with pytest.raises(LedgerError, match=rf"fedmosaic ledger move \S+{name} \S+train.jsonl.ledger"):
            site.open(name)
        assert main(["move", str(site.place / name), str(site.train) + ".ledger"]) == 0
        with site.open(name, run="0" * 32) as ledger:
            assert ledger.events() == [PROFILE] * number
        with pytest.raises(LedgerError, match="closed and moved"):
            of_before(site.place / name)
    assert "1 release(s)" in capsys.readouterr().out
    assert (ledger.directory / "profile-1-2.npy").exists()


@pytest.mark.parametrize("loss", ["the ledger", "the ledger of before", "the place"])
def test_no_fresh_ledger_where_this_state_has_charged_another(site: Site, loss: str) -> None:
    if loss == "the ledger of before":
        # Joined a run, and neither a ledger nor a note of one is left.
        with pytest.raises(LedgerError, match="which is gone"):
            site.open(run="0" * 32)
        return
    with site.open() as ledger:
        spend(ledger, "first")
    if loss == "the ledger":
        shutil.rmtree(ledger.directory)
        with pytest.raises(LedgerError, match="A fresh ledger would forget it"):
            site.open()
    else:
        with pytest.raises(LedgerError, match="A fresh ledger would forget it"):
            site.open(named=site.place / "other")
    assert not (site.place / "other").exists()


def test_renamed_data_find_their_ledger(site: Site) -> None:
    with site.open() as ledger:
        spend(ledger, "first")
    renamed = site.train.rename(site.place / "renamed.jsonl")
    with pytest.raises(LedgerError, match="exactly these example ids"):
        site.open("second", train=renamed)
    old, new = site.place / "train.jsonl.ledger", site.place / "renamed.jsonl.ledger"

    def killed(step: str) -> None:
        raise KeyboardInterrupt(step)

    with pytest.raises(KeyboardInterrupt):
        move(old, new, killed)
    with pytest.raises(LedgerError, match=f"fedmosaic ledger move {old} {new}"):
        site.open("second", train=renamed)
    move(old, new)
    with site.open("second", train=renamed) as ledger:
        assert ledger.events() == [PROFILE]
    move(new, site.place / "books")
    again = renamed.rename(site.place / "again.jsonl")
    with pytest.raises(LedgerError, match=r"moved to \S+; name that directory in data\.ledger"):
        site.open("third", train=again)


def test_no_fresh_ledger_where_one_was_to_be_moved_before_a_kill(site: Site) -> None:
    with site.open() as ledger:
        spend(ledger, "first")
    old, new = site.place / "train.jsonl.ledger", site.place / "books" / "train"

    def killed(step: str) -> None:
        raise KeyboardInterrupt(step)

    with pytest.raises(KeyboardInterrupt):
        move(old, new, killed)
    with pytest.raises(LedgerError, match=f"fedmosaic ledger move OLD {new}"):
        site.open("second", named=new)
    move(old, new)
    with site.open("second", named=new) as ledger:
        assert ledger.events() == [PROFILE]


def test_an_older_ledger_put_back_is_behind_what_the_state_has_seen(site: Site) -> None:
    site.open().close()
    place = site.place / "train.jsonl.ledger"
    back_up(place, site.place / "backup")
    with site.open() as ledger:
        spend(ledger, "first")
        site.books().remember(ledger)
    shutil.rmtree(place)
    move(site.place / "backup", place)
    with pytest.raises(LedgerError, match=r"LEDGER_BEHIND.*state directory"):
        site.open()


def test_a_place_that_cannot_be_written_is_named_with_what_to_set(site: Site) -> None:
    (site.place / "file").write_text("")
    with pytest.raises(LedgerError, match=r"data\.ledger"):
        site.open(named=site.place / "file" / "ledger")


def test_backup_by_the_command_line(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    with site.open() as ledger:
        spend(ledger, "first")
        assert main(["backup", str(ledger.directory), str(site.place / "out")]) == 0
    assert "fedmosaic ledger move" in capsys.readouterr().out
    assert read_ledger(site.place / "out" / LEDGER)[-1].kind == "CLOSED"


@pytest.mark.parametrize("now", [200, 999, 1000, 1001, 1900, 1995])
def test_a_kept_ledger_keeps_its_delta_while_it_is_at_most_one_over_n(tmp_path: Path, now: int) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger.open(path, "ada", default_delta(1000), 8.0).close()
    assert ledger_delta(path, now) == default_delta(1000)
    Ledger.open(path, "ada", ledger_delta(path, now), 8.0, examples=now).close()
    # More than that are refused with the number that is possible.
    with pytest.raises(LedgerError, match="at most 1995 examples"):
        ledger_delta(path, 2000)


def test_terms_bound_delta_and_a_ledger_with_a_larger_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    assert ledger_delta(path, 1000) == default_delta(1000)
    assert ledger_delta(path, 400, 1e-5) == 1e-5
    assert ledger_delta(path, 400, 1.0) == default_delta(400)
    assert ledger_delta(path, 10**6, 1e-5) == default_delta(10**6)
    Ledger.open(path, "ada", default_delta(400), 8.0).close()
    with pytest.raises(LedgerError, match=r"δ = 1\.37e-03 .* at most 1e-05 .* whose terms allow 0\.0014"):
        ledger_delta(path, 400, 1e-5)
    assert ledger_delta(path, 400, 0.0014) == default_delta(400)
