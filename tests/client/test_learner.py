"""What a client's model is compared with before anything is trained, charged or sent."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from fedmosaic.client.learner import ModelLearner
from fedmosaic.client.progress import Progress
from fedmosaic.client.settings import ClientSettings
from fedmosaic.privacy.federation.terms import Terms
from fedmosaic.protos.errors import ConfigurationError
from tiny import save_tiny_model

PROFILE = {
    "probe": "tiny",
    "probe_sha256": "0" * 64,
    "reduction": {"hidden_size": 32, "intermediate_size": 48, "projection_dimensions": 16},
}


def test_a_family_vector_of_another_length_than_agreed_is_refused_with_its_length(tmp_path: Path) -> None:
    model = save_tiny_model(
        tmp_path / "model",
        ["a", "b", "yes", "no"],
        {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        kind=(LlamaForCausalLM, LlamaConfig),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    rows = [{"id": f"e{i}", "prompt": "ab"[i % 2], "answer": ("yes", "no")[i % 2]} for i in range(4)]
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ClientSettings.model_validate(
        {
            "kit": tmp_path,
            "server": "127.0.0.1:1",
            "state_dir": tmp_path / "state",
            "model": {"path": str(model)},
            "probe": {"path": str(model)},
            "data": {"train": train},
            "training": {"steps": 1, "max_length": 32},
        }
    )
    # q, k, v, o, gate, up and down of the one layer of three that carries no core, at rank 4.
    size = 4 * sum((64, 48, 48, 64, 80, 80, 80))
    terms = {"profile": PROFILE, "adapter": {"rank": 4, "blocks": 2, "family_dimensions": {"llama": size}}}
    ModelLearner(settings, Terms.model_validate(terms), "llama", Progress())
    terms["adapter"]["family_dimensions"] = {"llama": size + 1}
    with pytest.raises(ConfigurationError, match=f"shares {size + 1:,} .* has {size:,}.*'llama' = {size}"):
        ModelLearner(settings, Terms.model_validate(terms), "llama", Progress())
