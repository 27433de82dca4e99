"""What is handed out with the package: the list of components, and the files for services."""

import configparser
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedmosaic import cli

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMPONENTS = {
    canonicalize_name(part["name"]): part["version"].partition("+")[0]
    for part in json.loads((ROOT / "deploy" / "sbom.cdx.json").read_text(encoding="utf-8"))["components"]
}
CONSTRAINTS = {
    canonicalize_name(name): version
    for name, version in (
        line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    )
}


def test_the_list_of_components_has_every_dependency() -> None:
    needed = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}

    assert needed <= set(COMPONENTS)


def test_the_list_of_components_has_the_versions_that_are_tested() -> None:
    assert COMPONENTS == {name: CONSTRAINTS.get(name) for name in COMPONENTS}


def test_compose_runs_commands_that_there_are() -> None:
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"))["services"]

    for name in ("server", "dashboard", "client"):
        assert services[name]["command"][0] in cli.COMMANDS


@pytest.mark.parametrize("unit", sorted((ROOT / "deploy").glob("*.service")), ids=lambda path: path.name)
def test_units_run_commands_that_there_are_and_do_not_repeat_what_wants_a_person(unit: Path) -> None:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # keys of units have capitals
    parser.read(unit, encoding="utf-8")
    service = parser["Service"]

    assert re.match(r"/\S+/fedmosaic (\w+) ", service["ExecStart"])[1] in cli.COMMANDS  # type: ignore[index]
    # The dashboard is started beside a server that may have made nothing to look at yet.
    wants_a_person = [] if "dashboard" in unit.name else ["2", "3"]
    assert service.get("RestartPreventExitStatus", "").split() == wants_a_person
