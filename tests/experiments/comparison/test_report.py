"""`fedmosaic report` of a record in which one member's privacy statement is not what it should be."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from builders import charge
from fedmosaic.experiments.comparison import report
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.ledger.ledger import Ledger
from fedmosaic.privacy.statement.build import statement
from fedmosaic.privacy.statement.models import ClientInputs, StatementInputs

RUN, ROSTER = "0" * 32, "1" * 64


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Statements of two members, as they reach the server."""
    made: dict[str, Any] = {}
    for name in ("ada", "ben"):
        path = tmp_path_factory.mktemp("ledgers") / name
        with Ledger.open(path, name, 1e-5, 8.0, accountant="rdp", budgeted_channels=("profile",)) as ledger:
            charge(ledger, GaussianEvent(8.0, 1.0, 1), "profile", 0)
            inputs = StatementInputs(
                run_id=RUN,
                clients=(ClientInputs(ledger=tuple(ledger.export()), adapter_protection="none"),),
                roster_sha256=ROSTER,
            )
        made[name] = json.loads(statement(inputs).model_dump_json())
    return made


def shown(place: Path, statements: dict[str, Any], capsys: Any, *options: str) -> str:
    record = {"run_id": RUN, "roster_hash": ROSTER, "results": [], "statements": statements}
    record["unreadable_statements"] = ["dee"]
    (place / "run.json").write_text(json.dumps(record))
    assert report.main([str(place), *options]) == 0
    return " ".join(capsys.readouterr().out.split())


def changed(content: dict[str, Any], **mine: Any) -> dict[str, Any]:
    return content | {"clients": [content["clients"][0] | mine]}


def test_a_bad_statement_is_named_and_the_others_are_shown(
    tmp_path: Path, honest: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    ada, ben = honest["ada"], honest["ben"]
    for bad, reason in (
        ({"hello": 1}, "no privacy statement"),
        ([], "no privacy statement"),
        (ben | {"run_id": "other"}, "about run other, not about"),
        (changed(ben, client_id="ada"), "about ada where it has to be about ben"),
        (ben | {"clients": ada["clients"] + ben["clients"]}, "about ada, ben where"),
        (changed(ben, warnings=["\x1b[2Jeverything is fine"]), "its warnings has characters"),
        (ben | {"leaks": ["\x1b]0;owned\x07"]}, "its leaks has characters"),
        (changed(ben, guarantees=[]), "no guarantee for channel"),
        (changed(ben, spent_epsilon=1e308), "its spent_epsilon is no figure"),
        (ben | {"\x1b[2J": 1}, "Extra inputs are not permitted"),
    ):
        text = shown(tmp_path, {"ada": ada, "ben": bad}, capsys)
        assert "Client ada: ε at δ" in text
        assert "Client ben:" not in text
        assert text.count("Client ada:") == 1
        assert "The privacy statement of ben is left out: it" in text
        assert reason in text
        assert "The privacy statement of dee is left out" in text
        assert text.isprintable()


def test_statements_of_the_rarer_roster_are_left_out(
    tmp_path: Path, honest: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    ada, ben = honest["ada"], honest["ben"]
    third = changed(ada, client_id="cid")
    statements = {"ada": ada | {"roster_sha256": "2" * 64}, "ben": ben, "cid": third}
    text = shown(tmp_path, statements, capsys)
    assert "statement of ada is left out: it is about another run or roster" in text
    assert "Client ben:" in text
    assert "Client cid:" in text


def test_brackets_in_a_statement_are_text(
    tmp_path: Path, honest: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    ada = changed(honest["ada"], neighbouring_relation="add [/or] remove", warnings=["[/not] markup"])
    text = shown(tmp_path, {"ada": ada | {"leaks": ["all [/of] it"]}}, capsys)
    for words in ("add [/or] remove", "[/not] markup", "all [/of] it"):
        assert words in text


def test_figures_that_no_accountant_takes_cost_one_client_its_line(
    tmp_path: Path, honest: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    bad = json.loads(json.dumps(honest["ben"]))
    bad["clients"][0]["delta"] = 0.999999
    bad["clients"][0]["channels"][0]["mechanisms"][0]["noise_multiplier"] = "infinity"
    text = shown(tmp_path, {"ada": honest["ada"], "ben": bad}, capsys, "--at-epsilon", "2")
    assert "No costs for ben: noise_multiplier is inf" in text
    assert "Noise for another ε" in text


def test_a_run_that_brought_nothing_is_reported_as_one(
    tmp_path: Path, honest: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    alone = {"before": {}, "after": {}, "received_rounds": 0}
    (tmp_path / "result.json").write_text(json.dumps(alone))
    (tmp_path / "session.json").write_text(json.dumps({"client": "ada"}))
    (tmp_path / "statement.json").write_text(json.dumps(honest["ada"]))
    assert report.main([str(tmp_path)]) == 0
    assert "ada RECEIVED NOTHING from the others" in capsys.readouterr().out
    (tmp_path / "result.json").write_text(json.dumps(alone | {"received_rounds": 2}))
    assert report.main([str(tmp_path)]) == 0
    assert "RECEIVED NOTHING" not in capsys.readouterr().out


def test_a_certificate_in_its_last_days_is_announced(
    tmp_path: Path, honest: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "session.json").write_text(json.dumps({"client": "ada"}))
    (tmp_path / "statement.json").write_text(json.dumps(honest["ada"]))

    def told(days: float, **more: Any) -> str:
        expiry = datetime.now(UTC) + timedelta(days=days)
        result = {"before": {}, "certificate_expires": expiry.isoformat()} | more
        (tmp_path / "result.json").write_text(json.dumps(result))
        assert report.main([str(tmp_path)]) == 0
        return " ".join(capsys.readouterr().out.split())

    assert "ada: the certificate expires in 12 days" in told(12.5)
    assert "ada: the certificate expired on" in told(-1)
    assert "certificate" not in told(15)
    assert "certificate" not in told(-1, after={})
    assert "certificate" not in told(0, certificate_expires="soon")


def test_a_server_tells_that_nothing_was_exchanged(
    tmp_path: Path, honest: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"run_id": RUN, "roster_hash": ROSTER, "results": [], "statements": {"ada": honest["ada"]}}
    over = record | {"phase": "finished", "received_rounds": {"ada": 0, "ben": 0}}
    (tmp_path / "run.json").write_text(json.dumps(over))
    assert report.main([str(tmp_path)]) == 0
    assert "NOTHING WAS EXCHANGED" in capsys.readouterr().out
