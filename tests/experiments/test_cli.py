"""The command line: help for newcomers, clear errors, and a server that stays light."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedmosaic.experiments import cli


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    environment = dict(os.environ)
    try:
        status = cli.main([name, "--help"])
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    assert status == 0
    assert len(capsys.readouterr().out) > 100
    ours = {key for key in os.environ.keys() - environment.keys() if key.startswith(("GRPC", "FEDMOSAIC"))}
    assert not ours, "looking at the help changes nothing for the rest of the process"


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown for name in cli.COMMANDS)


def test_an_unknown_command_is_an_error_that_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve"]) == 2
    assert "fedmosaic --help" in capsys.readouterr().err


def test_errors_of_ours_are_one_line_without_a_traceback(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["keys", "init", str(tmp_path / "none.toml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fedmosaic keys: ")
    assert "no such file" in error
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "no run here" in capsys.readouterr().err
    assert cli.main(["keys", "init", str(tmp_path)]) == 2
    assert "cannot be read (Is a directory)" in capsys.readouterr().err
    assert cli.main(["keys", "add", "No Name", "--directory", str(tmp_path)]) == 2
    assert "keys add is not a valid MemberEntry" in capsys.readouterr().err


def test_keys_init_add_revoke_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "federation.toml"
    config.write_text(
        'federation = "clinics"\nmembers = [{id = "a"}, {id = "b"}, {id = "c"}, {id = "d"}]\n'
        '[terms.profile]\nprobe = "tiny"\nprobe_sha256 = "' + "0" * 64 + '"\n'
        "[terms.profile.reduction]\nhidden_size = 8\nintermediate_size = 16\nprojection_dimensions = 32\n"
    )
    place = tmp_path / "federation"
    assert cli.main(["keys", "init", str(config), "--out", str(place)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "1 recipient(s) of the 4 members solve for no adapter, 2 may;" in told
    assert "only adapter.protection 'dp' helps" in told
    assert cli.main(["keys", "add", "e", "--directory", str(place)]) == 0
    assert cli.main(["keys", "rotate", "a", "--directory", str(place)]) == 0
    assert cli.main(["keys", "revoke", "b", "--directory", str(place)]) == 0
    assert cli.main(["keys", "revoke", "c", "--directory", str(place)]) == 2
    assert "without 'c', 3 members cannot receive anything" in capsys.readouterr().err
    assert cli.main(["keys", "show", "--directory", str(place)]) == 0
    shown = capsys.readouterr().out
    assert "roster 4" in shown
    assert "89 days left" in shown
    assert (place / "clients" / "e" / "roster.json").read_bytes() == (place / "roster.json").read_bytes()


def test_the_server_command_loads_no_models_library() -> None:
    code = (
        "import sys\nfrom fedmosaic.experiments import cli\n"
        "import fedmosaic.server.__main__\n"
        "heavy = {'torch', 'transformers', 'peft', 'opacus', 'tenseal'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
