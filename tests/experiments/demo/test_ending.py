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

NAMES = ("home-east", "home-west", "news-east", "news-west")
TEXTS = 60


@pytest.fixture(scope="module")
def statements(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A statement of each client, `home-east` with the least noise."""
    made: dict[str, Any] = {}
    for name in NAMES:
        sigma = 2.0 if name == "home-east" else 8.0
        path = tmp_path_factory.mktemp("ledgers") / name
        with Ledger.open(path, name, 1e-5, 8.0, accountant="rdp", budgeted_channels=("profile",)) as ledger:
            ledger.reserve(
                "profile",
                0,
                GaussianEvent(sigma, 1.0, 1),
                data_epoch=data_epoch(["x"]),
                secure_noise=True,
                clipping_norm=1.0,
                dimensions=32,
            )
            client = ClientInputs(ledger=tuple(ledger.export()), adapter_protection="encrypted")
        facts = StatementInputs(run_id="0" * 32, clients=(client,))
        made[name] = json.loads(statement(facts).model_dump_json())
    return made


def record(statements: dict[str, Any], alone: int | None = None, together: int = 48) -> RunRecord:
    """Own texts right of 60 at each client, alone and together; whoever is right alone is so together."""
    right = {"after": together} | ({} if alone is None else {"alone": alone})
    clients = {}
    for name in NAMES:
        kin = {other: other[:4] == name[:4] for other in NAMES if other != name}
        clients[name] = {
            "before": {"self": 0.4, **{other: 0.25 for other in kin}},
            "after": {"self": together / TEXTS, **{o: 0.75 if alike else 0.2 for o, alike in kin.items()}},
            **({} if alone is None else {"alone": {"self": alone / TEXTS}}),
            "rows": {
                when: {"self": {"right": [row < count for row in range(TEXTS)]}}
                for when, count in right.items()
            },
            "received_rounds": 2,
        }
    similarity = [[1.0 if i // 2 == j // 2 else 0.1 for j in range(4)] for i in range(4)]
    server = {"run_id": "0" * 32, "results": [{"clients": NAMES, "similarity": similarity}]}
    tasks = {name: name[:4] for name in NAMES}
    return RunRecord(Path("run"), clients, statements, server, tasks, dict.fromkeys(NAMES, 0.35))


def text_of(part: RenderableType, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_ending_is_one_screen_with_everything_on_it(statements: dict[str, Any]) -> None:
    shown = text_of(ending(record(statements, alone=42)))
    assert len(shown.splitlines()) < 50
    assert max(map(len, shown.splitlines())) <= 80
    for name in NAMES:
        assert name in shown
    for figure in ("0.35", "0.40", "0.70", "0.80", "0.25", "0.38"):
        assert figure in shown
    assert "home-east and home-west; news-east and news-west" in " ".join(shown.split())
    assert shown.count("ε at δ") == 1, "one statement, that of the client with most at stake"
    assert "Client home-east: ε at δ" in shown
    assert "…" not in shown


@pytest.mark.parametrize(
    ("alone", "words"),
    [
        (42, "80 % of their own test texts right, each trained alone 70 %: +10 points (95 % interval +6 to "),
        (54, "Training alone was better, by more than chance gives on 240 test texts."),
        (47, "240 test texts cannot tell sharing from training alone."),
    ],
)
def test_the_verdict_says_no_more_than_chance_allows(
    statements: dict[str, Any], alone: int, words: str
) -> None:
    said = verdict(record(statements, alone)).plain
    assert words in said
    assert ("Sharing paid, by more than chance gives" in said) is (alone == 42)


def test_the_same_task_and_other_tasks_are_told_apart(statements: dict[str, Any]) -> None:
    said = verdict(record(statements)).plain
    assert "On the texts of the members with the same task they went from 25 % to 75 %." in said
    assert "On the texts of the members with another task they went from 25 % to 20 %." in said


def test_without_the_comparison_the_start_is_told(statements: dict[str, Any]) -> None:
    said = text_of(ending(record(statements)))
    assert "before training it was 40 %" in " ".join(said.split())


def test_the_worst_statement_is_that_of_the_largest_epsilon(statements: dict[str, Any]) -> None:
    worst = worst_statement(record(statements))
    assert worst is not None
    assert worst.client_id == "home-east"
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
