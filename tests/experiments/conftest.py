"""A federation of tiny random models on a task of counted words, on disk, as scenarios name it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fedmosaic.experiments.scenario.terms import Scenario
from tiny import tiny_llama, tiny_llava, word_tokenizer

_WORDS = [f"w{i}" for i in range(40)] + ["yes", "no", "red", "blue"]


def _save_model(folder: Path, layers: int, width: int) -> None:
    words, end = ["<unk>", "</s>", *_WORDS], "</s>"
    with torch.random.fork_rng(devices=[]):
        tiny_llama(
            layers,
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            bos_token_id=1,
            eos_token_id=1,
            initializer_range=0.2,
        ).save_pretrained(folder)
    word_tokenizer(words, eos_token=end, pad_token=end).save_pretrained(folder)


def _write(path: Path, count: int, start: int, choices: tuple[str, str]) -> None:
    generator = np.random.default_rng(start)
    lines = []
    for number in range(count):
        drawn = generator.choice(40, size=5, replace=False)
        answer = choices[int(drawn[0] % 2)]
        prompt = " ".join(f"w{i}" for i in drawn)
        record = {"id": f"{start}-{number}", "prompt": prompt, "answer": answer, "choices": list(choices)}
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two architectures, four clients' data and public data."""
    folder = tmp_path_factory.mktemp("tiny")
    _save_model(folder / "small", 2, 16)
    _save_model(folder / "large", 3, 24)
    for number in range(4):
        choices = ("yes", "no") if number < 2 else ("red", "blue")
        # A profile is released of no fewer than 50.
        _write(folder / f"train-{number}.jsonl", 55, 10 + number, choices)
        _write(folder / f"test-{number}.jsonl", 8, 50 + number, choices)
    _write(folder / "public.jsonl", 40, 90, ("yes", "no"))
    return folder


@pytest.fixture
def tiny_scenario(tiny_folder: Path) -> Any:
    """Makes scenarios over `tiny_folder`; keyword arguments replace top-level keys."""

    def make(**changes: Any) -> Scenario:
        content: dict[str, Any] = {
            "name": "tiny",
            "probe": {"path": "small"},
            "profile": {
                "public_data": "public.jsonl",
                "dimensions": 4,
                "left": 2,
                "noise_multiplier": 4.0,
                "max_length": 16,
            },
            "adapter": {"rank": 2, "blocks": 2, "protection": "none"},
            "encryption": {"backend": "plain"},
            "allow_plaintext": True,
            "policy": {"minimum_contributors": 2, "weight_cap": 0.6, "squares_cap": 1.0},
            "relevance": {"across_families": True},
            "schedule": {"rounds": 2, "quorum": 4},
            "training": {
                "steps": 2,
                "per_device_train_batch_size": 4,
                "max_length": 16,
                "learning_rate": 0.01,
                "shared_learning_rate": 0.01,
            },
            "clients": [
                {
                    "id": f"client-{n}",
                    "task": f"task-{n}",
                    "model": {"path": "small" if n % 2 else "large"},
                    "family": "small" if n % 2 else "large",
                    "train": f"train-{n}.jsonl",
                    "test": f"test-{n}.jsonl",
                }
                for n in range(4)
            ],
        }
        return Scenario.model_validate(content | changes).resolved(tiny_folder)

    return make


@pytest.fixture
def tiny_pair(tiny_scenario: Any) -> Any:
    """Makes scenarios of two clients, one of each architecture, who may receive of one another alone."""

    def make(**changes: Any) -> Scenario:
        two: dict[str, Any] = {"policy": {"minimum_contributors": 1, "weight_cap": 1.0, "squares_cap": 1.0}}
        schedule = {"rounds": 2, "quorum": 2} | changes.pop("schedule", {})
        scenario: Scenario = tiny_scenario(schedule=schedule, **two | changes)
        return scenario.model_copy(update={"clients": scenario.clients[:2]})

    return make


@pytest.fixture
def llava_folder(tmp_path: Path, tiny_folder: Path) -> Path:
    """A LLaVA with random weights: a picture of four tokens, and the small model's shape and tokenizer."""
    text = LlamaConfig.from_pretrained(tiny_folder / "small")
    folder, side = tmp_path / "llava", {"height": 8, "width": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny_llava(text, 2, image_token_index=3, image_seq_length=4).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder / "small").save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=side).save_pretrained(folder)
    return folder
