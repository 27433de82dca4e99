"""The scenario files that come with the package are valid, and say what they need."""

from pathlib import Path

import pytest

from fedmosaic.experiments.scenario.terms import Scenario
from fedmosaic.experiments.tasks.pictures.sets import PICTURES_SIBLINGS, PICTURES_TEN
from fedmosaic.experiments.tasks.texts.sets import TEXT_SETS
from fedmosaic.privacy.configuration import read_configuration
from fedmosaic.protos.errors import ConfigurationError

SCENARIOS = Path(__file__).parents[3] / "experiments" / "scenarios"


@pytest.mark.parametrize("name", ["text-pairs", "text-siblings", "text-siblings-many", "text-ten"])
def test_scenarios_name_the_files_that_the_command_writes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = read_configuration(SCENARIOS / f"{name}.toml", Scenario)
    monkeypatch.setenv("FEDMOSAIC_TASKS", str(tmp_path))
    monkeypatch.setenv("FEDMOSAIC_MODELS", str(tmp_path))
    resolved = scenario.resolved(SCENARIOS)
    named = {str(task.train.relative_to(tmp_path / name)) for c in resolved.clients for task in c.task_list}
    tasks = [(client, task) for client, content in TEXT_SETS[name].items() for task in content]
    assert named == {f"{client}/{task}.train.jsonl" for client, task in tasks}
    assert [client.id for client in scenario.clients] == list(TEXT_SETS[name])


@pytest.mark.parametrize("name", ["vision-four", "vision-ten"])
def test_picture_scenarios_name_the_files_and_projectors_that_the_commands_write(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = read_configuration(SCENARIOS / f"{name}.toml", Scenario)
    monkeypatch.setenv("FEDMOSAIC_TASKS", str(tmp_path))
    monkeypatch.setenv("FEDMOSAIC_MODELS", str(tmp_path / "models"))
    resolved = scenario.resolved(SCENARIOS)
    assert resolved.pictures == tmp_path / "pictures-ten"
    for client in resolved.clients:
        assert client.projector == tmp_path / "projectors" / Path(client.family)
        for task in client.task_list:
            assert task.name in PICTURES_TEN[client.id]
            assert task.train == tmp_path / "pictures-ten" / client.id / f"{task.name}.train.jsonl"
    if name == "vision-ten":
        named = {client.id: [task.name for task in client.task_list] for client in scenario.clients}
        assert named == {client: list(tasks) for client, tasks in PICTURES_TEN.items()}


@pytest.mark.parametrize("kind", ["", "-depths", "-families"])
def test_picture_siblings_name_the_files_that_the_commands_write(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = read_configuration(SCENARIOS / f"vision-siblings{kind}.toml", Scenario)
    monkeypatch.setenv("FEDMOSAIC_TASKS", str(tmp_path))
    monkeypatch.setenv("FEDMOSAIC_MODELS", str(tmp_path / "models"))
    resolved = scenario.resolved(SCENARIOS)
    assert resolved.pictures == tmp_path / "pictures-siblings"
    named = {client.id: [task.name for task in client.task_list] for client in resolved.clients}
    assert named == {client: list(tasks) for client, tasks in PICTURES_SIBLINGS.items()}
    for client in resolved.clients:
        assert client.projector == tmp_path / "projectors" / Path(client.family)
        for task in client.task_list:
            assert task.test == tmp_path / "pictures-siblings" / client.id / f"{task.name}.test.jsonl"
    families = {client.id: client.family for client in resolved.clients}
    if kind == "-depths":
        assert all(len({families[f"{domain}-{x}"] for x in "abc"}) == 3 for domain in ("letters", "clothes"))
    if kind == "-families":
        assert all(client.model.aligned is not None for client in resolved.clients)
        assert set(families.values()) == {"stories-260k", "stories-15m"}


def test_a_missing_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDMOSAIC_TASKS", raising=False)
    monkeypatch.delenv("FEDMOSAIC_MODELS", raising=False)
    scenario = read_configuration(SCENARIOS / "text-pairs.toml", Scenario)
    with pytest.raises(ConfigurationError, match="FEDMOSAIC_"):
        scenario.resolved(SCENARIOS)


def test_scored_rounds_hold_the_last() -> None:
    scenario = read_configuration(SCENARIOS / "text-ten.toml", Scenario)
    assert scenario.rounds_to_score() == (5, 10, 15, 20)
    odd = scenario.model_copy(update={"evaluate_every": 7})
    assert odd.rounds_to_score() == (7, 14, 20)
