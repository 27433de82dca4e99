"""The README is a program: its commands and its files are taken from the page and tried.

What the other pages name, commands, files and tests, has to be there as well.
"""

import argparse
import ast
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tyro

from end_to_end.ports import free_port
from fedmosaic import cli
from fedmosaic.client.settings import ClientSettings
from fedmosaic.client.witness import WitnessSettings
from fedmosaic.privacy.configuration import validate
from fedmosaic.privacy.federation.kits import FederationConfig
from tiny import save_tiny_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {page.name: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))}
PAGES = {"README.md": README, **DOCS}
GUIDE = README + DOCS["operation.md"]
"""The pages by which somebody works."""
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
FILES = [text for language, text in BLOCKS if language == "toml"]
PROGRAMS = [text for language, text in BLOCKS if language == "python"]
COMMANDS: list[str] = [
    line.partition("#")[0].strip()
    for language, text in BLOCKS
    if not language
    for line in text.splitlines()
    if line.startswith(("fedmosaic ", "make "))
]
INLINE = sorted({found for found in re.findall(r"`(fedmosaic [a-z][^`]*)`", GUIDE) if "…" not in found})
STUDIES = sorted(
    {
        command.partition("#")[0].strip()
        for name, text in DOCS.items()
        if name.startswith(("experiments", "scenarios"))
        for command in re.findall(
            r"^ {4}(?:[A-Z_]+=\S+ )?(fedmosaic \w+ [^ #].*)$", text.replace("\\\n", ""), re.MULTILINE
        )
    }
)
"""Commands by which the tables of experiments are made."""
MEMBERS = [member["id"] for member in tomllib.loads(FILES[0])["members"]]
"""All of them start: the key agreement waits ten minutes for one who is away."""
ROOMS = (
    *("alignment", "benchmarks", "client", "experiments", "integrations"),
    *("privacy", "protos", "server", "tests"),
)
PROFILE = {
    "probe": "tiny",
    "probe_sha256": "0" * 64,
    "reduction": {"hidden_size": 8, "intermediate_size": 16, "projection_dimensions": 32},
}


class ParsedError(BaseException):
    """A command line was understood; its work is not for this test."""


@pytest.fixture
def parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop_after(parse: Callable[..., Any]) -> Callable[..., Any]:
        def parse_and_stop(*arguments: Any, **options: Any) -> Any:
            parse(*arguments, **options)
            raise ParsedError

        return parse_and_stop

    monkeypatch.setattr(tyro, "cli", stop_after(tyro.cli))
    command = tyro.extras.subcommand_cli_from_dict
    monkeypatch.setattr(tyro.extras, "subcommand_cli_from_dict", stop_after(command))
    parse_args = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after(parse_args))


def test_the_page_has_what_the_other_tests_read() -> None:
    assert len(FILES) == 3
    assert len(COMMANDS) >= 8
    assert len(INLINE) >= 8
    assert len(PROGRAMS) == 1


def test_the_files_of_the_page_are_valid() -> None:
    founding = tomllib.loads(FILES[0])
    founding["terms"]["profile"] = PROFILE
    validate(founding, FederationConfig, "federation.toml")
    validate(tomllib.loads(FILES[1]), ClientSettings, "client.toml")
    commented = re.findall(r"^# (\w+ = \S+) ", FILES[1], re.MULTILINE)
    assert commented, "settings that are shown as comments"
    for line in commented:
        validate(tomllib.loads(FILES[1].replace(f"# {line}", line)), ClientSettings, "client.toml")
    validate(tomllib.loads(FILES[2]), WitnessSettings, "witness.toml")


@pytest.mark.parametrize("command", sorted({*COMMANDS, *STUDIES}))
@pytest.mark.usefixtures("parsing")
def test_every_command_of_the_page_is_understood(command: str) -> None:
    program, *words = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{re.escape(words[0])}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
        return
    with pytest.raises(ParsedError):
        cli.main(words)


