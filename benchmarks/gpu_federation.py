"""The scenario of many clients of one architecture, on the demo's data."""

import json
from pathlib import Path

from fedmosaic.client.assets import cache_directory
from fedmosaic.experiments.demo.data import build_demo_data


def write_scenario(folder: Path, model: Path, *, clients: int, rounds: int) -> Path:
    """Split the demo's data over many clients and write the scenario.

    Args:
        folder: Where to write.
        model: Folder of every client's model, which is the probe too.
        clients: How many; each has about 80 examples of one of the demo's five tasks.
        rounds: Of the federation.

    Returns:
        The scenario file.
    """
    data = build_demo_data(cache_directory())
    folder.mkdir(parents=True, exist_ok=True)
    tables = []
    for index in range(clients):
        owner = data.clients[index % len(data.clients)]
        part, parts = index // len(data.clients), -(-clients // len(data.clients))
        train = folder / f"train-{index:02}.jsonl"
        train.write_text("".join(owner.train.read_text().splitlines(keepends=True)[part::parts]))
        tables += [
            "[[clients]]",
            f'id = "client-{index:02}"',
            f'task = "{owner.task}"',
            'family = "one"',
            f'train = "{train.resolve()}"',
            f'test = "{owner.test.resolve()}"',
            f"model = {_model(model)}",
            "",
        ]
    scenario = folder / "many.toml"
    head = f"""name = "many"
score = "own"
evaluation_examples = 20
probe = {_model(model)}

[profile]
public_data = "{data.public.resolve()}"
max_length = 64

[relevance]
temperature = 0.2

[schedule]
rounds = {rounds}
quorum = {clients}

[training]
steps = 10
max_length = 64

"""
    scenario.write_text(head + "\n".join(tables))
    return scenario


def _model(folder: Path) -> str:
    return f'{{ path = {json.dumps(str(folder.resolve()))}, dtype = "auto", device = "auto" }}'
