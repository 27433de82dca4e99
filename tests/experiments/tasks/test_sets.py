"""Sets of tasks: fixed splits, nothing in two places, images that fit their questions, blind baselines."""

import gzip
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from fedmosaic.client.model.examples import Example, read_examples
from fedmosaic.client.vision import features, projector
from fedmosaic.client.vision.inputs import images_in, marker
from fedmosaic.experiments.tasks import command as commands
from fedmosaic.experiments.tasks import images, texts
from fedmosaic.experiments.tasks.labelled import normalise
from fedmosaic.experiments.tasks.rows import Row, in_test
from fedmosaic.experiments.tasks.sets import SETS, Size, question_only, split_rows, write_set
from fedmosaic.protos.errors import ConfigurationError
from tiny import Colours

_DATA = Path(__file__).parents[3].parent / "shared" / "data"
_needs_data = pytest.mark.skipif(not _DATA.is_dir(), reason="the data sets are not on this machine")
_ALL = Size(1000, 1000, 0)


def _rows(count: int, groups: int) -> list[Row]:
    return [
        Row(f"text {i}?", ("yes", "no")[i % 2], ("yes", "no"), f"passage {i % groups}") for i in range(count)
    ]


def _prompts(examples: list[Example]) -> set[str]:
    return {example.prompt for example in examples}


def test_a_group_is_never_divided_and_no_prompt_appears_twice() -> None:
    rows = _rows(400, 40)
    group_of = {row.prompt: row.group for row in rows}
    seen: set[str] = set()
    train, test = split_rows("t", [*rows, *rows], _ALL, seen)
    assert len(train) + len(test) == 400
    groups = [{group_of[prompt] for prompt in _prompts(part)} for part in (train, test)]
    assert groups[0]
    assert groups[1] == {group for group in group_of.values() if in_test(group)}
    assert not groups[0] & groups[1]
    assert split_rows("other", rows, _ALL, seen) == ([], []), "another task uses them already"


def test_splits_depend_on_nothing_but_the_rows() -> None:
    rows, size = _rows(300, 300), Size(50, 20, 0)
    first = split_rows("t", rows, size, set())
    assert split_rows("t", rows[::-1], size, set()) == first
    without = [row for row in rows if row.prompt != first[0][0].prompt]
    train, test = split_rows("t", without, size, set())
    assert test == first[1]
    assert train[:49] == list(first[0][1:])


def test_validation_examples_are_no_test_examples_and_training_stays_the_same() -> None:
    rows = _rows(400, 200)
    group = {row.prompt: row.group for row in rows}
    train, test = split_rows("t", rows, Size(50, 1000, 0), set())
    same, validation = split_rows("t", rows, Size(50, 60, 0, tuning=True), set())
    assert same == train
    # As in the test: what a group has in common is not known from training.
    assert not {group[e.prompt] for e in train} & {group[e.prompt] for e in validation}
    assert len(validation) == 60
    assert not _prompts(validation) & (_prompts(train) | _prompts(test))


def test_the_blind_baseline_learns_words_and_nothing_else() -> None:
    def ask(number: int, words: str, answer: str) -> Example:
        return Example(str(number), f"{marker(f'{number}.png')} {words}", answer, ("yes", "no"))

    train = [ask(0, "round?", "yes"), ask(1, "round?", "yes"), ask(2, "round?", "no"), ask(3, "red?", "no")]
    assert question_only(train, [ask(4, "round?", "yes"), ask(5, "red?", "no")]) == 1.0
    # Words never seen get the most frequent answer, and of two equal ones the first.
    assert question_only(train, [ask(6, "big?", "yes"), ask(7, "big?", "no")]) == 0.5


@_needs_data
def test_siblings_share_a_domain_in_equal_parts() -> None:
    many = SETS["text-siblings-many"]
    assert [*many][:2] + [*many][-1:] == ["bank-a", "bank-b", "travel-l"]
    assert [len(tasks) for tasks in many.values()] == [2] * 24
    shares = [{r.prompt for r in SETS["text-siblings"][f"bank-{s}"]["bank-1"].read(_DATA)} for s in "abc"]
    assert all(len(part) > 150 for part in shares)
    assert len(set.union(*shares)) == sum(map(len, shares))


@_needs_data
def test_two_groups_answer_the_same_kinds_of_request_differently() -> None:
    groups = [
        [row for part in "abc" for row in SETS["text-desks"][f"{name}-{part}"][f"{name}-1"].read(_DATA)]
        for name in ("east", "west")
    ]
    assert len({row.prompt for rows in groups for row in rows}) == sum(map(len, groups)) == 5 * 150
    by_person = [Counter(row.answer for row in rows) for rows in groups]
    assert set(by_person[0]) == set(by_person[1]) == {"Tom", "Lily", "Ben", "Sue", "Max"}
    freezing = [{row.answer for row in rows if "freeze my account" in row.prompt} for rows in groups]
    assert freezing == [{"Tom"}, {"Ben"}]


@_needs_data
def test_no_test_prompt_is_trained_on_by_anybody(tmp_path: Path) -> None:
    table = write_set(SETS["text-four"], _DATA, tmp_path, Size(60, 20, 50))
    train = [e for path in tmp_path.rglob("*.train.jsonl") for e in read_examples(path)]
    test = [e for path in tmp_path.rglob("*.test.jsonl") for e in read_examples(path)]
    trained = {normalise(example.prompt) for example in train}
    assert len(trained) == len(train)
    assert not trained & {normalise(example.prompt) for example in test}
    assert all(row["train"] == 60 and row["test"] == 20 and row["licence"] for row in table.values())
    assert len(read_examples(tmp_path / "public.jsonl")) == 50
    assert json.loads((tmp_path / "table.json").read_text()) == table


