"""DRAKE's layout: markers and pictures match, options are found, nothing leaves the folder."""

import io
import json
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from fedmosaic.client.model.examples import Example
from fedmosaic.client.vision.words import images_in
from fedmosaic.experiments.runs import command as runner
from fedmosaic.experiments.scenario.participants import read_evaluations
from fedmosaic.experiments.scenario.terms import Scenario
from fedmosaic.experiments.tasks import __main__ as commands
from fedmosaic.experiments.tasks.drake import files as drake_files
from fedmosaic.experiments.tasks.drake.files import with_choices
from fedmosaic.experiments.tasks.drake.read import (
    DrakeClient,
    DrakeTask,
    drake_scenario,
    listed_choices,
    read_dataset,
)
from fedmosaic.privacy.configuration import read_configuration
from fedmosaic.protos.errors import ConfigurationError

SCENARIOS = Path(__file__).parents[3] / "experiments" / "scenarios"


def _write(root: Path, records: Any) -> Path:
    place = root / "NLVR2" / "train"
    place.mkdir(parents=True, exist_ok=True)
    (place / "dataset-1.json").write_text(json.dumps(records))
    return root


def _record(question: str, answer: str, image: Any = None, identity: str = "a") -> dict[str, Any]:
    record: dict[str, Any] = {
        "id": identity,
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
    }
    return record if image is None else {**record, "image": image}


def test_several_pictures_and_a_choice_list(tmp_path: Path) -> None:
    question = "Image A: <image>, Image B: <image> Same? Choice list:[Yes, No]. Your answer is:"
    (example,) = read_dataset(
        _write(tmp_path, [_record(question, "No", ["x/1.jpg", "x/2.jpg"])]), "NLVR2", 1, "train"
    )
    assert example.images == (Path("x/1.jpg"), Path("x/2.jpg"))
    assert example.choices == ("Yes", "No")
    shown = example.example()
    assert shown.prompt == question.replace("<image>", "<image:x/1.jpg>", 1).replace(
        "<image>", "<image:x/2.jpg>"
    )
    assert images_in(shown.prompt) == ["x/1.jpg", "x/2.jpg"]


def test_a_record_without_pictures_is_an_ordinary_example(tmp_path: Path) -> None:
    examples = read_dataset(_write(tmp_path, [_record("2 + 2?", " 4 ")]), "NLVR2", 1, "train")
    example = examples[0].example()
    assert (example.prompt, example.answer, example.choices) == ("2 + 2?", "4", ())


@pytest.mark.parametrize(
    "record",
    [
        _record("<image> what?", "x"),
        _record("what?", "x", "a.jpg"),
        _record("<image> what?", "x", "/etc/passwd"),
        _record("<image> what?", "x", "../secret.jpg"),
        _record("<image>?", "", "a.jpg"),
        _record("<image>?", "x", 3),
        {"id": "a", "conversations": [{"from": "gpt", "value": "q"}, {"from": "human", "value": "a"}]},
        {"id": "a"},
        "text",
    ],
)
def test_malformed_records_are_refused_by_place(tmp_path: Path, record: Any) -> None:
    with pytest.raises(ConfigurationError, match="record 1"):
        read_dataset(_write(tmp_path, [record]), "NLVR2", 1, "train")


def test_missing_empty_and_repeated_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="download"):
        read_dataset(tmp_path, "NLVR2", 1, "train")
    with pytest.raises(ConfigurationError, match="no list"):
        read_dataset(_write(tmp_path, []), "NLVR2", 1, "train")
    with pytest.raises(ConfigurationError, match="twice"):
        read_dataset(_write(tmp_path, [_record("q?", "x"), _record("r?", "x")]), "NLVR2", 1, "train")


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("q Choice list:[red, light blue]. A:", "light blue", ("red", "light blue")),
        ("q Choice List: [a, b | c, d]", "a, b", ("a, b", "c, d")),
        ("q\nA. red\nB. blue", "B", ("A", "B")),
        ("q\nA. red\nB. blue", "blue", ("red", "blue")),
        ("q Choice list:[red, blue]", "green", ()),
        ("q", "red", ()),
    ],
)
def test_listed_choices(prompt: str, answer: str, expected: tuple[str, ...]) -> None:
    assert listed_choices(prompt, answer) == expected


