"""The text benchmark: fixed splits, no text in two places, ten domains of four tasks."""

import json
from collections import Counter
from pathlib import Path

import pytest

from fedmosaic.client.model.examples import read_examples
from fedmosaic.experiments.tasks import __main__ as command
from fedmosaic.experiments.tasks.labelled import normalise
from fedmosaic.experiments.tasks.texts.sets import (
    TEXT_DESKS,
    TEXT_SETS,
    TEXT_SIBLINGS,
    TEXT_TEN,
    split_rows,
    write_set,
)
from fedmosaic.experiments.tasks.texts.sources import Row
from fedmosaic.protos.errors import ConfigurationError

DATA = Path(__file__).parents[4].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the data sets of the benchmark are not here")


def _rows(count: int, groups: int) -> list[Row]:
    return [
        Row(f"text {i}?", ("yes", "no")[i % 2], ("yes", "no"), f"passage {i % groups}") for i in range(count)
    ]


def test_the_benchmark_has_ten_domains_of_four_tasks() -> None:
    assert [len(tasks) for tasks in TEXT_TEN.values()] == [4] * 10
    assert set(TEXT_SETS) == {
        "text-ten",
        "text-pairs",
        "text-siblings",
        "text-siblings-many",
        "text-desks",
        "text-desks-one-form",
        "glue",
    }


def test_siblings_share_a_domain_in_equal_parts() -> None:
    assert list(TEXT_SETS["text-siblings"]) == [
        f"{name}-{part}" for name in ("bank", "travel") for part in "abc"
    ]
    many = TEXT_SETS["text-siblings-many"]
    assert [*many][:2] + [*many][-1:] == ["bank-a", "bank-b", "travel-l"]
    assert [len(tasks) for tasks in many.values()] == [2] * 24


def test_a_group_is_never_divided_and_no_prompt_appears_twice() -> None:
    rows = _rows(400, 40)
    group_of = {normalise(row.prompt): row.group for row in rows}
    train, test = split_rows("t", [*rows, *rows], 1000, 1000, set())
    assert len(train) + len(test) == 400
    groups = [{group_of[normalise(example.prompt)] for example in part} for part in (train, test)]
    assert not groups[0] & groups[1]
    assert groups[0]
    assert groups[1]


def test_splits_depend_on_nothing_but_the_rows() -> None:
    rows = _rows(300, 300)
    first = split_rows("t", rows, 50, 20, set())
    assert split_rows("t", rows[::-1], 50, 20, set()) == first
    without = [row for row in rows if row.prompt != first[0][0].prompt]
    train, test = split_rows("t", without, 50, 20, set())
    assert test == first[1]
    assert train[:49] == list(first[0][1:])


def test_validation_examples_are_no_test_examples_and_training_stays_the_same() -> None:
    rows = _rows(400, 200)
    group = {row.prompt: row.group for row in rows}
    train, test = split_rows("t", rows, 50, 1000, set())
    same, validation = split_rows("t", rows, 50, 60, set(), tuning=True)
    assert same == train
    # As in the test: what a group has in common is not known from training.
    assert not {group[e.prompt] for e in train} & {group[e.prompt] for e in validation}
    assert len(validation) == 60
    prompts = [{example.prompt for example in part} for part in (train, validation, test)]
    assert not prompts[0] & prompts[1]
    assert not prompts[1] & prompts[2]


@needs_data
def test_siblings_have_the_same_tasks_and_different_rows() -> None:
    assert [len(tasks) for tasks in TEXT_SIBLINGS.values()] == [2] * 6
    shares = [{r.prompt for r in TEXT_SIBLINGS[f"bank-{s}"]["bank-1"].read(DATA)} for s in "abc"]
    assert all(len(part) > 150 for part in shares)
    assert len(set.union(*shares)) == sum(map(len, shares))


@needs_data
def test_houses_answer_the_same_kinds_of_request_differently() -> None:
    houses = [
        [row for part in "abc" for row in TEXT_DESKS[f"{house}-{part}"][f"{house}-1"].read(DATA)]
        for house in ("east", "west")
    ]
    assert len({row.prompt for rows in houses for row in rows}) == sum(map(len, houses)) == 5 * 150
    by_person = [Counter(row.answer for row in rows) for rows in houses]
    assert set(by_person[0]) == set(by_person[1]) == {"Tom", "Lily", "Ben", "Sue", "Max"}
    freezing = [{row.answer for row in rows if "freeze my account" in row.prompt} for rows in houses]
    assert freezing == [{"Tom"}, {"Ben"}]


def test_what_another_task_uses_is_left_out() -> None:
    seen: set[str] = set()
    train, test = split_rows("a", _rows(100, 100), 1000, 1000, seen)
    assert len(train) + len(test) == 100
    assert split_rows("b", _rows(100, 100), 1000, 1000, seen) == ([], [])


def test_missing_data_and_unknown_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="missing"):
        write_set("text-pairs", tmp_path, tmp_path / "out", 10, 10, 10)
    with pytest.raises(ConfigurationError, match="known"):
        write_set("text-eleven", tmp_path, tmp_path / "out", 10, 10, 10)


@needs_data
@pytest.mark.parametrize("name", ["text-ten", "glue"])
def test_no_test_prompt_is_trained_on_by_anybody(tmp_path: Path, name: str) -> None:
    table = write_set(name, DATA, tmp_path, 60, 20, 50)
    train = [e for path in tmp_path.rglob("*.train.jsonl") for e in read_examples(path)]
    test = [e for path in tmp_path.rglob("*.test.jsonl") for e in read_examples(path)]
    trained = {normalise(example.prompt) for example in train}
    assert len(trained) == len(train)
    assert not trained & {normalise(example.prompt) for example in test}
    assert all(row["train"] >= 50 and row["test"] == 20 for row in table.values())
    assert all(row["licence"] for row in table.values())
    assert len(read_examples(tmp_path / "public.jsonl")) == 50
    assert json.loads((tmp_path / "table.json").read_text()) == table


def test_a_dirichlet_deal_loses_nothing(tmp_path: Path) -> None:
    for name, count in (("train", 200), ("test", 60)):
        lines = [
            json.dumps(
                {"id": f"{name}{i}", "prompt": f"{name} {i}", "answer": "ab"[i % 2], "choices": ["a", "b"]}
            )
            for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    arguments = [
        "dirichlet",
        "--train",
        str(tmp_path / "train.jsonl"),
        "--test",
        str(tmp_path / "test.jsonl"),
    ]
    assert command.main([*arguments, "--out", str(out), "--clients", "4", "--alpha", "1.0"]) == 0
    for name, count in (("train", 200), ("test", 60)):
        ids = [e.id for path in out.glob(f"*.{name}.jsonl") for e in read_examples(path)]
        assert sorted(ids) == sorted(f"{name}{i}" for i in range(count))
