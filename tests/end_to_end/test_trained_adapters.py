"""Training over encrypted aggregates ends where training over plain ones ends, for real models.

Five clients train three rounds, so every final P and Q has gone through two aggregates. Runs differ in the
back end only: same seeds, same profile noise, same integer weights. One run of the back end `plain` is the
reference, a second shows that nothing else varies.

What a difference in the aggregates does to the trained adapters depends on model, data and optimizer, so the
tolerance is measured and not chosen: in a control run of `plain`, every value of every received aggregate is
moved by a random amount within ±1e-5, the accuracy that the back ends promise. Encryption may move the
trained adapters no further than that, in root mean square; single values may scatter by a factor of 4.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from end_to_end import federation_of_vectors as fv
from fedmosaic.client.learner import ModelLearner
from fedmosaic.client.progress import Progress
from fedmosaic.client.settings import ClientSettings
from fedmosaic.privacy.federation.terms import AdapterTerms, Terms
from tiny import save_tiny_model

SHARED_MODEL = Path(__file__).parents[2].parent / "shared" / "models" / "stories-260k"
WEIGHT_BITS = 12
PROMISED = 1e-5
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
WORDS = (
    "red blue cat dog sun moon the a is was big small runs sees and not up down here there old new day "
    "night tree bird fish house car road"
).split()


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_model(folder: Path) -> Path:
    """A Llama of random weights with a tokenizer of thirty words."""
    return save_tiny_model(folder, WORDS, SPECIAL, num_key_value_heads=1)


def write_examples(path: Path, seed: int) -> None:
    """A task of this client's own: the answer repeats the prompt's words from a place that the seed gives."""
    generator = np.random.default_rng(seed)
    lines = []
    for number in range(24):
        words = [str(word) for word in generator.choice(WORDS, 6)]
        answer = " ".join(words[seed:] + words[:seed])
        lines.append({"id": f"e{number}", "prompt": " ".join(words), "answer": answer, "choices": []})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def agreed_terms(backend: str, rounds: int = 3) -> Terms:
    terms = fv.terms(backend, rounds)
    adapter = AdapterTerms(rank=4, blocks=2, alpha=8.0, protection=terms.adapter.protection)
    encryption = terms.encryption.model_copy(update={"weight_bits": WEIGHT_BITS})
    return Terms.model_validate(
        {**terms.model_dump(), "adapter": adapter, "encryption": encryption.model_dump()}
    )


class PerturbedLearner(ModelLearner):
    """Receives aggregates that are off by as much as the back ends may be."""

    def load_global(self, section: str, vector: np.ndarray) -> None:
        generator = np.random.default_rng(int(np.abs(vector).sum() * 1e6))
        super().load_global(section, vector + generator.uniform(-PROMISED, PROMISED, vector.shape))


@dataclass
class ModelClient(fv.SeededClient):
    """A client of the federation with a model, and with noise that repeats."""

    model: Path = Path()
    kind: Callable[..., ModelLearner] = ModelLearner
    training: dict[str, float] = field(default_factory=lambda: {"steps": 2, "shared_learning_rate": 1e-3})
    data: dict[str, Path] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)

    def make_learner(self, agreed: Terms) -> ModelLearner:
        folder = self.directory / "clients" / self.name
        write_examples(folder / "train.jsonl", self.seed)
        settings = ClientSettings.model_validate(
            {
                "kit": folder,
                "server": "127.0.0.1:1",
                "state_dir": folder / "state",
                "model": {"path": str(self.model)},
                "probe": {"path": str(self.model)},
                "data": {"train": folder / "train.jsonl"} | self.data,
                "training": {"per_device_train_batch_size": 4, "max_length": 64} | self.training,
            }
        )
        return self.kind(settings, agreed, "", self.progress)


def trained(
    directory: Path, backend: str, model: Path, kind: Callable[..., ModelLearner] = ModelLearner
) -> dict[str, np.ndarray]:
    """Run a federation to its end; (d,) final P and Q by client, float64."""
    fv.make_federation(directory, agreed_terms(backend))
    coordinator = fv.coordinator_of(directory)
    clients = {
        name: ModelClient(directory, name, seed, model=model, kind=kind)
        for seed, name in enumerate(fv.MEMBERS)
    }
    sessions = {name: c.session(fv.in_process(coordinator, name)) for name, c in clients.items()}
    started = {name: c.learner.sections()["shared"] for name, c in clients.items()}
    assert fv.run_all(sessions) == {}
    results: Any = coordinator.summary()["results"]
    assert [len(result["weights"]["shared"]) for result in results] == [len(clients)] * 3
    coordinator.close()
    found = {}
    for name, client in clients.items():
        client.close()
        found[name] = client.learner.sections()["shared"].astype(np.float64)
        assert np.abs(found[name] - started[name]).max() > 1e-3, "training must have moved P and Q"
    return found


def distance(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """Root mean square and maximum of the differences, over all clients."""
    difference = np.concatenate([left[name] - right[name] for name in sorted(left)])
    return float(np.sqrt(np.mean(difference**2))), float(np.abs(difference).max())


@pytest.mark.parametrize(
    "model", ["random", pytest.param("stories-260k", marks=[pytest.mark.real_models, pytest.mark.slow])]
)
def test_trained_adapters_agree_with_those_of_a_run_in_the_clear(tmp_path: Path, model: str) -> None:
    if model == "random":
        folder = random_model(tmp_path / "model")
    elif SHARED_MODEL.exists():
        folder = SHARED_MODEL
    else:
        pytest.skip(f"needs the model in {SHARED_MODEL}")
    plain = trained(tmp_path / "plain", "plain", folder)
    assert distance(plain, trained(tmp_path / "again", "plain", folder)) == (0.0, 0.0)
    control = distance(plain, trained(tmp_path / "control", "plain", folder, PerturbedLearner))
    for backend in ("ckks", "mask"):
        found = distance(plain, trained(tmp_path / backend, backend, folder))
        print(f"{model} {backend}: rms {found[0]:.2e} max {found[1]:.2e}, control {control}")
        assert 0.0 < found[0] <= control[0], f"{backend}: root mean square {found[0]:.2e}"
        assert found[1] <= 4 * control[1], f"{backend}: largest difference {found[1]:.2e}"
        assert found[1] <= PROMISED, "training does not even amplify the differences here"