def test_missing_data_unknown_sets_and_hardly_any_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is missing; task home-a needs CLINC150"):
        write_set(texts.PAIRS, tmp_path, tmp_path / "out", _ALL)
    with pytest.raises(ConfigurationError, match="no set 'text-eleven'; known: text-four"):
        commands.main(["write", "text-eleven", "--data", str(tmp_path), "--out", str(tmp_path)])
    _tiny_clothes(tmp_path)
    with pytest.raises(ConfigurationError, match="and 3 test rows; give 8"):
        write_set(_CLOTHES, tmp_path, tmp_path / "out", Size(20, 3, 1))


# --- images


_CLOTHES = {client: tasks for client, tasks in images.SIBLINGS.items() if client.startswith("clothes")}


def _tiny_clothes(folder: Path, number: int = 1200) -> np.ndarray:
    """Images of one shade each, labels 0 to 9 in turn."""
    place = folder / "fashion_mnist"
    place.mkdir(parents=True)
    labels = (np.arange(number) % 10).astype(np.uint8)
    shades = np.broadcast_to((np.arange(number) % 251).astype(np.uint8)[:, None, None], (number, 28, 28))
    for name, magic, values in (("images-idx3", 0x803, shades), ("labels-idx1", 0x801, labels)):
        header = np.array([magic, *values.shape], dtype=">i4").tobytes()
        (place / f"t10k-{name}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
    return labels


def test_clothes_have_their_own_label_and_image(tmp_path: Path) -> None:
    labels = _tiny_clothes(tmp_path)
    rows = list(images.which_clothes("top", "boot").read(tmp_path))
    assert len(rows) == 240
    for row in rows:
        (path,) = row.images
        number = int(Path(path).stem)
        assert row.answer == {0: "top", 9: "boot"}[int(labels[number])]
        assert row.choices == ("top", "boot")
        assert row.images[path]().getpixel((50, 50)) == (number % 251,) * 3


def test_a_damaged_clothes_file_is_refused(tmp_path: Path) -> None:
    _tiny_clothes(tmp_path)
    file = tmp_path / "fashion_mnist" / "t10k-labels-idx1-ubyte.gz"
    whole = file.read_bytes()
    short = gzip.compress(gzip.decompress(whole)[:-1])
    fewer = np.array([0x801, 2], dtype=">i4").tobytes() + bytes(2)
    for content, words in (
        (short, "labels-idx1"),
        (whole[:-9], "labels-idx1"),
        (b"<html>", "labels-idx1"),
        (gzip.compress(fewer), "1200 images and 2 labels"),
    ):
        file.write_bytes(content)
        with pytest.raises(ConfigurationError, match=words):
            next(images.which_clothes("top", "boot").read(tmp_path))


def test_what_is_written_is_what_the_questions_name_and_siblings_share_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = _tiny_clothes(tmp_path)
    (tmp_path / "self_instruct").mkdir()
    row = {"instruction": "Say it", "instances": [{"input": "", "output": "it"}]}
    (tmp_path / "self_instruct" / "a.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setitem(SETS, "images-siblings", _CLOTHES)
    out = tmp_path / "out"
    arguments = ["write", "images-siblings", "--data", str(tmp_path), "--out", str(out)]
    assert commands.main([*arguments, "--train-rows", "24", "--test-rows", "12"]) == 0
    table = json.loads((out / "table.json").read_text())
    assert list(table) == [f"clothes-{x}/clothes-{n}" for x in "abc" for n in (1, 2)]
    assert table["clothes-a/clothes-1"]["licence"] == "MIT"
    found = [
        path
        for file in out.rglob("*.t*.jsonl")
        for example in read_examples(file)
        for path in images_in(example.prompt)
    ]
    assert len(found) == len(set(found)) == 6 * 36
    assert {str(p.relative_to(out)) for p in out.rglob("*.png")} == set(found)
    number = int(Path(found[0]).stem)
    assert Image.open(out / found[0]).getpixel((50, 50)) == (number % 251,) * 3
    assert 0 <= labels[number] < 10


@_needs_data
def test_alphabets_can_be_made_equally_frequent() -> None:
    rows = list(images.which_alphabet("Korean", "Tagalog").read(_DATA))
    assert Counter(row.answer for row in rows) == {"Korean": 340, "Tagalog": 340}
    assert all(row.prompt.endswith(" Letter?") for row in rows)


def test_a_projector_is_trained_and_read_back(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def few(_cache: Path, part: str) -> tuple[Path, tuple[Example, ...]]:
        examples = []
        for number in range(24):
            shade, colour = 200 + number, ("red", "blue")[number % 2]
            path = tmp_path / "images" / part / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (shade, 0, 0) if colour == "red" else (0, 0, shade)).save(path)
            prompt = f"{marker(f'{part}/{number}.png')} w1"
            examples.append(Example(str(number), prompt, colour, ("red", "blue")))
        return tmp_path / "images", tuple(examples)

    monkeypatch.setattr(features, "load_efficientnet", lambda _cache: Colours())
    monkeypatch.setattr(commands, "easy_vqa", few)
    monkeypatch.setenv("FEDMOSAIC_CACHE", str(tmp_path / "cache"))
    shown = io.StringIO()
    arguments = commands.TrainProjector(model=str(tiny_folder / "small"), out=tmp_path / "out", steps=200)
    commands.pretrain(arguments, Console(file=shown, width=300))
    loaded, record = projector.load_projector(tmp_path / "out")
    assert record.width == 16
    assert record.last_loss < record.first_loss
    assert "about other images 1.000, without the images 0.500" in shown.getvalue()
    assert all(torch.isfinite(p).all() for p in loaded.parameters())
