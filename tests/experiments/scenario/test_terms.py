"""The scenario files that come with the package are valid, and name what the commands write."""

from pathlib import Path
from typing import Any

import pytest

from fedmosaic.experiments.scenario.terms import Scenario
from fedmosaic.experiments.tasks.sets import SETS
from fedmosaic.privacy.configuration import read_configuration
from fedmosaic.privacy.federation.kits import MemberEntry, lonely
from fedmosaic.protos.errors import ConfigurationError

SCENARIOS = Path(__file__).parents[3] / "experiments" / "scenarios"


@pytest.mark.parametrize("name", sorted(path.stem for path in SCENARIOS.glob("*.toml")))
def test_scenarios_name_the_files_that_the_commands_write(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDMOSAIC_TASKS", str(tmp_path))
    monkeypatch.setenv("FEDMOSAIC_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("FEDMOSAIC_MODEL", str(tmp_path / "models"))
    path = SCENARIOS / f"{name}.toml"
    scenario = read_configuration(path, Scenario).resolved(SCENARIOS)
    files = [file for c in scenario.clients for task in c.task_list for file in (task.train, task.test)]
    (folder,) = {file.relative_to(tmp_path).parts[0] for file in files}
    content = path.read_text(encoding="utf-8")
    written = next(n for n in sorted(SETS, key=len, reverse=True) if f"fedmosaic tasks write {n} " in content)
    assert f"--out $FEDMOSAIC_TASKS/{folder}" in content
    known = {f"{client}/{task}" for client, tasks in SETS[written].items() for task in tasks}
    named = {file.relative_to(tmp_path / folder).as_posix().split(".")[0] for file in files}
    assert named <= known
    if name not in ("attack-target", "text-siblings-sums", "text-two-models"):
        assert named == known
        assert [client.id for client in scenario.clients] == list(SETS[written])
    if scenario.images is not None:
        assert scenario.images == tmp_path / folder
        assert all(c.projector == tmp_path / "projectors" / c.family for c in scenario.clients)
    families = {client.id: client.family for client in scenario.clients}
    members = [MemberEntry(id=client, family=family) for client, family in families.items()]
    assert lonely(members, scenario) == ""
    if "-depths" in name:
        domains = {client.rpartition("-")[0] for client in families}
        assert all(len({families[f"{domain}-{x}"] for x in "abc"}) == 3 for domain in domains)
    if "-families" in name:
        assert all(client.model.aligned is not None for client in scenario.clients)
        assert set(families.values()) == {"stories-260k", "stories-15m"}


def test_a_missing_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDMOSAIC_TASKS", raising=False)
    monkeypatch.delenv("FEDMOSAIC_MODELS", raising=False)
    scenario = read_configuration(SCENARIOS / "text-pairs.toml", Scenario)
    with pytest.raises(ConfigurationError, match="FEDMOSAIC_"):
        scenario.resolved(SCENARIOS)


def test_scored_rounds_hold_the_last() -> None:
    scenario = read_configuration(SCENARIOS / "text-siblings.toml", Scenario)
    assert (scenario.evaluate_every, scenario.schedule.rounds) == (3, 5)
    assert scenario.rounds_to_score() == (3, 5)


def test_a_key_of_before_is_refused_with_its_new_name(tmp_path: Path) -> None:
    text = (SCENARIOS / "vision-siblings.toml").read_text(encoding="utf-8")
    (tmp_path / "old.toml").write_text(text.replace("\nimages = ", "\npictures = "), encoding="utf-8")
    with pytest.raises(ConfigurationError, match="'pictures' is now called 'images'; rename it"):
        read_configuration(tmp_path / "old.toml", Scenario)


def test_a_run_of_before_is_read_unless_it_had_unseen_clients(tiny_scenario: Any) -> None:
    content = tiny_scenario().model_dump(mode="json")
    assert Scenario.model_validate(content | {"unseen": [], "adaptation_steps": [0, 25]}) == tiny_scenario()
    with pytest.raises(ValueError, match="unseen clients are no longer part"):
        Scenario.model_validate(content | {"unseen": content["clients"][:1]})
    for asked in ({"stream": "dynamic"}, {"equal_compute": True}):
        with pytest.raises(ValueError, match="the noise is planned for one set of examples"):
            tiny_scenario(**asked, adapter={"rank": 2, "blocks": 2, "protection": "dp"})
    twice = [*content["clients"], content["clients"][0]]
    with pytest.raises(ValueError, match="ids must differ"):
        Scenario.model_validate(content | {"clients": twice})
