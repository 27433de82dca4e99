"""What is exported computes what the client's own model computes, holds what its card says, and no more."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedmosaic.client.colora import CoLoraConfig, read_shared, set_active_branches
from fedmosaic.client.model.examples import Example
from fedmosaic.client.model.scoring import Examiner
from fedmosaic.client.result import export
from fedmosaic.client.result.saved import Opening, read_saved
from fedmosaic.client.settings import IN_MEMORY
from fedmosaic.client.statement import HANDED_OVER
from fedmosaic.protos.errors import ConfigurationError, ModelError, PrivacyError, StateError

Left = Any
Leave = Callable[..., Left]
PROMPTS = ["w1 w2", "w3", "w4 w5 w6 yes w7"]
IDS = torch.arange(5, 25).view(2, 10)


def texts(model: torch.nn.Module, left: Left) -> list[str]:
    asked = [Example(prompt, prompt, "") for prompt in PROMPTS]
    return Examiner(model, left.learner.trained[1], 2, 32).written(asked, 6)


def written(left: Left, out: Path, *options: str) -> Path:
    assert export.main([str(left.state), "--out", str(out), *options]) == 0
    return out


def base_of(left: Left) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(left.settings.model.path)


CLIENTS = [("llama", "none", ""), ("mistral", "dp", ""), ("llama", "encrypted", "small-llama")]


@pytest.mark.parametrize(("kind", "protection", "family"), CLIENTS)
def test_every_form_writes_the_text_that_the_client_writes(
    leave: Leave, tmp_path: Path, kind: str, protection: str, family: str
) -> None:
    left = leave(kind, protection, family)
    expected, own = texts(left.model, left), left.model(IDS).logits
    for form in ("colora", "lora", "merged"):
        out = written(left, tmp_path / form, "--format", form)
        loaded: torch.nn.Module
        if form == "merged":
            loaded = AutoModelForCausalLM.from_pretrained(out)
        else:
            loaded = PeftModel.from_pretrained(base_of(left), out)
        # What is merged adds up in another order; float32.
        torch.testing.assert_close(loaded(IDS).logits, own, rtol=1e-5, atol=1e-5)
        assert texts(loaded, left) == expected
    assert isinstance(PeftConfig.from_pretrained(str(tmp_path / "lora")), LoraConfig)
    opened = Opening(state=left.state).open()
    assert torch.equal(opened.model(IDS).logits, own)


def test_the_rank_is_the_adapters_unless_a_layer_has_two_branches(leave: Leave, tmp_path: Path) -> None:
    for name, family, expected in (("one", "", 4), ("two", "small-llama", 8)):
        left = leave("llama", "none", family)
        config = PeftConfig.from_pretrained(str(written(left, tmp_path / name, "--format", "lora")))
        assert config.r == expected
        # llama.cpp reads one alpha for all modules, vLLM one rank: both are right where all have the same.
        assert (config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (expected, {}, {})
        shutil.rmtree(left.state)


def test_the_recipes_of_the_cards_need_nothing_of_this_package(
    leave: Leave, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, recipes = leave("llama", "none"), {}
    for form in ("merged", "lora"):
        out = written(left, tmp_path / form, "--format", form)
        recipe = (out / "README.md").read_text().split("```python")[1].split("```")[0]
        recipes[form] = recipe.replace("path/to/this/folder", str(out))
    assert 'dtype="float32")' in recipes["lora"]
    expected = left.model(IDS).logits
    # The base model is called by its folder's last name, so that its place on this machine is not told.
    monkeypatch.chdir(Path(left.settings.model.path).parent)
    for name in [name for name in sys.modules if name.partition(".")[0] == "fedmosaic"]:
        monkeypatch.setitem(sys.modules, name, None)  # as where it is not installed: it cannot be imported
    for known in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        monkeypatch.delitem(known, "COLORA")  # type: ignore[misc]  # keyed by the closed enum
    for recipe in recipes.values():
        names: dict[str, Any] = {}
        exec(recipe, names)  # noqa: S102  # the recipe is a program
        torch.testing.assert_close(names["model"](IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_no_file_tells_where_anything_is_on_this_machine(leave: Leave, tmp_path: Path) -> None:
    left = leave("mistral", "none")
    for form in ("colora", "lora", "merged"):
        out = written(left, tmp_path / form, "--format", form)
        for file in out.iterdir():
            content = file.read_bytes()
            for private in (tmp_path, Path(left.settings.model.path).parent):
                assert str(private).encode() not in content, file
            assert file.stat().st_mode & 0o077 == 0


def test_the_card_says_what_is_inside_and_who_may_have_it(leave: Leave, tmp_path: Path) -> None:
    left = leave("llama", "encrypted")
    card = (written(left, tmp_path / "out") / "README.md").read_text()
    assert "Rounds: 3 of 3" in card
    assert "member alone" in card
    assert "gives away the key" in card
    assert "a decrypted weighted sum" in card
    assert re.search(r"\| one recipient \|.*∞", card)
    assert "about these files" in card
    private = leave_again(left, leave, "mistral", "dp")
    card = (written(private, tmp_path / "private") / "README.md").read_text()
    assert "personal branch, trained without differential privacy: yes" in card
    assert re.search(r"\| one recipient \| [\d.]+ \|", card)


def leave_again(left: Left, leave: Leave, *options: str) -> Left:
    left.state.rename(left.state.with_name("earlier"))
    return leave(*options)


def test_what_can_be_shared_holds_the_released_branch_and_nothing_else(leave: Leave, tmp_path: Path) -> None:
    left = leave("mistral", "dp+encrypted")
    out = written(left, tmp_path / "out", "--shareable")
    config = PeftConfig.from_pretrained(str(out))
    assert isinstance(config, CoLoraConfig)
    assert not config.personal_branch
    tensors = load_file(out / "adapter_model.safetensors")
    assert not [name for name in tensors if "personal" in name or "colora_lora" in name]
    nonzero = {name.split(".")[-2] for name, t in tensors.items() if "core" in name and t.any()}
    assert nonzero == {"colora_core_local"}
    assert not any(t.any() for name, t in tensors.items() if name.endswith("gate"))
    loaded = PeftModel.from_pretrained(base_of(left), out)
    assert np.array_equal(read_shared(loaded), read_shared(left.model))
    set_active_branches(left.model, {"local"}, layers="shared")
    set_active_branches(left.model, set(), layers="family")
    expected = left.model(IDS).logits
    torch.testing.assert_close(loaded(IDS).logits, expected)
    card = (out / "README.md").read_text()
    assert "Anybody." in card
    assert "from rounded numbers" in card
    merged = AutoModelForCausalLM.from_pretrained(
        written(left, tmp_path / "whole", "--shareable", "--format", "merged")
    )
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def blended_before(state: Path) -> None:
    """An earlier start blended in what was received, the last one did not."""
    read_saved(state).model_copy(update={"blend_received": 0.0}).write(state)


@pytest.mark.parametrize(
    ("protection", "changes", "then", "reason"),
    [
        ("none", {}, None, "nothing of the model was trained with differential privacy"),
        ("encrypted", {}, None, "gives away the key of all members"),
        ("dp+encrypted", {"blend_received": 0.5}, None, "part of a decrypted aggregate"),
        ("dp+encrypted", {"blend_received": 0.5}, blended_before, "part of a decrypted aggregate"),
        ("dp", {"secure": False}, None, "no guarantee holds"),
        ("dp", {}, lambda state: (state / HANDED_OVER).unlink(), "run is not over"),
    ],
)
def test_what_is_no_private_release_or_endangers_the_key_is_not_shared(
    leave: Leave, tmp_path: Path, protection: str, changes: dict[str, Any], then: Any, reason: str
) -> None:
    left = leave("llama", protection, **changes)
    if then is not None:
        then(left.state)
    with pytest.raises((PrivacyError, StateError), match=reason):
        export.main([str(left.state), "--out", str(tmp_path / "out"), "--shareable"])
    assert not (tmp_path / "out").exists()


def test_leaving_q_out_is_measured(leave: Leave, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = leave("llama")
    out = written(left, tmp_path / "out", "--format", "lora", "--without-bias")
    told = " ".join(capsys.readouterr().out.split())
    assert "without Q, against the client's model: largest difference of a logit" in told
    assert "Q, the constant part, is left out" in (out / "README.md").read_text()
    assert not PeftConfig.from_pretrained(str(out)).lora_bias
    loaded = PeftModel.from_pretrained(base_of(left), out)
    assert not torch.allclose(loaded(IDS).logits, left.model(IDS).logits, atol=1e-3)
    loaded.merge_and_unload()  # PEFT refuses this with a bias that the base has not


def test_refusals_leave_nothing_behind(leave: Leave, tmp_path: Path) -> None:
    left = leave("llama")
    record = left.state / "model.json"
    content = json.loads(record.read_text())
    content["model"]["quantization"] = "nf4"
    record.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"weights in 4 bits.*--format colora or lora"):
        export.main([str(left.state), "--out", str(tmp_path / "out"), "--format", "merged"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    with pytest.raises(ConfigurationError, match="there already"):
        export.main([str(left.state), "--out", str(tmp_path / "full")])
    record.unlink()
    with pytest.raises(StateError, match="no client's state directory"):
        export.main([str(left.state), "--out", str(tmp_path / "out")])
    (left.state / "session.json").touch()
    with pytest.raises(StateError, match=r"no model.json.*start `fedmosaic client`"):
        export.main([str(left.state), "--out", str(tmp_path / "out")])
    record.write_text("{}")
    with pytest.raises(StateError, match="delete that file"):
        export.main([str(left.state), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_model_that_was_handed_over_is_loaded_from_where_it_is_said_to_be(leave: Leave) -> None:
    left = leave("llama")
    record = left.state / "model.json"
    content = json.loads(record.read_text()) | {"model": IN_MEMORY.model_dump()}
    record.write_text(json.dumps(content))
    with pytest.raises(ConfigurationError, match="give --base"):
        Opening(state=left.state).open()
    opened = Opening(state=left.state, base=left.settings.model.path).open()
    assert torch.equal(opened.model(IDS).logits, left.model(IDS).logits)
