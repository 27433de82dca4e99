"""`fedmosaic predict` and `fedmosaic chat`: the client's own model answers."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmosaic.client.model.examples import Example
from fedmosaic.client.model.scoring import Examiner
from fedmosaic.client.result import chat, predict
from fedmosaic.protos.errors import ConfigurationError

Leave = Callable[..., Any]


def ask(left: Any, prompt: str, tokens: int) -> str:
    model, tokenizer = left.learner.trained
    return Examiner(model, tokenizer, 1, 32).written([Example("x", prompt, "")], tokens)[0]


def test_rows_with_and_without_choices_are_answered_in_order(leave: Leave, tmp_path: Path) -> None:
    left = leave("llama")
    rows = [{"text": "w1 w2"}, {"id": "b", "text": "w3", "choices": ["yes", "no"]}, {"text": "w4"}]
    data, out = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data", str(data), "--out", str(out), "--max-new-tokens", "5", "--columns.prompt", "text"]
    assert predict.main([str(left.state), *options, "--batch-size", "2"]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in found] == ["row-1", "b", "row-3"]
    assert found[1]["answer"] in ("yes", "no")
    assert [found[0]["answer"], found[2]["answer"]] == [ask(left, "w1 w2", 5), ask(left, "w4", 5)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": " "}', "line 2: 'prompt' must be a text"),
        ('{"prompt": "secret", "choices": ["a"]}', "line 2: 'choices' must be a list of two"),
        ("secret", "line 2 is not JSON"),
    ],
)
def test_a_bad_row_is_named_before_the_model_is_loaded(tmp_path: Path, line: str, reason: str) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "w1"}\n' + line + "\n")
    with pytest.raises(ConfigurationError, match=reason) as caught:
        predict.main([str(tmp_path), "--data", str(data), "--out", str(tmp_path / "out")])
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="--out is --data"):
        predict.main([str(tmp_path), "--data", str(data), "--out", str(data)])


def test_a_chat_answers_each_line_as_a_prompt_of_its_own(
    leave: Leave, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = leave("llama")
    expected = [ask(left, prompt, 6) for prompt in ("w1 w2", "w5")]
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w2\nw5\n\nnever read\n"))
    assert chat.main([str(left.state), "--max-new-tokens", "6", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.split() == " ".join(expected).split()


def test_a_device_that_is_none_is_refused(leave: Leave) -> None:
    left = leave("llama")
    with pytest.raises(ConfigurationError, match="--device is 'gpu'"):
        chat.main([str(left.state), "--device", "gpu"])
