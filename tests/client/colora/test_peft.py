"""Co-LoRA under everything users do with a PEFT method."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from fedmosaic.client.colora import (
    CoLoraConfig,
    fix_gate,
    get_basis,
    read_shared,
    set_active_branches,
    set_basis,
    set_trainable,
)
from fedmosaic.client.colora.config import PEFT_TYPE, SPOKEN_TYPE
from fedmosaic.client.colora.layer import CoLoraLayer
from fedmosaic.client.colora.linear import draw_orthonormal
from fedmosaic.client.colora.model import CoLoraModel
from fedmosaic.client.model.load import save_adapter
from fedmosaic.protos.errors import ModelError
from tiny import copied, tiny_llava
from tiny import tiny_decoder as tiny

IDS = torch.arange(20).view(2, 10) % 64


def config(**changes: Any) -> CoLoraConfig:
    return CoLoraConfig(**{"r": 4, "blocks": 2, "task_type": "CAUSAL_LM", **changes})


def fill(model: nn.Module, scale: float = 0.2) -> None:
    """Put numbers into every branch and gate."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "colora_" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


@copied
def filled(kind: str = "llama", scale: float = 0.2, **changes: object) -> PeftModel:
    model = get_peft_model(tiny(kind), config(**changes))
    fill(model, scale)
    return model


def train(model: nn.Module, steps: int = 3) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_as_the_base_model_and_then_learns(kind: str, dtype: torch.dtype) -> None:
    base = nn.Module.to(tiny(kind), dtype)
    before = base(IDS).logits
    model = get_peft_model(base, config(personal_branch=True))
    assert torch.equal(model(IDS).logits, before)
    start = {name: p.clone() for name, p in model.named_parameters()}
    losses = train(model, 5)
    assert losses[-1] < losses[0] - 0.01
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name in start if "colora_" in name and "global" not in name}


@pytest.mark.parametrize("depth", [2, 5])
def test_layers_are_chosen_by_relative_depth_and_written_into_the_configuration(depth: int) -> None:
    given = config()
    model = get_peft_model(tiny(depth=depth), given)
    resolved = model.peft_config["default"]
    assert isinstance(resolved, CoLoraConfig)
    assert resolved.shared_layers == ([0, 1] if depth == 2 else [2, 4])
    assert resolved.model_depth == depth
    assert "self_attn.q_proj" in (resolved.target_modules or ())
    assert given.shared_layers is None, "the caller's configuration stays usable for another model"
    with_core = {n.split(".")[4] for n, _ in model.named_parameters() if "colora_core" in n}
    with_lora = {n.split(".")[4] for n, _ in model.named_parameters() if "colora_lora" in n}
    assert with_core == {str(layer) for layer in resolved.shared_layers}
    assert with_lora == {str(layer) for layer in range(depth)} - with_core


def test_a_rank_above_the_width_of_a_module_is_refused() -> None:
    with pytest.raises(ModelError, match="Rank 40 is above the width 32"):
        get_peft_model(tiny(), config(r=40))


def test_saving_and_loading_keeps_every_tensor(tmp_path: Path) -> None:
    model = filled("qwen2", personal_branch=True, alpha=7.0)
    fresh = {
        name: (draw_orthonormal(a.shape[1], 4, 50).T, draw_orthonormal(b.shape[0], 4, 51))
        for name, (a, b) in get_basis(model).items()
    }
    set_basis(model, fresh, label="aligned:test")
    model.save_pretrained(str(tmp_path))
    on_disk = load_file(tmp_path / "adapter_model.safetensors")
    assert {"colora_A", "colora_B", "colora_gate"} <= {key.split(".")[-1] for key in on_disk}
    loaded = PeftModel.from_pretrained(tiny("qwen2"), tmp_path)
    theirs = get_peft_model_state_dict(loaded)
    ours = get_peft_model_state_dict(model)
    assert ours.keys() == theirs.keys() == on_disk.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(model(IDS).logits, loaded(IDS).logits)
    for again in (loaded.peft_config["default"], PeftConfig.from_pretrained(str(tmp_path))):
        assert isinstance(again, CoLoraConfig)
        assert again.basis_label == "aligned:test"
    with loaded.disable_adapter():
        loaded(IDS)
    assert not any(flags(loaded).values()), "an adapter loaded for inference is frozen and stays so"
    resumed = PeftModel.from_pretrained(tiny("qwen2"), tmp_path, is_trainable=True)
    assert flags(resumed) == flags(model)


def test_loading_with_meta_tensors_first_gives_the_same(tmp_path: Path) -> None:
    model = filled(personal_branch=True)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(model(IDS).logits, loaded(IDS).logits)
    assert not any(parameter.is_meta for parameter in loaded.parameters())


def test_auto_classes_load_base_and_adapter(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config())
    fill(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


def test_a_saved_adapter_computes_with_the_branches_and_gates_of_training(tmp_path: Path) -> None:
    model = filled()
    set_active_branches(model, {"local"}, layers="family")
    fix_gate(model, 0.25, layers="shared")
    save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    assert torch.equal(model(IDS).logits, loaded(IDS).logits)


def test_peft_without_this_package_says_what_to_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get_peft_model(tiny(), config()).save_pretrained(str(tmp_path))
    for name in (PEFT_TYPE, SPOKEN_TYPE):  # as importing the package has registered them
        monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, name)  # type: ignore[misc]  # keyed by the closed enum
    with pytest.raises((KeyError, ValueError), match=r"import fedmosaic\.client\.colora"):
        PeftConfig.from_pretrained(str(tmp_path))


