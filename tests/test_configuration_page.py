"""The reference of all settings is what the models say, and every key has a meaning."""

import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "docs" / "configuration.py"


def test_the_page_is_what_the_models_say() -> None:
    written = SCRIPT.with_suffix(".md").read_text(encoding="utf-8")
    assert runpy.run_path(str(SCRIPT))["page"]() == written, "run `make docs`"


def test_every_file_and_a_key_that_no_page_had_is_there() -> None:
    written = SCRIPT.with_suffix(".md").read_text(encoding="utf-8")
    for heading in (
        "client.toml",
        "federation.toml",
        "server.toml",
        "`[terms.adapter_privacy]`",
        "`[[members]]`",
    ):
        assert f"# {heading}\n" in written
    assert "| `target_epsilon` | ε of each client's budget" in written
