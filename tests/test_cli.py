"""The command line: help for newcomers, clear errors, and a server that stays light."""

import errno
import hashlib
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from safetensors import SafetensorError

from fedmosaic import cli
from fedmosaic.privacy import terminal
from fedmosaic.privacy.federation import identity
from fedmosaic.protos.errors import ModelError


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
    ours -= {"GRPC_VERBOSITY"}  # set whenever the client's package is imported, with whatever command
    assert not ours, "looking at the help changes nothing for the rest of the process"


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
    assert cli.main(["keys", "request", "No Name", "--federation", "f", "--kit", str(tmp_path / "k")]) == 2
    assert "the request is not a valid KeyRequest" in capsys.readouterr().err


FOUNDING = (
    'federation = "clinics"\nmembers = [{id = "a"}, {id = "b"}, {id = "c"}, {id = "d"}]\n'
    '[terms.profile]\nprobe = "tiny"\nprobe_sha256 = "' + "0" * 64 + '"\n'
    "[terms.profile.reduction]\nhidden_size = 8\nintermediate_size = 16\nprojection_dimensions = 32\n"
)


def test_keys_for_a_demo_are_all_made_at_once_and_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "federation.toml"
    config.write_text(FOUNDING)
    place = tmp_path / "federation"
    assert cli.main(["keys", "init", str(config), "--out", str(place), "--for-demo"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "FOR ONE MACHINE ONLY: every private key was made here" in told
    assert "give no single adapter away to 1 of the 4 members, and may to 2 together;" in told
    assert "only adapter.protection 'dp' helps" in told
    assert "one member that is away stops all" in told
    assert cli.main(["keys", "revoke", "c", "--directory", str(place)]) == 2
    assert "without 'c', 3 members cannot receive anything" in capsys.readouterr().err
    assert cli.main(["keys", "show", "--directory", str(place)]) == 0
    shown = capsys.readouterr().out
    assert cli.main(["keys", "show", str(place)]) == 0
    assert capsys.readouterr().out == shown
    (place / "clients" / "a" / "tls.pem").write_bytes(b"")
    assert cli.main(["keys", "show", str(place)]) == 2
    assert "tls.pem: not a PEM certificate" in capsys.readouterr().err
    assert "roster 1" in shown
    assert "good for 89 days" in shown


def test_founding_group_sums_says_what_their_noise_protects_against(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "federation.toml"
    config.write_text(
        FOUNDING + "[terms.adapter]\nprotection = 'distributed-dp'\n[terms.encryption]\nbackend = 'plain'\n"
        "[terms.adapter_privacy]\nsteps_per_round = 1\n"
        "[terms.group_sums]\nminimum_contributors = 4\nnoise_multiplier = 1.0\n"
    )
    out = str(tmp_path / "federation")
    assert cli.main(["keys", "init", str(config), "--out", out, "--for-demo"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "formed of 4 members or more" in told
    assert "against the server with up to 1 of the others" in told
    assert "one member that is away stops all sums" in told
    assert "single adapter" not in told


def test_keys_are_made_at_home_approved_by_fingerprint_and_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("federation.toml").write_text(FOUNDING)
    # What makes guesses dear makes this slow; it is asked for forty times.
    monkeypatch.setattr(hashlib, "scrypt", lambda data, *, salt, **_: hashlib.sha256(data).digest())
    monkeypatch.setattr(
        identity, "_stretched", lambda words, salt: hashlib.sha256(salt + words.encode()).digest()
    )

    def run(command: str, *more: str, status: int = 0) -> str:
        assert cli.main(["keys", *command.split(), *more]) == status
        told = capsys.readouterr()
        return " ".join((told.err if status else told.out).split())

    def read(told: str) -> str:
        return str(re.search(r"fingerprint ((\d{5} ?){4})", told)[1]).strip()  # type: ignore[index]

    assert "nobody is here to type the passphrase" in run("init federation.toml", status=2)
    monkeypatch.setenv("FEDMOSAIC_PASSPHRASE", "short")
    assert "has 5 characters, and 12 are the fewest" in run("init federation.toml", status=2)
    monkeypatch.setenv("FEDMOSAIC_PASSPHRASE", "correct horse battery")
    consortium = read(run("init federation.toml"))
    heard = {}
    for name in "abcd":
        heard[name] = read(run(f"request {name} --federation clinics --kit {name}"))
    heard["server"] = read(run("request --federation clinics --hosts localhost --kit server"))
    files = [f"{name}.request.json" for name in heard]
    assert "nobody is here to type the fingerprint of member 'a'" in run("approve", *files, status=2)
    wrong = ["--fingerprint", *heard.values()]
    wrong[2] = "0" * 20
    assert "what was read of member 'b' is not its fingerprint" in run("approve", *files, *wrong, status=2)
    told = run("approve", *files, "--fingerprint", *heard.values())
    assert "roster 1 is in federation/roster.json" in told
    assert "hand back federation/answers/clients/a/ to a" in told
    for name in heard:
        answer = "federation/answers/" + ("server" if name == "server" else f"clients/{name}")
        assert "the consortium" in run(f"install {answer} --kit {name}", "--consortium", "1" * 20, status=2)
        assert "installed in" in run(f"install {answer} --kit {name}", "--consortium", consortium)
    shown = run("show a")
    assert all(heard[name] in shown for name in "abcd")
    assert "the certificate here is good for 89 days" in shown
    read_end, write_end = os.pipe()
    os.write(write_end, b"correct horse battery\n")
    os.close(write_end)
    monkeypatch.delenv("FEDMOSAIC_PASSPHRASE")
    told = run(f"revoke a --passphrase-fd {read_end}", status=2)
    assert "without 'a', 3 members cannot receive anything" in told


def test_what_runs_no_model_loads_no_models_library() -> None:
    code = (
        "import sys, fedmosaic.server.__main__, fedmosaic.experiments.demo.command\n"
        "from fedmosaic import cli\n"
        "heavy = {'torch', 'transformers', 'peft', 'opacus', 'tenseal', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def fails(error: BaseException) -> int:
    def run() -> int:
        raise error

    return terminal.guarded("fedmosaic x", run)


def os_error(number: int, path: str | None = "/place/file") -> OSError:
    return OSError(number, os.strerror(number), path) if path else OSError(number, os.strerror(number))


FULL = os.strerror(errno.ENOSPC)
MACHINE = {
    "full": (os_error(errno.ENOSPC), f"/place/file: {FULL}; free some space and start again"),
    "quota": (os_error(errno.EDQUOT), "free some space and start again"),
    "read-only": (os_error(errno.EROFS), "/place/file: Read-only file system; the file system is read-only"),
    "no permission": (os_error(errno.EACCES), "give this user access to it, or give another path"),
    "no file": (os_error(errno.ENOENT), "check the path"),
    "a file in the path": (os_error(errno.ENOTDIR), "a part of the path is a file"),
    "a directory": (os_error(errno.EISDIR), "it is a directory; give a file"),
    "too long": (os_error(errno.ENAMETOOLONG), "give a shorter path"),
    "too many files": (os_error(errno.EMFILE), "ulimit -n"),
    "no file named": (os_error(errno.EIO, None), "Input/output error; the disk reports an error"),
    "without a number": (OSError("only words"), "only words"),
    "safetensors": (SafetensorError("Error while serializing: I/O error: x (os error 28)"), FULL),
    "sqlite": (sqlite3.OperationalError("database or disk is full"), "database or disk is full"),
    "no database": (sqlite3.DatabaseError("file is not a database"), "file is not a database"),
    "through SQLAlchemy": (
        sa.exc.OperationalError("INSERT", {}, sqlite3.OperationalError("disk I/O error")),
        "a database cannot be used (disk I/O error)",
    ),
}


@pytest.mark.parametrize(("error", "words"), MACHINE.values(), ids=MACHINE.keys())
def test_what_the_machine_refuses_is_one_line_with_file_and_remedy(
    error: Exception, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails(error) == terminal.FAILED
    shown = capsys.readouterr().err
    assert shown.startswith("fedmosaic x: ")
    assert words in shown
    assert shown.count("\n") == 1


def test_a_fault_of_the_program_keeps_its_trace() -> None:
    for error in (ZeroDivisionError(), SafetensorError("header"), sqlite3.ProgrammingError("closed")):
        with pytest.raises(type(error)):
            fails(error)


def test_the_trace_is_shown_when_it_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cli.main(["keys", "init", "--traceback", str(tmp_path / "none.toml")]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "no such file" in shown.splitlines()[-1]
    assert fails(ModelError("wrong")) == 2
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv(terminal.TRACEBACK_VARIABLE, "1")
    assert fails(ModelError("wrong")) == 2
    assert "Traceback" in capsys.readouterr().err


def test_the_keyboard_ends_a_command_quietly(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "fedmosaic x: stopped by the keyboard\n"


PRINTING = """
import sys
from rich.console import Console
from rich.table import Table
from fedmosaic.privacy.terminal import guarded

def run():
    if {tables}:
        table = Table(title="ε at δ")
        table.add_column("σ → ∞")
        Console().print(*[table] * {tables})
    if {lines}:
        print("ε ≤ 1 → δ = 1e-5, 名" + "\\n" * {lines})
    return 0

sys.exit(guarded("fedmosaic x", run))
"""


def printed(tables: int, lines: int, **options: object) -> "subprocess.Popen[bytes]":
    code = PRINTING.format(tables=tables, lines=lines)
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, **options)  # type: ignore[call-overload,no-any-return]  # options of each test


@pytest.mark.parametrize(("tables", "lines"), [(0, 100_000), (3000, 0)])
def test_a_reader_that_goes_away_ends_a_command_quietly(tables: int, lines: int) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with printed(tables, lines, stdout=writing) as process:
        os.close(writing)
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_without_greek_gets_words(encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    with printed(1, 1, stdout=subprocess.PIPE, env=environment) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err.decode()
    assert b"epsilon" in out
    assert b"infinity" in out
    assert b"delta = 1e-5, ?" in out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_output_is_one_line() -> None:
    with open("/dev/full", "wb") as full, printed(0, 1, stdout=full) as process:
        _, err = process.communicate()
    assert process.returncode == terminal.FAILED
    assert err.decode().startswith(f"fedmosaic x: {FULL}; free some space")
    assert err.count(b"\n") == 1
