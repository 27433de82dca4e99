"""A client made of a user's own objects: a model in memory, rows in a list, conversations, persons."""

import shutil
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from end_to_end.federation_of_vectors import run_all
from end_to_end.test_preflight import found, server_of
from fedmosaic.client import client
from fedmosaic.client.client import Client, ClientResult
from fedmosaic.client.colora.layer import CoLoraLayer
from fedmosaic.client.preflight.checks import Given, Preflight
from fedmosaic.client.progress import Progress
from fedmosaic.client.settings import ClientSettings
from fedmosaic.client.transport.connection import open_channel
from fedmosaic.client.transport.grpc import Connect
from fedmosaic.privacy.ledger.ledger import LEDGER
from fedmosaic.protos.errors import ConfigurationError, FedMosaicError, ModelError
from tiny import save_tiny_model

SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
WORDS = ["U", "B", *(f"w{i}" for i in range(40)), "yes", "no"]
TEMPLATE = (
    "{% for m in messages %}{{ 'U ' if m.role == 'user' else 'B ' }}{{ m.content }} "
    "{% if m.role == 'assistant' %}</s> {% endif %}{% endfor %}{% if add_generation_prompt %}B {% endif %}"
)
Objects = tuple[Any, Any]


def chats(start: int, count: int = 60) -> list[dict[str, Any]]:
    return [
        {
            "person": f"p{i // 4}",
            "messages": [
                {"role": "user", "content": f"w{i % 40} w{i // 40 % 40}"},
                {"role": "assistant", "content": "yes"},
                {"role": "user", "content": f"w{(7 * i) % 40}"},
                {"role": "assistant", "content": "no yes"},
            ],
        }
        for i in range(start, start + count)
    ]


