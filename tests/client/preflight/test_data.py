"""What a client's people are told about their examples before a model is loaded."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from fedmosaic.client.data.records import Example, ExampleSet, read_sets
from fedmosaic.client.preflight.data import check_sets, read_lengths
from fedmosaic.client.settings import DataSettings
from fedmosaic.protos.errors import ConfigurationError
from tiny import word_tokenizer


def row(number: int, **changes: object) -> dict[str, object]:
    return {"id": f"e{number}", "prompt": f"what is {number}", "answer": "yes", **changes}


def write(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def warnings(settings: DataSettings) -> list[str]:
    return check_sets(read_sets(settings), settings.pictures)


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write(tmp_path / "train.jsonl", *(row(i) for i in range(10)))


def test_a_sound_data_set_gives_no_warning(train: Path, tmp_path: Path) -> None:
    test = write(tmp_path / "test.jsonl", row(20), row(21, choices=["yes", "no"]))
    data = read_sets(DataSettings(train=train, test=test, others={"b": test}))
    assert (len(data.train.examples), sorted(data.tests)) == (10, ["b", "self"])
    assert check_sets(data, None) == []


@pytest.mark.parametrize("name", ["test", "others"])
def test_a_test_set_of_training_examples_alone_is_refused(train: Path, tmp_path: Path, name: str) -> None:
    same = write(tmp_path / "copy.jsonl", *(row(i, id=f"other{i}") for i in (3, 1)))
    for file in (train, same):
        tests: object = file if name == "test" else {"b": file}
        settings = DataSettings.model_validate({"train": train, name: tests})
        with pytest.raises(ConfigurationError, match="are training examples too"):
            warnings(settings)


def test_an_overlap_is_told_with_its_count(train: Path, tmp_path: Path) -> None:
    test = write(tmp_path / "test.jsonl", *(row(i) for i in range(8, 13)))
    (line,) = warnings(DataSettings(train=train, test=test))
    assert "test.jsonl: 2 of 5 test examples are training examples too" in line


def test_repeated_rows_are_told_with_what_they_mean(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", row(1), row(1, id="again"), row(1, id="more"), row(2))
    (line,) = warnings(DataSettings(train=train))
    assert "2 of 4 rows repeat" in line
    assert "less protected" in line


def test_another_set_must_not_take_the_name_of_the_own(train: Path) -> None:
    with pytest.raises(ConfigurationError, match=r'data\.others names a set "self"'):
        warnings(DataSettings(train=train, others={"self": train}))


def test_images_are_looked_for(train: Path, tmp_path: Path) -> None:
    test = write(tmp_path / "test.jsonl", row(20), row(21, prompt="<image:a.png> what?"))
    with pytest.raises(ConfigurationError, match=r"example 2 names the image 'a\.png'.*data\.pictures"):
        warnings(DataSettings(train=train, test=test))
    with pytest.raises(ConfigurationError, match=r"no image 'a\.png'"):
        warnings(DataSettings(train=train, test=test, pictures=tmp_path))
    (tmp_path / "a.png").touch()
    warnings(DataSettings(train=train, test=test, pictures=tmp_path))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(["<unk>", "</s>", "a", "b"], eos_token="</s>")  # noqa: S106  # a token of text


def of(label: str, examples: list[Example]) -> ExampleSet:
    return ExampleSet(label, tuple(examples), "", True)


def test_the_share_that_is_cut_is_told_with_its_setting(tokenizer: PreTrainedTokenizerFast) -> None:
    # 98 prompt tokens in all; of 90 + 2 for its answer, 12 fit into 14.
    examples = [Example("1", "a " * 8, "b"), Example("2", "a " * 90, "b")]
    line = read_lengths(tokenizer, of("train.jsonl", examples), 14, "profile_max_length").warning
    assert line.startswith("train.jsonl: 1 of 2 examples are longer than profile_max_length = 14 tokens")
    assert "the longest has 92" in line
    assert "80 % of their prompts' tokens are not read" in line
    assert read_lengths(tokenizer, of("train.jsonl", examples), 92, "profile_max_length").warning == ""


@pytest.mark.parametrize("choices", [(), ("b", "b " * 12)])
def test_an_answer_without_room_is_refused_with_file_example_and_setting(
    tokenizer: PreTrainedTokenizerFast, choices: tuple[str, ...]
) -> None:
    answer = "b" if choices else "b " * 12
    examples = [Example("1", "a", "b"), Example("2", "a", answer, choices)]
    with pytest.raises(ConfigurationError, match=r"t\.jsonl, example 2: .*raise profile_max_length to 14"):
        read_lengths(tokenizer, of("t.jsonl", examples), 13, "profile_max_length")
    read_lengths(tokenizer, of("t.jsonl", examples), 14, "profile_max_length")
    # One figure for all of them, not one after the other.
    with pytest.raises(ConfigurationError, match=r"example 2: .* as in 1 more; raise s to 14 at least"):
        read_lengths(tokenizer, of("t.jsonl", [*examples, Example("3", "a", "b b b b")]), 4, "s")
