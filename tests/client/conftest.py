"""State directories of clients whose adapters hold numbers, as a run leaves them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from builders import tiny_mechanism
from fedmosaic.client.learner import ModelLearner
from fedmosaic.client.progress import Progress
from fedmosaic.client.result.saved import SavedModel
from fedmosaic.client.settings import ClientSettings
from fedmosaic.client.statement import HANDED_OVER, STATEMENT
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.federation.terms import AdapterTerms, Terms
from fedmosaic.privacy.ledger.ledger import Ledger
from fedmosaic.privacy.statement.build import statement
from fedmosaic.privacy.statement.models import ClientInputs, PrivacyStatement, StatementInputs
from fedmosaic.privacy.statement.shareable import shareable
from tiny import save_tiny_model

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
WORDS = [*(f"w{i}" for i in range(30)), "yes", "no"]
KINDS = {"llama": (LlamaForCausalLM, LlamaConfig), "mistral": (MistralForCausalLM, MistralConfig)}


@dataclass
class Left:
    """What a client has left."""

    state: Path
    learner: ModelLearner
    settings: ClientSettings
    terms: Terms

    @property
    def model(self) -> PeftModel:
        return self.learner.trained[0]


def save_model(folder: Path, kind: str) -> Path:
    if folder.exists():
        return folder
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return save_tiny_model(folder, WORDS, SPECIAL, kind=KINDS[kind], seed=5, **sizes, **heads)


def write_rows(path: Path, count: int, start: int = 0) -> Path:
    rows = [
        {"id": f"e{i}", "prompt": f"w{i % 30}", "answer": ("yes", "no")[i % 3 == 0], "choices": ["yes", "no"]}
        for i in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def agreed(protection: str, family: str) -> Terms:
    adapter = AdapterTerms(rank=4, blocks=2, protection=protection)
    if family:
        # q, k, v, o, gate, up and down of the one layer that carries no Co-LoRA.
        widths = (64, 48, 48, 64, 80, 80, 80)
        adapter = adapter.model_copy(update={"family_dimensions": {family: 4 * sum(widths)}})
    return Terms(
        adapter=adapter,
        profile=tiny_mechanism((32, 48, 16)),
        encryption={"backend": "ckks" if "encrypted" in protection else "plain"},
        allow_plaintext="encrypted" not in protection,
    )


def statements(place: Path, protection: str, *, secure: bool = True) -> dict[str, PrivacyStatement]:
    with Ledger.open(
        place / f"books-{protection}", "ada", 1e-3, 8.0, accountant="rdp", budgeted_channels=("adapter",)
    ) as book:
        if "dp" in protection:
            event = GaussianEvent(2.0, 0.1, 10)
            epoch = "0" * 64
            book.reserve(
                "adapter", 1, event, data_epoch=epoch, secure_noise=secure, clipping_norm=1.0, dimensions=8
            )
        client = ClientInputs(ledger=tuple(book.export()), client_id="ada", adapter_protection=protection)
    inputs = StatementInputs(run_id="0" * 32, clients=(client,), roster_sha256="1" * 64)
    return {STATEMENT: statement(inputs), HANDED_OVER: shareable(inputs)}


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def leave(tmp_path: Path, models_folder: Path) -> Callable[..., Left]:
    """Make the state directory of a client whose run is over."""

    def make(kind: str = "llama", protection: str = "none", family: str = "", **changes: Any) -> Left:
        folder, state = save_model(models_folder / kind, kind), tmp_path / "state"
        secure = changes.pop("secure", True)
        train, test = write_rows(tmp_path / "train.jsonl", 12), write_rows(tmp_path / "test.jsonl", 9, 12)
        training = {"steps": 2, "max_length": 32, "learning_rate": 1e-2, **changes}
        model = {"path": str(folder)}
        parts = {"model": model, "probe": model, "data": {"train": train, "test": test}, "training": training}
        place = {"kit": tmp_path, "server": "127.0.0.1:1", "state_dir": state}
        settings = ClientSettings.model_validate(place | parts | {"compare_alone": True})
        terms = agreed(protection, family)
        learner = ModelLearner(settings, terms, family, Progress())
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in sorted(learner.trained[0].named_parameters()):
                if "colora_" in name:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        adapter = state / "adapter" / "round-0003"
        adapter.mkdir(parents=True)
        learner.save(adapter)
        blended = settings.training.blend_received
        agreed_on = {"protection": terms.adapter.protection, "backend": terms.encryption.backend}
        own = {"model": settings.model, "max_length": 32, "blend_received": blended}
        SavedModel(federation="clinics", client="ada", rounds=3, **agreed_on, **own).write(state)
        for name, made in statements(tmp_path, protection, secure=secure).items():
            (state / name).write_text(made.model_dump_json())
        return Left(state, learner, settings, terms)

    return make
