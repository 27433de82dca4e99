"""Examples of every kind of source: the same rows, names, refusals and ledger rules for all of them."""

import csv
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest

from fedmosaic.client.data.records import Example, Turn, by_unit, read_set, row_of, unit_ids
from fedmosaic.client.ledger import DataLedger
from fedmosaic.client.settings import ClientSettings, ColumnSettings, DataSettings, HubData
from fedmosaic.client.state import SessionRecord
from fedmosaic.privacy.configuration import validate
from fedmosaic.protos.errors import ConfigurationError

Rows = list[dict[str, Any]]
ROWS: Rows = [
    {"prompt": "a, b", "answer": "yes", "choices": ["yes", "no"], "person": "p1"},
    {"prompt": 'say "c"\nand d', "answer": "no", "choices": ["yes", "no"], "person": "p2"},
    {"prompt": "e", "answer": "[yes", "choices": [], "person": "p1"},
]


def put(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def as_csv(path: Path, rows: Rows, suffix: str = ".csv") -> Any:
    path = path.with_suffix(suffix)
    with path.open("w", newline="", encoding="utf-8") as file:
        names = list(rows[0])
        writer = csv.DictWriter(file, names, delimiter="\t" if suffix == ".tsv" else ",")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})
    return path


def as_parquet(path: Path, rows: Rows) -> Any:
    path = path.with_suffix(".parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def as_folder(path: Path, rows: Rows) -> Any:
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


Write = Callable[[Path, Rows], Any]
FORMATS: dict[str, Write] = {
    "lines": lambda p, rows: put(p.with_suffix(".jsonl"), "".join(json.dumps(row) + "\n" for row in rows)),
    "json": lambda p, rows: put(p.with_suffix(".json"), json.dumps(rows, indent=1)),
    "csv": as_csv,
    "tsv": lambda p, rows: as_csv(p, rows, ".tsv"),
    "parquet": as_parquet,
    "folder": as_folder,
    "dataset": lambda _, rows: datasets.Dataset.from_list(rows),
    "list": lambda _, rows: rows,
}
every_format = pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS.keys())


@every_format
def test_every_format_gives_the_same_examples_and_names(write: Write, tmp_path: Path) -> None:
    found = read_set(write(tmp_path / "data", ROWS))
    assert found.examples == read_set(ROWS).examples
    assert [(e.prompt, e.answer, e.choices, e.person) for e in found.examples] == [
        (row["prompt"], row["answer"], tuple(row["choices"]), row["person"]) for row in ROWS
    ]
    assert "3 rows" in found.words()
    assert "2 persons with at most 2 rows" in found.words()
    assert "names made from content" in found.words()


@every_format
def test_columns_have_the_names_that_are_given(write: Write, tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "label": "x", "key": f"k{i}", "note": "secret"} for i in range(2)]
    source = write(tmp_path / "data", rows)
    columns = ColumnSettings(prompt="question", answer="label", id="key")
    found = read_set(source, columns)
    assert found.examples == (Example("k0", "q0", "x"), Example("k1", "q1", "x"))
    assert "key as id, question as prompt, label as answer" in found.words()
    with pytest.raises(ConfigurationError, match=r"unknown key 'question'.*\[data.columns\]"):
        read_set(source)
    with pytest.raises(ConfigurationError, match=r"(row 1|line [12]): 'text' must be a text"):
        read_set(source, ColumnSettings(prompt="text", answer="label"))


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "empty": ({"answer": "  "}, "'answer' must be a text that is not empty"),
    "NUL": ({"prompt": "secret \x00"}, "'prompt' holds a NUL"),
    "answer outside": ({"choices": ["secret", "other"]}, "'choices' must differ .* contain the answer"),
    "choices twice": ({"choices": ["yes", "yes"]}, "'choices' must differ"),
    "choices with NUL": ({"choices": ["yes", "secret\x00"]}, "'choices' holds a NUL"),
}


