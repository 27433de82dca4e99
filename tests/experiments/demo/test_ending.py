"""The demo's last screen: what came out, in words that the figures bear, on one screen."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from fedmosaic.experiments.comparison.record import RunRecord
from fedmosaic.experiments.demo.ending import command_line, ending, verdict, worst_statement
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.ledger.ledger import Ledger, data_epoch
from fedmosaic.privacy.statement.build import statement
from fedmosaic.privacy.statement.models import ClientInputs, StatementInputs

NAMES = ("film-north", "film-south", "home", "news-east", "news-west")


@pytest.fixture(scope="module")
def statements(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A statement of each client, `home` with the least noise."""
    made: dict[str, Any] = {}
    for name in NAMES:
        sigma = 2.0 if name == "home" else 8.0
        path = tmp_path_factory.mktemp("ledgers") / name
        with Ledger.open(path, name, 1e-5, 8.0, accountant="rdp", budgeted_channels=("profile",)) as ledger:
            ledger.reserve(
                "profile", 0, GaussianEvent(sigma, 1.0, 1), data_epoch=data_epoch(["x"]), secure_noise=True,
                clipping_norm=1.0, dimensions=32,
            )  # fmt: skip
            client = ClientInputs(ledger=tuple(ledger.export()), adapter_protection="encrypted")
        facts = StatementInputs(run_id="0" * 32, clients=(client,))
        made[name] = json.loads(statement(facts).model_dump_json())
    return made


TASKS = {name: name[:4] for name in NAMES}


def record(statements: dict[str, Any], own: float = 0.8) -> RunRecord:
    """Two of a kind answer each other's texts after training, and nobody those of another kind."""
    clients = {
        name: {
            "before": {"self": 0.4} | {other: 0.25 for other in NAMES if other != name},
            "after": {"self": own}
            | {other: 0.75 if TASKS[other] == TASKS[name] else 0.2 for other in NAMES if other != name},
            "received_rounds": 2,
        }
        for name in NAMES
    }
    similarity = [[1.0 if i // 2 == j // 2 else 0.1 for j in range(4)] for i in range(4)]
    names = ["film-north", "film-south", "news-east", "news-west"]
    server = {"run_id": "0" * 32, "results": [{"clients": names, "similarity": similarity}]}
    return RunRecord(Path("run"), clients, statements, server, TASKS, dict.fromkeys(NAMES, 0.35))


def text_of(part: RenderableType, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_ending_is_one_screen_with_everything_on_it(statements: dict[str, Any]) -> None:
    shown = text_of(ending(record(statements), dict.fromkeys(NAMES, 0.7), 60))
    assert len(shown.splitlines()) < 50
    assert max(map(len, shown.splitlines())) <= 80
    for name in NAMES:
        assert name in shown
    for figure in ("0.35", "0.40", "0.70", "0.80", "0.25", "0.34"):
        assert figure in shown
    assert "film-north and film-south; news-east and news-west" in " ".join(shown.split())
    assert shown.count("ε at δ") == 1, "one statement, that of the client with most at stake"
    assert "Client home: ε at δ" in shown
    assert "…" not in shown


@pytest.mark.parametrize(
    ("alone", "words"),
    [
        (0.7, "80 % of their own test texts right, each trained alone 70 %: +10 ± 7 points. Sharing paid"),
        (0.9, "Training alone was better, by more than chance gives on 300 test texts."),
        (0.79, "nobody loses or gains by sharing as far as 300 test texts can tell"),
    ],
)
def test_the_verdict_says_no_more_than_chance_allows(
    statements: dict[str, Any], alone: float, words: str
) -> None:
    said = verdict(record(statements), dict.fromkeys(NAMES, alone), 60).plain
    assert words in said


def test_the_same_task_and_other_tasks_are_told_apart(statements: dict[str, Any]) -> None:
    """Others is the mean over all other clients, as in every table: one figure hides who gained what."""
    said = verdict(record(statements), {}, 60).plain
    assert "On texts of others with the same task they went from 25 % to 75 %." in said
    assert "On texts of others with another task they went from 25 % to 20 %." in said


def test_without_the_comparison_the_start_is_told(statements: dict[str, Any]) -> None:
    said = text_of(ending(record(statements), {}, 60))
    assert "before training it was 40 %" in " ".join(said.split())


def test_the_worst_statement_is_that_of_the_largest_epsilon(statements: dict[str, Any]) -> None:
    worst = worst_statement(record(statements))
    assert worst is not None
    assert worst.client_id == "home"
    assert worst_statement(record({})) is None


def test_a_command_is_printed_as_it_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / ".venv" / "bin" / "fedmosaic"
    script.parent.mkdir(parents=True)
    script.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(script.parent / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert command_line("report", "runs/a b") == ".venv/bin/fedmosaic report 'runs/a b'"
    monkeypatch.setenv("PATH", str(script.parent))
    assert command_line("report", "runs/x") == "fedmosaic report runs/x"
    monkeypatch.chdir("/")
    monkeypatch.setenv("PATH", "")
    assert command_line("report") == f"{str(script).removeprefix('/')} report"