def test_the_scenarios_have_forty_tasks_and_the_published_mixes() -> None:
    names = tomllib.loads((SCENARIOS / "drake.toml").read_text())["scenarios"]
    assert len(names) == 12
    for name in names:
        clients = drake_scenario(name)
        tasks = [task for client in clients for task in client.tasks]
        assert len({task.name for task in tasks}) == len(tasks) == 40
        assert [task.name for task in tasks if task.metric == "f1"] == ["iconqa-2", "iconqa-3"]
    mix = Counter(client.model for client in drake_scenario("DRAKE_hetero_llava_llama_1B_3B_8B"))
    assert sorted(mix.values()) == [2, 3, 5]
    assert drake_scenario("DRAKE_homo_llava_qwen_3B")[2].tasks[0].dataset == "SEED-Bench-2"
    with pytest.raises(ConfigurationError, match="known"):
        drake_scenario("DRAKE")


def test_questions_without_choices_take_the_answers_of_their_task() -> None:
    def ask(number: int, answer: str, choices: tuple[str, ...] = ()) -> Example:
        return Example(str(number), "q", answer, choices)

    task = DrakeTask("A", 0, "accuracy")
    asked = [ask(0, "up"), ask(1, "down"), ask(2, "left", ("left", "right"))]
    mixed = with_choices(task, asked, {"up", "down", "left"})
    assert [example.choices for example in mixed] == [("down", "left", "up")] * 2 + [("left", "right")]
    with pytest.raises(ConfigurationError, match="score it by F1"):
        with_choices(task, [ask(0, "open 0")], {f"open {number}" for number in range(30)})
    with pytest.raises(ConfigurationError, match="1 different"):
        with_choices(task, [ask(0, "up")], {"up"})
    free = with_choices(DrakeTask("A", 0, "f1"), [ask(0, "up", ("up", "down"))], {"up"})
    assert free[0].choices == ()


def test_a_made_up_drake_runs_with_a_tower(
    tmp_path: Path, llava_folder: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "drake"
    clients = (
        DrakeClient(0, "x/one", (DrakeTask("NLVR2", 0, "accuracy"), DrakeTask("iconqa", 2, "f1"))),
        DrakeClient(1, "x/two", (DrakeTask("VSR", 0, "accuracy"), DrakeTask("NLVR2", 1, "accuracy"))),
    )
    (data / "pictures").mkdir(parents=True)
    for task in (task for client in clients for task in client.tasks):
        for part, count in (("train", 24), ("test", 4)):
            records = []
            for n in range(count):
                paths = [f"pictures/{task.name}-{part}-{n}-{side}.png" for side in "ab"]
                for path in paths:
                    Image.new("RGB", (20, 30), (10 * n, 90, 200)).save(data / path)
                question = "Image A: <image> Image B: <image> w1 w2 Choice list:[red, blue]"
                records.append(_record(question, ("red", "blue")[n % 2], paths, f"{part}{n}"))
            place = data / task.dataset / part
            place.mkdir(parents=True, exist_ok=True)
            (place / f"dataset-{task.subset}.json").write_text(json.dumps(records))
    monkeypatch.setattr(drake_files, "drake_scenario", lambda name: clients)
    out = tmp_path / "out"
    arguments = [
        "drake",
        "--data",
        str(data),
        "--out",
        str(out),
        "--public",
        str(tiny_folder / "public.jsonl"),
    ]
    assert commands.main([*arguments, "--scenario", "Made_up", "--model", str(llava_folder)]) == 0
    scenario = read_configuration(out / "Made_up.toml", Scenario)
    assert [task.metric for task in scenario.clients[0].task_list] == ["accuracy", "f1"]
    content = scenario.model_dump(mode="json") | {
        "schedule": {"rounds": 1, "quorum": 2},
        "policy": {"minimum_contributors": 1, "weight_cap": 1.0, "squares_cap": 1.0},
        "method": "fedavg",
    }
    content["adapter"] |= {"rank": 2, "blocks": 2}
    content["training"] |= {"steps": 2, "max_length": 40}
    small = Scenario.model_validate(content)
    directory = runner.run_here(small, out, tmp_path / "runs", Console(file=io.StringIO()))
    scores = read_evaluations(directory / "federation" / "clients" / "client-0" / "state")[1]
    assert set(scores) == {"client-0/NLVR2-0", "client-0/iconqa-2", "client-1/VSR-0", "client-1/NLVR2-1"}