@pytest.mark.parametrize(("change", "words"), FAULTS.values(), ids=FAULTS)
@every_format
def test_a_bad_row_is_named_in_every_format_and_never_quoted(
    write: Write, change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    rows = [ROWS[0], ROWS[0] | {"prompt": "other secret"} | change]
    with pytest.raises(ConfigurationError, match=rf"(row 2|line [23]): {words}") as caught:
        read_set(write(tmp_path / "data", rows))
    assert "secret" not in str(caught.value)


def test_half_a_character_is_refused_where_no_decoder_stands_before_it() -> None:
    with pytest.raises(ConfigurationError, match="row 1: 'prompt' holds half a character"):
        read_set([{"prompt": "secret \ud83d", "answer": "x"}])


def test_names_follow_from_content_alone_and_repetitions_are_numbered() -> None:
    a, b = {"prompt": "a", "answer": "x"}, {"prompt": "b", "answer": "x"}
    ids = [e.id for e in read_set([a, b, a, a]).examples]
    assert sorted(ids) == sorted(e.id for e in read_set([b, a, a, a]).examples)
    assert ids[2:] == [f"{ids[0]}-2", f"{ids[0]}-3"]
    assert "2 repeated" in read_set([a, b, a, a]).words()
    (other,) = read_set([a | {"choices": ["x", "y"]}]).examples
    assert other.id not in ids
    (chat,) = read_set([conversation(("user", "a"), ("assistant", "x"))]).examples
    assert chat.id not in ids


def test_names_are_given_to_all_or_to_none() -> None:
    named, bare = {"id": 7, "prompt": "a", "answer": "x"}, {"prompt": "b", "answer": "x"}
    assert read_set([named]).examples[0].id == "7"
    with pytest.raises(ConfigurationError, match="row 2 lacks an id that rows before it have"):
        read_set([named, bare])
    with pytest.raises(ConfigurationError, match="row 2 has an id that rows before it lack"):
        read_set([bare, named])
    with pytest.raises(ConfigurationError, match="examples, row 3 has the id of row 1"):
        read_set([named, named | {"id": "8"}, named])


def conversation(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


@every_format
def test_conversations_come_in_every_format(write: Write, tmp_path: Path) -> None:
    row = conversation(
        ("system", "s"), ("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2")
    )
    (example,) = read_set(write(tmp_path / "data", [row])).examples
    assert example.turns == tuple(Turn(m["role"], m["content"]) for m in row["messages"])
    assert (example.prompt, example.answer) == ("s\nu1\na1\nu2", "a2")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (conversation(("user", "secret")), "end with the assistant"),
        (conversation(("assistant", "secret")), "must have a user's turn"),
        (conversation(("user", "u"), ("system", "secret"), ("assistant", "a")), "message 2: role must be"),
        (conversation(("human", "secret"), ("assistant", "a")), "message 1: role must be"),
        (conversation(("user", " "), ("assistant", "a")), "message 1: 'content' must be a text"),
        (conversation(("user", "u"), ("assistant", "secret\x00")), "message 2: 'content' holds a NUL"),
        ({"messages": [{"role": "user", "value": "secret"}]}, "message 1 must be an object with role"),
        ({"messages": "secret"}, "'messages' must be a list"),
        (conversation(("user", "u"), ("assistant", "a")) | {"prompt": "secret"}, "beside 'prompt' or"),
    ],
)
def test_a_bad_conversation_is_named_by_row_and_message(row: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=f"examples, row 1.*{words}") as caught:
        read_set([row])
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt;answer\na;b\n", "one column, whose name holds a separator"),
        ("prompt,prompt\na,b\n", "two columns of one name"),
        ("prompt,answer\na,b,secret\n", "line 2 has 3 cells under 2 columns"),
        ('prompt,answer\n"a"secret,b\n', "line 2 is not CSV"),
        ("prompt,answer\n", "holds no example"),
        ("", "holds no example"),
    ],
)
def test_a_csv_file_that_is_none_is_named(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ConfigurationError, match=rf"x\.csv.*{words}") as caught:
        read_set(tmp_path / "x.csv")
    assert "secret" not in str(caught.value)


def test_files_that_are_not_what_they_are_called(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("secret")
    with pytest.raises(ConfigurationError, match=r"x\.parquet: ArrowInvalid"):
        read_set(tmp_path / "x.parquet")
    (tmp_path / "x.json").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": "b"}\n')
    with pytest.raises(ConfigurationError, match=r"call it x\.jsonl"):
        read_set(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"secret": 1}')
    with pytest.raises(ConfigurationError, match=r"x\.json holds a dict; write a list"):
        read_set(tmp_path / "x.json")


def test_a_split_of_a_saved_folder_is_named(tmp_path: Path) -> None:
    whole = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS)}
    )
    whole.save_to_disk(str(tmp_path / "set"))
    with pytest.raises(ConfigurationError, match=r"splits test, train; name one of them"):
        read_set(tmp_path / "set")
    assert read_set(tmp_path / "set" / "train").examples == read_set(ROWS).examples


def test_classes_of_a_data_set_are_read_by_name() -> None:
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "answer": datasets.ClassLabel(names=["no", "yes"])}
    )
    data = datasets.Dataset.from_list([{"prompt": "a", "answer": 1}], features=features)
    assert read_set(data).examples[0].answer == "yes"