@pytest.mark.parametrize("command", INLINE)
@pytest.mark.usefixtures("parsing")
def test_every_command_in_the_text_is_understood(command: str) -> None:
    words = shlex.split(command)[1:]
    with pytest.raises((ParsedError, SystemExit)) as ended:
        cli.main(words)
    if isinstance(ended.value, SystemExit):
        # Named without what it needs: then it has to explain itself, under this very name.
        assert not any(word.startswith("-") for word in words), command
        with pytest.raises((ParsedError, SystemExit)) as explained:
            cli.main([*words, "--help"])
        assert isinstance(explained.value, SystemExit)
        assert explained.value.code == 0, command


@pytest.mark.parametrize("page", PAGES)
def test_everything_that_a_page_names_is_there(page: str) -> None:
    text, folder = PAGES[page], ROOT / ("" if page == "README.md" else "docs")
    links = re.findall(r"\]\(((?!http)[^)#]+)(?:#[^)]*)?\)", text)
    assert [target for target in links if not (folder / target).exists()] == []
    files = re.findall(rf"`((?:{'|'.join(ROOMS)})/[\w./-]+)`", text)
    assert [file for file in files if not (ROOT / file).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_a_page_names_is_there(page: str) -> None:
    missing, module = [], ""
    for named, test in re.findall(r"`((?:[\w/]*/)?test_\w+\.py)?(?:::(test_\w+))?`", PAGES[page]):
        module = named or module
        if test and (not (ROOT / module).is_file() or test not in _tests_of(module)):
            missing.append(f"{module}::{test}")
    assert missing == []


@functools.cache
def _tests_of(module: str) -> set[str]:
    parsed = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    return {
        node.name for node in ast.walk(parsed) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def fedmosaic(command: str, place: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "fedmosaic.cli", *shlex.split(command)[1:]]
    return subprocess.run(words, cwd=place, capture_output=True, text=True, check=False, **options)


def command_with(start: str) -> str:
    return next(command for command in COMMANDS if command.startswith(start))


def write_lines(path: Path, name: str, count: int, *, public: bool = False, shift: int = 0) -> None:
    lines = []
    for number in range(count):
        record: dict[str, Any] = {
            "prompt": f"w{number % 60} w{(number * 7 + shift) % 60}",
            "answer": ("yes", "no")[number % 2],
        }
        if not public:
            record |= {"id": f"{name}-{number}", "choices": ["yes", "no"]}
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines) + "\n")


PASSPHRASE = {"FEDMOSAIC_PASSPHRASE": "nine crooked teapots"}


def found(place: Path) -> None:
    """Step 2 of the page: everybody makes keys at home, the consortium signs, everybody installs."""

    def run(command: str, where: Path, *more: str) -> str:
        where.mkdir(exist_ok=True)
        done = fedmosaic(shlex.join([*shlex.split(command), *more]), where, env=os.environ | PASSPHRASE)
        assert done.returncode == 0, (command, done.stderr)
        told = re.findall(r"fingerprint +((?:\d{5} ?){4})", done.stdout)
        return told[0] if told else ""

    consortium = run(command_with("fedmosaic keys init"), place)
    asked = command_with("fedmosaic keys request north")
    kits = {name: (place / name, asked.replace("north", name)) for name in MEMBERS}
    server = command_with("fedmosaic keys request --federation").replace("fl.example.org", "localhost")
    kits["server"] = (place, server)
    heard = {name: run(command, where) for name, (where, command) in kits.items()}
    files = [str(where / f"{name}.request.json") for name, (where, _) in kits.items()]
    run("fedmosaic keys approve", place, *files, "--fingerprint", *heard.values())
    for name, (where, _) in kits.items():
        answer = place / "federation/answers" / ("server" if name == "server" else f"clients/{name}")
        shutil.copytree(answer, where / "answer", dirs_exist_ok=True)
        kit = ["--kit", "server"] if name == "server" else []
        run(command_with("fedmosaic keys install"), where, "--consortium", consortium, *kit)


