"""Killed at any step, a client never finds less charged than noise it may have drawn."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from builders import charge
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.ledger.ledger import Ledger, data_epoch
from fedmosaic.protos.errors import LedgerError

EPOCH = data_epoch(["a"])
EVENT = GaussianEvent(8.0, 1.0, 1)

CLIENT = textwrap.dedent("""
    import hashlib, os, pathlib, signal, sys, time
    from fedmosaic.privacy.ledger import store as ledger_store
    from fedmosaic.privacy.accounting.events import GaussianEvent
    from fedmosaic.privacy.ledger.ledger import Ledger, data_epoch
    from fedmosaic.privacy.accounting.epsilon import epsilon
    epsilon([GaussianEvent(8.0, 1.0, 1)], 1e-5, "rdp")     # import everything before the forks

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def release(directory, step):
        ledger = Ledger.open(directory / "ledger.sqlite", "clinic-a", 1e-5, None, "rdp")
        if step == "before the row is committed":
            ledger_store.LedgerStore.append = lambda self, row: die()
        if step == "before the head is written":
            ledger_store.LedgerStore.write_head = lambda self, row: die()
        sequence = ledger.reserve("adapter", 0, GaussianEvent(8.0, 1.0, 1), data_epoch=data_epoch(["a"]),
                                  secure_noise=True, clipping_norm=1.0, dimensions=4)
        if step == "before noise is drawn": die()
        (directory / "drawn").touch()
        noise = os.urandom(32)
        if step == "before the bytes are stored": die()
        (directory / "bytes").write_bytes(noise)
        if step == "before the release is recorded": die()
        ledger.released(sequence, hashlib.sha256(noise).hexdigest())
        if step == "before the bytes are sent": die()
        (directory / "sent").write_bytes(noise)
        die()

    def release_many(directory):
        ledger = Ledger.open(directory / "ledger.sqlite", "clinic-a", 1e-5, None, "rdp")
        with (directory / "drawn").open("ab", buffering=0) as drawn:
            for round in range(10**6):
                ledger.reserve("adapter", round, GaussianEvent(8.0, 1.0, 1), data_epoch=data_epoch(["a"]),
                               secure_noise=True, clipping_norm=1.0, dimensions=4)
                drawn.write(b".")

    for directory, step in zip(sys.argv[1::2], sys.argv[2::2]):
        directory = pathlib.Path(directory)
        Ledger.open(directory / "ledger.sqlite", "clinic-a", 1e-5, None, "rdp").close()
        child = os.fork()
        if not child:
            release_many(directory) if step == "in the middle of many" else release(directory, step)
        if step == "in the middle of many":
            while not (directory / "drawn").exists() or not (directory / "drawn").stat().st_size:
                time.sleep(0.01)
            time.sleep(0.3)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL, (step, status)
""")

STEPS = (
    "before the row is committed",
    "before the head is written",
    "before noise is drawn",
    "before the bytes are stored",
    "before the release is recorded",
    "before the bytes are sent",
    "never",
)
MANY = "in the middle of many"


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directories = {step: tmp_path_factory.mktemp(step.replace(" ", "_")) for step in (*STEPS, MANY)}
    arguments = [str(part) for step, directory in directories.items() for part in (directory, step)]
    subprocess.run([sys.executable, "-c", CLIENT, *arguments], check=True, timeout=120)
    return directories


def reopened(directory: Path) -> Ledger:
    return Ledger.open(directory / "ledger.sqlite", "clinic-a", 1e-5, None, "rdp")


@pytest.mark.parametrize("step", STEPS)
def test_what_was_drawn_is_charged(killed: dict[str, Path], step: str) -> None:
    with reopened(killed[step]) as ledger:
        charged = len(ledger.events())
        drawn = (killed[step] / "drawn").exists()
        assert charged >= drawn
        assert charged == (step != STEPS[0]), "and nothing is charged before the row is durable"
        ledger.verify()


@pytest.mark.parametrize("step", STEPS)
def test_what_was_sent_is_recorded_with_its_digest(killed: dict[str, Path], step: str) -> None:
    with reopened(killed[step]) as ledger:
        found = ledger.release_of("adapter", 0, EPOCH)
        assert (found is not None) == (step in STEPS[-2:])
        assert not (killed[step] / "sent").exists() or found is not None


def test_going_on_after_a_crash_costs_what_the_rules_say(killed: dict[str, Path]) -> None:
    with reopened(killed["before the bytes are stored"]) as ledger:
        charge(ledger, EVENT, data_epoch=EPOCH)
        assert len(ledger.events()) == 2, "the lost draw stays charged, the fresh one is charged as well"
    with reopened(killed["before the release is recorded"]) as ledger:
        pending = ledger.pending("adapter", 0, EPOCH)
        assert pending is not None
        ledger.released(pending.sequence, "c" * 64)
        assert len(ledger.events()) == 1, "stored bytes are recorded late, at no further cost"
    with reopened(killed["before the bytes are sent"]) as ledger:
        with pytest.raises(LedgerError, match="send the stored bytes again"):
            charge(ledger, EVENT, data_epoch=EPOCH)
        assert len(ledger.events()) == 1


def test_killed_in_the_middle_of_many_releases_no_draw_is_uncharged(killed: dict[str, Path]) -> None:
    with reopened(killed[MANY]) as ledger:
        ledger.verify()
        drawn = (killed[MANY] / "drawn").stat().st_size
        assert 1 <= drawn <= len(ledger.events()) <= drawn + 1