@pytest.mark.parametrize("wrong", ["train.csv", {"prompt": "a"}, [["a", "b"]]])
def test_what_is_no_list_of_rows_is_refused(wrong: Iterable[Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"examples( is a|, row 1 is a)"):
        read_set(wrong)


def test_without_the_library_its_formats_are_refused_and_the_others_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ("parquet", "folder", "lines", "json", "csv")
    files = [FORMATS[kind](tmp_path / "data", ROWS) for kind in kinds]
    for name in ("datasets", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    for file in files[:2]:
        with pytest.raises(ConfigurationError, match=r"fedmosaic\[datasets\]"):
            read_set(file)
    assert len({read_set(file).examples for file in files[2:]}) == 1


def test_a_hub_is_named_by_its_prefix_and_nothing_else_is_sent_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings(train: str) -> DataSettings:
        return validate({"train": train}, DataSettings, "client.toml").located(tmp_path)

    assert settings("hub:owner/name:train[:9]").train == HubData(name="owner/name", split="train[:9]")
    assert str(settings("hub:glue:sst2:test").train) == "hub:glue:sst2:test"
    with pytest.raises(ConfigurationError, match="write hub:NAME:SPLIT"):
        settings("hub:owner/name")
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(ConfigurationError, match="cannot read the examples in"):
        read_set(settings("owner/name").train or Path())


def test_an_offline_hub_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigurationError, match=r"hub:fedmosaic/absent:train cannot be loaded .*save_to_disk"
    ):
        read_set(HubData(name="fedmosaic/absent", split="train"))


def test_a_split_of_a_hub_is_read_like_any_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(name: str, subset: str | None, split: str) -> datasets.Dataset:
        asked.append((name, subset, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read_set(HubData(name="glue", subset="sst2", split="train"))
    assert (found.label, found.examples) == ("hub:glue:sst2:train", read_set(ROWS).examples)
    assert asked == [("glue", "sst2", "train")]


def test_the_ledger_of_every_kind_of_source_has_a_place_or_must_be_given(tmp_path: Path) -> None:
    record = SessionRecord(federation="f", client="a")

    def place(**settings: Any) -> Path:
        return DataLedger.of(DataSettings(**settings), tmp_path / "state", record).place

    for name in ("x.csv", "x.parquet", "folder"):
        assert place(train=tmp_path / name) == tmp_path.resolve() / f"{name}.ledger"
    for source in (HubData(name="a", split="train"), None):
        assert place(train=source, ledger=tmp_path / "books") == tmp_path.resolve() / "books"
        with pytest.raises(ConfigurationError, match=r"data\.ledger: missing"):
            place(train=source)


def test_what_is_missing_or_there_twice_is_named(tmp_path: Path) -> None:
    bare: dict[str, Any] = {"kit": "kit", "server": "localhost:1", "state_dir": "s", "probe": {"path": "p"}}

    def complete(changes: dict[str, Any], **given: bool) -> None:
        validate(bare | changes, ClientSettings, "client.toml").check_complete(**given)

    model, data = {"model": {"path": "m"}}, {"data": {"train": "t.csv", "test": "u.csv"}}
    complete(model | data)
    complete({}, model=True, train=True, test=True)
    complete({"model": {"path": "m", "aligned": "b", "rank": 2}}, model=True, train=True)
    for changes, given, words in (
        (model | data, {"test": True}, "data.test is u.csv"),
        ({"model": {"path": "m", "dtype": "bfloat16"}}, {"model": True, "train": True}, "dtype says how"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            complete(changes, **given)
    with pytest.raises(ConfigurationError, match="column 'text' is named for two parts"):
        complete(model | {"data": {"train": "t", "columns": {"prompt": "text", "answer": "text"}}})


def test_an_example_is_read_back_from_its_row() -> None:
    found = read_set([*ROWS, conversation(("user", "u"), ("assistant", "a"))]).examples
    assert read_set([row_of(example) for example in found]).examples == found


def test_units_are_examples_or_all_examples_of_a_person() -> None:
    examples = read_set(ROWS).examples
    first, second, third = examples
    assert by_unit(examples, "example") == [(first,), (second,), (third,)]
    assert by_unit(examples, "person") == [(first, third), (second,)]
    assert unit_ids(examples, "example") == tuple(example.id for example in examples)
    assert unit_ids(examples, "person") == ("person p1", "person p2")
    with pytest.raises(ConfigurationError, match="training example 2 names no person"):
        by_unit(read_set([ROWS[0], {**ROWS[1], "person": None}]).examples, "person")