def pairs(start: int, count: int = 60) -> list[dict[str, Any]]:
    return [
        {"prompt": f"w{i % 40} w{i // 40 % 40}", "answer": "yes", "choices": ["yes", "no"]}
        for i in range(start, start + count)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("in-python")
    save_tiny_model(folder / "model", WORDS, SPECIAL, template=TEMPLATE, bos_token_id=1)
    return folder


@pytest.fixture
def objects(place: Path) -> Objects:
    return (
        AutoModelForCausalLM.from_pretrained(place / "model"),
        AutoTokenizer.from_pretrained(place / "model"),
    )


@pytest.fixture
def served(place: Path, tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A federation of four, and its server."""
    directory = found(place / "model", tmp_path / "federation", rounds=1)
    with server_of(directory / "server").background() as port:
        yield directory, port


def settings(served: tuple[Path, int], place: Path, member: str = "a", **changes: Any) -> ClientSettings:
    directory, port = served
    bare = {
        "kit": directory / "clients" / member,
        "server": f"127.0.0.1:{port}",
        "state_dir": directory.parent / member,
        "probe": {"path": str(place / "model")},
        "profile_max_length": 32,
        "training": {"steps": 1, "max_length": 32},
    }
    return ClientSettings.model_validate(bare | changes)


def test_what_is_left_out_or_twice_is_refused_before_anything_is_read(
    served: tuple[Path, int], place: Path, objects: Objects
) -> None:
    model, tokenizer = objects
    bare = settings(served, place)
    for arguments, words in (
        ({}, "model: missing"),
        ({"model": model}, "model and tokenizer together"),
        ({"model": model, "tokenizer": tokenizer}, "data.train: missing"),
        ({"model": model, "tokenizer": tokenizer, "examples": pairs(0)}, "data.ledger: missing"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            Client(bare, **arguments)
    named = settings(served, place, data={"train": "train.csv"})
    with pytest.raises(ConfigurationError, match=r"data\.train is train\.csv"):
        Client(named, model=model, tokenizer=tokenizer, examples=pairs(0), ledger="books")
    assert not list(served[0].parent.rglob(LEDGER))


def test_a_model_that_carries_adapters_is_refused(
    served: tuple[Path, int], place: Path, objects: Objects, tmp_path: Path
) -> None:
    model, tokenizer = objects
    around = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    for carrying in (around, around.get_base_model()):
        given = Given((carrying, tokenizer), pairs(0))
        checked = Preflight(settings(served, place, data={"ledger": tmp_path}), Progress(), given=given)
        with closing(checked), pytest.raises(ModelError, match=r"adapters already|without PEFT around it"):
            checked.require(print)
    assert not list(tmp_path.rglob(LEDGER))


def test_the_same_checks_are_made_of_rows_in_a_list(
    served: tuple[Path, int], place: Path, objects: Objects, tmp_path: Path
) -> None:
    bare = settings(served, place, data={"ledger": tmp_path / "books"})
    for given, words in (
        (Given(objects, pairs(0), pairs(0)), "all 60 examples of examples are training examples too"),
        (Given(objects, pairs(0), [pairs(90)[0] | {"choices": ["yes"]}]), "example 1 has 1 choice"),
        (Given(objects, [*pairs(0), {"prompt": "w1", "answer": " "}]), "examples, row 61: 'answer' must"),
        (Given(objects, [*chats(0), {"prompt": "w1", "answer": "yes " * 40}]), "raise training.max_length"),
    ):
        checked = Preflight(bare, Progress(), given=given)
        with closing(checked), pytest.raises(FedMosaicError, match=words):
            checked.require(print)


class EndedEarly:
    """A channel to a server that is gone when the statement is handed over."""

    def __init__(self, address: str, *files: Path) -> None:
        self._served, self._gone = open_channel(address, *files), open_channel("127.0.0.1:1", *files)
        self.unary_stream, self.stream_unary = self._served.unary_stream, self._served.stream_unary

    def unary_unary(self, method: str, **about: Any) -> Any:
        return (self._gone if method.endswith("/Report") else self._served).unary_unary(method, **about)

    def close(self) -> None:
        self._served.close()
        self._gone.close()


def test_objects_take_part_with_conversations(
    served: tuple[Path, int],
    place: Path,
    objects: Objects,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every member another way: model and list, model and data set, files, a saved folder.

    The last one's server ends before the statement comes, as after its `grace_seconds`.
    """
    model, tokenizer = objects
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    template, padding = tokenizer.chat_template, tokenizer.padding_side
    home, own_model = served[0].parent, {"model": {"path": str(place / "model")}}
    datasets.Dataset.from_list(chats(6000)).save_to_disk(str(home / "folder"))
    other = AutoModelForCausalLM.from_pretrained(place / "model")
    clients = {
        "a": Client(
            settings(served, place, "a"),
            model=model,
            tokenizer=tokenizer,
            examples=chats(0),
            test=chats(90, 4),
            ledger=home / "books-a",
        ),
        "b": Client(
            settings(served, place, "b", data={"ledger": home / "books-b"}),
            model=other,
            tokenizer=tokenizer,
            examples=datasets.Dataset.from_list(pairs(2000)),
        ),
        "c": Client(settings(served, place, "c", **own_model), examples=pairs(4000), ledger=home / "books-c"),
        "d": Client(
            settings(served, place, "d", **own_model, data={"train": home / "folder"}),
            connect=cast(Connect, EndedEarly),
        ),
    }
    monkeypatch.setattr(client, "Preflight", partial(Preflight, server_patience_seconds=0.5))
    results: dict[str, ClientResult] = {}

    def run(name: str) -> None:
        results[name] = clients[name].run()

    caplog.set_level("INFO")
    assert run_all({name: SimpleNamespace(run=partial(run, name)) for name in clients}) == {}
    for ledger in ("books-a", "books-b", "books-c", "folder.ledger"):
        assert (home / ledger / LEDGER).is_file()
    assert "self" in results["a"].after
    # The user's own weights are as before; what was added is an adapter, as was said.
    assert any(isinstance(module, CoLoraLayer) for module in model.modules())
    now = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    assert (tokenizer.chat_template, tokenizer.padding_side) == (template, padding)
    # One person has four of the rows: the own statement says so, the one that left does not.
    (own,) = results["a"].statement.clients
    assert any("one person has 4 of the training examples" in warning for warning in own.warnings)
    shared = [path.read_text() for path in (served[0] / "server").rglob("*.json")]
    assert not any("one person has" in text for text in shared)
    told = "\n".join(record.getMessage() for record in caplog.records)
    assert "examples: 60 rows, columns messages, person" in told
    assert "15 persons with at most 4 rows; the longest has 12 tokens, none cut" in told
    assert "training loss" in told
    # A member whose server has gone has all of its own, and hands its statement over when started again.
    assert told.count("the server did not get your statement (127.0.0.1:") == 1
    assert results["d"].adapter is not None
    Client(settings(served, place, "d", **own_model, data={"train": home / "folder"})).run()
    assert caplog.text.count("the server did not get your statement") == 1
    shutil.rmtree(home / "a")
    with pytest.raises(ModelError, match="carries adapters already"):
        clients["a"].run()