def test_an_adapter_of_another_depth_is_refused(tmp_path: Path) -> None:
    get_peft_model(tiny(depth=3), config()).save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match="3 decoder layers, this one has 4"):
        PeftModel.from_pretrained(tiny(depth=4), tmp_path)


@pytest.mark.parametrize(
    "groups", [set(), {"local"}, {"personal", "gate"}, {"global"}, {"local", "global", "personal", "gate"}]
)
def test_leaving_disable_adapter_changes_nothing(groups: set[str]) -> None:
    before, model = tiny()(IDS).logits, filled(personal_branch=True)
    set_trainable(model, groups)
    set_active_branches(model, {"local", "personal"}, layers="shared")
    adapted, trained = model(IDS).logits, flags(model)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, before)
        assert flags(model) == trained
    assert flags(model) == trained
    assert torch.equal(model(IDS).logits, adapted)
    assert not torch.allclose(adapted, before)


def test_two_adapters_are_separate_and_can_be_summed() -> None:
    model = filled()
    first = model(IDS).logits
    model.add_adapter("other", config(personal_branch=True, r=2))
    assert torch.equal(model(IDS).logits, first), "a new adapter is not active"
    model.set_adapter("other")
    assert all("other" in name for name, flag in flags(model).items() if flag)
    assert not torch.allclose(model(IDS).logits, first)
    train(model)
    second = model(IDS).logits
    model.set_adapter("default")
    assert torch.equal(model(IDS).logits, first)
    assert all("default" in name and "global" not in name for name, flag in flags(model).items() if flag)
    assert isinstance(model.base_model, CoLoraModel)
    model.base_model.set_adapter(["default", "other"])
    both = model(IDS).logits
    assert not torch.allclose(both, first)
    assert not torch.allclose(both, second)
    with pytest.raises(ModelError, match="2 adapters are active"):
        read_shared(model)
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(model(IDS).logits, first)


def test_the_choice_of_what_is_trained_survives_switching_adapters() -> None:
    model = get_peft_model(tiny(), config(personal_branch=True))
    set_trainable(model, {"personal"})
    before = flags(model)
    model.add_adapter("other", config())
    model.set_adapter("other")
    model.set_adapter("default")
    after = flags(model)
    assert {name: after[name] for name in before} == before


def test_adapters_that_disagree_on_the_kind_of_a_layer_are_refused() -> None:
    model = get_peft_model(tiny(), config())
    with pytest.raises(ModelError, match="Co-LoRA in one adapter and ordinary LoRA in another"):
        model.add_adapter("other", config(shared_layers=[0, 1]))


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}], ids=["", "tied"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_a_merged_model_keeps_the_biases_of_q_when_it_is_saved(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = get_peft_model(tiny(kind, **options), config(personal_branch=True))
    fill(model, 0.1)
    before = model(IDS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(merged(IDS).logits, before, rtol=1e-4, atol=1e-5)
    assert not [module for module in merged.modules() if isinstance(module, CoLoraLayer)]
    assert isinstance(merged, PreTrainedModel)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(IDS).logits, before, rtol=1e-4, atol=1e-5)


def test_merging_warns_where_no_architecture_describes_the_biases() -> None:
    base = tiny("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0)
    model = get_peft_model(base, config())
    fill(model, 0.1)
    before = model(IDS).logits
    with pytest.warns(UserWarning, match="none in a Qwen2ForCausalLM"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, before, rtol=1e-4, atol=1e-5)


def test_merging_an_adapter_that_learned_nothing_changes_nothing_and_warns_of_nothing() -> None:
    base = tiny()
    keys = set(base.state_dict())
    model = get_peft_model(base, config())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        merged = model.merge_and_unload()
    assert set(merged.state_dict()) == keys


def test_disabling_a_merged_adapter_gives_the_base_model() -> None:
    before, model = tiny()(IDS).logits, filled(scale=0.1)
    adapted = model(IDS).logits
    model.merge_adapter()
    torch.testing.assert_close(model(IDS).logits, adapted, rtol=1e-3, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(IDS).logits, adapted, rtol=1e-4, atol=1e-5)


def test_a_refused_merge_leaves_the_whole_model_as_it_was() -> None:
    model = filled()
    # Only the last module is quantised, so that a naive merge would get far before it fails.
    last = [module for module in model.modules() if isinstance(module, CoLoraLayer)][-1]
    last.linear.weight = nn.Parameter(last.linear.weight.to(torch.int8), requires_grad=False)
    base = {name: t.clone() for name, t in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ModelError, match="quantised"):
            merge()
        assert all(torch.equal(t, base[name]) for name, t in model.state_dict().items())


def test_generation_is_the_same_with_and_without_a_cache() -> None:
    model = filled()
    cached, plain = (
        model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=use)
        for use in (True, False)
    )
    assert cached.shape == (2, 14)
    assert torch.equal(cached, plain)


def test_llava_trains_its_language_part_only() -> None:
    options: dict[str, Any] = {"vision_feature_layer": -1, "vision_feature_select_strategy": "default"}
    base = tiny_llava(tiny().config, image_token_index=63, **options)
    model = get_peft_model(base, config())
    trained = [name for name, flag in flags(model).items() if flag]
    assert trained
    assert all(".language_model.layers." in name for name in trained)
    ids = torch.tensor([[1, 63, 63, 63, 63, 5, 6]])
    model(input_ids=ids, pixel_values=torch.randn(1, 3, 8, 8), labels=ids).loss.backward()
    assert all(model.get_parameter(name).grad is not None for name in trained)