@pytest.mark.slow
def test_the_steps_of_the_page_lead_to_a_report(tmp_path: Path) -> None:
    model, port = tmp_path / "model", free_port()
    # Wide enough for the default task profile.
    sizes: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4}
    special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
    vocabulary = ["yes", "no", *(f"w{i}" for i in range(60))]
    save_tiny_model(model, vocabulary, special, bos_token_id=1, max_position_embeddings=512, **sizes)
    write_lines(tmp_path / "public.jsonl", "public", 300, public=True)
    # Step 1.
    probe = command_with("fedmosaic probe").replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(model))
    fitted = fedmosaic(probe, tmp_path)
    assert fitted.returncode == 0, fitted.stderr
    # Step 2.
    founding = FILES[0]
    for old, new in (
        ('"fl.example.org"', '"localhost", "127.0.0.1"'),
        ("port = 7443", f"port = {port}"),
        ("rounds = 20", "rounds = 2"),
        ("# [terms.profile] … as printed by `fedmosaic probe`\n", fitted.stdout),
    ):
        assert old in founding, old
        founding = founding.replace(old, new)
    (tmp_path / "federation.toml").write_text(founding, encoding="utf-8")
    found(tmp_path)
    # Step 3.
    words = [sys.executable, "-m", "fedmosaic.cli"]
    server = subprocess.Popen(
        [*words, *shlex.split(next(c for c in INLINE if c.startswith("fedmosaic server")))[1:]],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=(tmp_path / "server.log").open("wb"),
    )
    clients: list[subprocess.Popen[bytes]] = []
    try:
        # Step 4.
        for name in MEMBERS:
            place = tmp_path / name
            settings = FILES[1]
            for old, new in (
                ("fl.example.org:7443", f"localhost:{port}"),
                ("Qwen/Qwen2.5-0.5B-Instruct", str(model)),
                ("HuggingFaceTB/SmolLM2-135M-Instruct", str(model)),
                ("steps = 100", "steps = 2"),
            ):
                assert old in settings, old
                settings = settings.replace(old, new)
            (place / "client.toml").write_text(settings, encoding="utf-8")
            write_lines(place / "train.jsonl", name, 60)
            write_lines(place / "test.jsonl", f"{name}-test", 8, shift=1)  # none of the training prompts
            clients.append(
                subprocess.Popen(
                    [*words, *shlex.split(command_with("fedmosaic client"))[1:]],
                    cwd=place,
                    stdout=subprocess.DEVNULL,
                    stderr=(place / "log").open("wb"),
                    # A proxy of the surroundings stands in nobody's way to this machine.
                    env={**os.environ, "http_proxy": "http://127.0.0.1:1", "OMP_NUM_THREADS": "1"},
                )
            )
        for name, client in zip(MEMBERS, clients, strict=True):
            assert client.wait(600) == 0, (tmp_path / name / "log").read_text()
    finally:
        for process in (*clients, server):
            if process.poll() is None:
                process.terminate()
                process.wait(30)
    log = (tmp_path / "north" / "log").read_text()
    assert "Warning" not in log
    assert not re.search(r"round \d+: round \d+", log)
    # Step 5.
    reports = re.findall(r"`(fedmosaic report [a-z/]+)`", README.partition("**5.")[2])[:2]
    for command, place in zip(reports, (tmp_path / "north", tmp_path), strict=True):
        shown = fedmosaic(command, place)
        assert shown.returncode == 0, shown.stderr
        assert "Privacy statement" in shown.stdout
    shown = fedmosaic(f"{reports[0]} --at-epsilon 1", tmp_path / "north")
    assert shown.returncode == 0, shown.stderr
    # "Use the result", at the last of the two rounds that were run.
    assert "round-0020" in PROGRAMS[0]
    program = PROGRAMS[0].replace("round-0020", "round-0002")
    used = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "north", capture_output=True, text=True, check=False
    )
    assert used.returncode == 0, used.stderr
    # "Keys": a member leaves.
    for command in ("keys show", "keys show north/kit", "keys revoke east"):
        done = fedmosaic(f"fedmosaic {command}", tmp_path, env=os.environ | PASSPHRASE)
        assert done.returncode == 0, (command, done.stderr)
