"""The picture benchmark: pictures that fit their questions, splits that share no picture, blind baselines."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fedmosaic.client.model.examples import Example, read_examples
from fedmosaic.client.model.training import TrainingSettings
from fedmosaic.client.vision.words import images_in, marker
from fedmosaic.experiments.tasks import __main__ as commands
from fedmosaic.experiments.tasks.pictures import sets as picture_sets
from fedmosaic.experiments.tasks.pictures.sets import (
    PICTURES_SIBLINGS,
    PICTURES_TEN,
    build,
    question_only,
    write_pictures,
)
from fedmosaic.experiments.tasks.pictures.sources import (
    in_test,
    nlvr,
    same_character,
    shapes,
    which_alphabet,
    which_clothes,
)
from fedmosaic.experiments.tasks.texts.sets import split_rows
from fedmosaic.experiments.tasks.texts.sources import Row
from fedmosaic.protos.errors import ConfigurationError

_DATA = Path(__file__).parents[4].parent / "shared" / "data"
_needs_data = pytest.mark.skipif(
    not (_DATA / "nlvr").is_dir(), reason="the data sets are not on this machine"
)


def test_the_border_is_that_of_the_text_sets() -> None:
    groups = [f"picture {number}" for number in range(200)]
    rows = [Row(f"question {group}", "yes", ("yes", "no"), group) for group in groups]
    _, test = split_rows("task", rows, 1000, 1000, set())
    assert {example.prompt for example in test} == {f"question {g}" for g in groups if in_test(g)}


def test_the_blind_baseline_learns_words_and_nothing_else() -> None:
    def ask(number: int, words: str, answer: str) -> Example:
        return Example(str(number), f"{marker(f'{number}.png')} {words}", answer, ("yes", "no"))

    train = [ask(0, "round?", "yes"), ask(1, "round?", "yes"), ask(2, "round?", "no"), ask(3, "red?", "no")]
    assert question_only(train, [ask(4, "round?", "yes"), ask(5, "red?", "no")]) == 1.0
    # Words never seen get the most frequent answer, and of two equal ones the first.
    assert question_only(train, [ask(6, "big?", "yes"), ask(7, "big?", "no")]) == 0.5


def _tiny_shapes(folder: Path) -> None:
    place = folder / "shapes_vqa"
    place.mkdir(parents=True)
    for number, part in enumerate(("train.tiny", "train.small", "val", "test")):
        arrays = np.full((30, 30, 30, 3), 60 * number, dtype=np.uint8)
        arrays[:, 0, 0, 0] = np.arange(30)
        file = io.BytesIO()
        np.save(file, arrays)
        (place / f"{part}.input.npy.gz").write_bytes(gzip.compress(file.getvalue()))
        words = "is a square above a circle" if number % 2 else "is a red shape a square"
        (place / f"{part}.query_str.txt.gz").write_bytes(gzip.compress(f"{words}\n".encode() * 30))
        answers = "".join("true\n" if n % 3 else "false\n" for n in range(30))
        (place / f"{part}.output.gz").write_bytes(gzip.compress(answers.encode()))


@pytest.fixture
def tiny_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    data = tmp_path / "data"
    _tiny_shapes(data)
    (data / "self_instruct").mkdir()
    row = {"instruction": "Say it", "instances": [{"input": "", "output": "it"}]}
    (data / "self_instruct" / "a.jsonl").write_text(json.dumps(row) + "\n")
    chosen = {"shapes": {name: PICTURES_TEN["shapes"][name] for name in ("what", "above")}}
    monkeypatch.setitem(picture_sets.PICTURE_SETS, "pictures-ten", chosen)
    return data


def test_what_is_written_is_what_the_questions_name(tiny_set: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["pictures", "--data", str(tiny_set), "--out", str(out), "--train-rows", "20"]
    assert commands.main([*arguments, "--test-rows", "12"]) == 0
    table = json.loads((out / "table.json").read_text())
    assert list(table) == ["shapes/what", "shapes/above"]
    assert table["shapes/what"]["licence"] == "BSD-2-Clause"
    trained: set[str] = set()
    tested: set[str] = set()
    for name in ("what", "above"):
        for part, paths in (("train", trained), ("test", tested)):
            for example in read_examples(out / "shapes" / f"{name}.{part}.jsonl"):
                paths.update(images_in(example.prompt))
    assert trained
    assert tested
    assert not trained & tested
    assert {str(p.relative_to(out)) for p in (out / "pictures").rglob("*.png")} == trained | tested
    path = sorted(tested)[0]
    part, _, number = Path(path).stem.rpartition("-")
    shade = 60 * ["train-tiny", "train-small", "val", "test"].index(part)
    assert Image.open(out / path).getpixel((9, 9)) == (shade, shade, shade)
    assert Image.open(out / path).getpixel((0, 0)) == (int(number), shade, shade)


def test_missing_data_and_hardly_any_rows_are_refused(tiny_set: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="needs SHAPES"):
        list(build("pictures-ten", tmp_path / "nowhere", 10, 10))
    with pytest.raises(ConfigurationError, match="give eight"):
        write_pictures("pictures-ten", tiny_set, tmp_path / "out", 20, 3, 1)


def _tiny_clothes(folder: Path, number: int = 1200) -> np.ndarray:
    """Pictures of one shade each, labels 0 to 9 in turn."""
    place = folder / "fashion_mnist"
    place.mkdir(parents=True)
    labels = (np.arange(number) % 10).astype(np.uint8)
    shades = np.broadcast_to((np.arange(number) % 251).astype(np.uint8)[:, None, None], (number, 28, 28))
    for name, magic, values in (("images-idx3", 0x803, shades), ("labels-idx1", 0x801, labels)):
        header = np.array([magic, *values.shape], dtype=">i4").tobytes()
        (place / f"t10k-{name}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
    return labels


def test_clothes_have_their_own_label_and_picture(tmp_path: Path) -> None:
    labels = _tiny_clothes(tmp_path)
    rows = list(which_clothes(("top", "boot"))(tmp_path))
    assert len(rows) == 240
    for row in rows:
        (path,) = row.pictures
        number = int(Path(path).stem)
        assert row.row.answer == {0: "top", 9: "boot"}[int(labels[number])]
        assert row.row.choices == ("top", "boot")
        assert row.pictures[path]().getpixel((50, 50)) == (number % 251,) * 3


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
        (gzip.compress(fewer), "1200 pictures and 2 labels"),
    ):
        file.write_bytes(content)
        with pytest.raises(ConfigurationError, match=words):
            next(which_clothes(("top", "boot"))(tmp_path))


def test_siblings_have_the_same_tasks_and_no_picture_in_common(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _tiny_clothes(tmp_path)
    clothes = {client: tasks for client, tasks in PICTURES_SIBLINGS.items() if client.startswith("clothes")}
    monkeypatch.setitem(picture_sets.PICTURE_SETS, "pictures-siblings", clothes)
    written = list(build("pictures-siblings", tmp_path, 24, 12))
    assert [(task.client, task.name) for task in written] == [
        (f"clothes-{x}", f"clothes-{n}") for x in "abc" for n in (1, 2)
    ]
    parts = [task.train for task in written] + [task.test for task in written]
    pictures = [path for part in parts for example in part for path in images_in(example.prompt)]
    assert len(pictures) == len(set(pictures)) == 6 * 36
    tuned = list(build("pictures-siblings", tmp_path, 24, 12, tuning=True))
    assert [task.train for task in tuned] == [task.train for task in written]
    tests = {example.prompt for task in written for example in task.test}
    assert not tests & {example.prompt for task in tuned for example in task.test}


@_needs_data
def test_alphabets_can_be_made_equally_frequent() -> None:
    rows = list(which_alphabet(("Korean", "Tagalog"), "Letter?", 340)(_DATA))
    assert [row.row.answer for row in rows].count("Korean") == 340
    assert [row.row.answer for row in rows].count("Tagalog") == 340
    assert all(row.row.prompt.endswith(" Letter?") for row in rows)


@_needs_data
def test_three_boxes_are_cut_from_their_picture() -> None:
    first = next(nlvr("", towers=True)(_DATA))
    boxes = [make() for make in first.pictures.values()]
    assert [box.size for box in boxes] == [(100, 100)] * 3
    assert len(images_in(first.row.prompt)) == 3
    # The strips between the boxes are a darker grey; no box shows one.
    assert all(box.getpixel((x, 1)) == (211, 211, 211) for box in boxes for x in (0, 99))


@_needs_data
def test_pairs_are_balanced_and_stay_on_one_side() -> None:
    rows = list(same_character("Greek", 200)(_DATA))
    same = [row.row.answer == "yes" for row in rows]
    assert 0.35 < np.mean(same) < 0.65
    for row, alike in zip(rows, same, strict=True):
        first, second = images_in(row.row.prompt)
        assert first != second
        characters = [f"Greek/{Path(path).name.split('-')[1]}" for path in (first, second)]
        assert (characters[0] == characters[1]) is alike
        assert len({in_test(name) for name in characters}) == 1
    assert list(same_character("Greek", 200)(_DATA))[7].row == rows[7].row


@_needs_data
def test_every_kind_of_shapes_question_is_in_one_task() -> None:
    tasks = PICTURES_TEN["shapes"]
    prompts = [{row.row.prompt for row in task.read(_DATA)} for task in tasks.values()]
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    assert len(list(shapes("")(_DATA))) == 64 + 640 + 1024 + 1024


def test_a_projector_is_trained_and_read_back(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from fedmosaic.client.vision import features, projector

    class Colours(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            mixing = torch.randn(1280, 3, generator=torch.Generator().manual_seed(0))
            return torch.einsum("fc,bchw->bfhw", mixing, torch.nn.functional.avg_pool2d(pixels, 32))

    def few(cache: Path, part: str) -> tuple[Path, tuple[Example, ...]]:
        examples = []
        for number in range(24):
            colour = ("red", "blue")[number % 2]
            path = tmp_path / "pictures" / part / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (200 + number, 0, 0) if colour == "red" else (0, 0, 200 + number)).save(
                path
            )
            examples.append(
                Example(str(number), f"{marker(f'{part}/{number}.png')} w1", colour, ("red", "blue"))
            )
        return tmp_path / "pictures", tuple(examples)

    monkeypatch.setattr(features, "load_efficientnet", lambda _cache: Colours())
    monkeypatch.setattr(commands, "easy_vqa", few)
    monkeypatch.setenv("FEDMOSAIC_CACHE", str(tmp_path / "cache"))
    shown = io.StringIO()
    arguments: Any = commands.TrainProjector(
        model=str(tiny_folder / "small"), out=tmp_path / "out", steps=60, batch_size=8, learning_rate=0.01
    )
    commands.pretrain(arguments, Console(file=shown, width=300))
    loaded, record = projector.load_projector(tmp_path / "out")
    assert record.width == 16
    assert record.last_loss < record.first_loss
    assert "about other pictures 1.000, without the pictures 0.500" in shown.getvalue()
    assert TrainingSettings().steps != record.steps
    assert all(torch.isfinite(p).all() for p in loaded.parameters())
