"""The closed form equals autograd, whatever the decoder, the head, the company and the wrapper."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from devices import here
from fedmosaic.client.model.examples import IGNORED, EncodedExample
from fedmosaic.client.model.fingerprint import fingerprint
from fedmosaic.client.profile import probe as probe_module
from fedmosaic.client.profile.probe import adapters_disabled, gradient_factors, open_probe
from fedmosaic.privacy.mechanism.projection import GradientFactors
from fedmosaic.protos.errors import ModelError
from tiny import tiny_decoder

pytestmark = pytest.mark.usefixtures("device")
STORIES = Path(__file__).parents[3].parent / "shared" / "models" / "stories-260k"
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "phi3")


def tiny(
    architecture: str = "llama", *, tied: bool = True, seed: int = 0, **changes: object
) -> PreTrainedModel:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": tied}
    sizes = {"intermediate_size": 40, "vocab_size": 50} | changes
    model = tiny_decoder(architecture, 24, 2, **special, **sizes)
    model.train()
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        # Norm weights of one would hide a forgotten gain, small weights a wrong Jacobian.
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return here(model)


def encoded(prompt: int, answer: int, seed: int = 0, vocabulary: int = 50) -> EncodedExample:
    generator = torch.Generator().manual_seed(1000 * seed + 10 * prompt + answer)
    ids = torch.randint(3, vocabulary, (prompt + answer,), generator=generator)
    labels = ids.clone()
    labels[:prompt] = IGNORED
    return EncodedExample(f"{seed}-{prompt}-{answer}", ids, labels)


EXAMPLES = [encoded(4, 3), encoded(9, 1), encoded(2, 8), encoded(6, 5), encoded(1, 1)]


def autograd_gradient(model: PreTrainedModel, example: EncodedExample) -> torch.Tensor:
    weight = model.get_parameter(f"model.layers.{model.config.num_hidden_layers - 1}.mlp.down_proj.weight")
    logits = model(input_ids=example.input_ids[None].to(model.device)).logits[0].cpu()
    loss = torch.nn.functional.cross_entropy(logits[:-1], example.labels[1:], ignore_index=IGNORED)
    gradient: torch.Tensor = torch.autograd.grad(loss, weight)[0]
    return gradient.cpu()


def matrix(factors: GradientFactors) -> np.ndarray:
    return factors.delta.T @ factors.inputs


def assert_equal_to_autograd(model: PreTrainedModel, examples: list[EncodedExample]) -> None:
    found = list(gradient_factors(open_probe(model), examples))
    for example, factors in zip(examples, found, strict=True):
        expected = autograd_gradient(model, example).numpy()
        atol = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(matrix(factors), expected, rtol=1e-4, atol=atol)
        assert len(factors.delta) == int((example.labels[1:] != IGNORED).sum())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_equals_autograd(architecture: str, tied: bool) -> None:
    assert_equal_to_autograd(tiny(architecture, tied=tied), EXAMPLES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_example_has_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    probe = open_probe(here(tiny(), dtype))
    company = [encoded(index % 7 + 1, index % 11 + 1, seed=index) for index in range(60)]
    together = list(gradient_factors(probe, company))
    backwards = list(gradient_factors(probe, company[::-1]))[::-1]
    for index in (0, 13, 59):
        (single,) = gradient_factors(probe, [company[index]])
        for other in (together[index], backwards[index]):
            assert np.array_equal(single.delta, other.delta)
            assert np.array_equal(single.inputs, other.inputs)


def test_a_probe_that_remembers_the_longest_text_is_refused() -> None:
    with pytest.raises(ModelError, match="longest text so far"):
        open_probe(tiny(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}))


def test_small_chunks_of_the_vocabulary_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "VOCABULARY_PER_CHUNK", 7)
    assert_equal_to_autograd(tiny(), EXAMPLES)


def test_example_without_supervised_token_has_no_factors() -> None:
    ids = torch.tensor([5, 6, 7])
    examples = [EncodedExample("a", ids, torch.full((3,), IGNORED)), encoded(2, 2)]
    found = list(gradient_factors(open_probe(tiny()), examples))
    assert found[0].delta.shape == (0, 24)
    assert found[0].inputs.shape == (0, 40)
    assert len(found[1].delta) == 2
    (whole,) = gradient_factors(open_probe(tiny()), [EncodedExample("b", ids, ids)])
    assert len(whole.delta) == 2, "nothing predicts the first token"


def test_bfloat16_forward_with_float32_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "VOCABULARY_PER_CHUNK", 16)
    model = tiny()
    half = tiny().bfloat16()
    found = list(gradient_factors(open_probe(half), EXAMPLES))
    for index, example in enumerate(EXAMPLES):
        assert found[index].delta.dtype == np.float32
        expected = autograd_gradient(model, example).numpy()
        cosine = np.vdot(matrix(found[index]), expected) / (
            np.linalg.norm(matrix(found[index])) * np.linalg.norm(expected)
        )
        assert cosine > 0.98


def test_training_mode_and_hooks_are_left_as_found() -> None:
    model = tiny(attention_dropout=0.5).requires_grad_(False)
    open_mode = open_probe(model)
    model.train()
    model.model.layers[0].eval()
    first = list(gradient_factors(open_mode, EXAMPLES))
    second = list(gradient_factors(open_mode, EXAMPLES))
    assert np.array_equal(matrix(first[0]), matrix(second[0]))
    assert [model.training, *(layer.training for layer in model.model.layers)] == [True, False, True]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


def with_lora(model: PreTrainedModel) -> torch.nn.Module:
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj", "q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return adapted


def test_disabled_adapters_do_not_touch_the_probe() -> None:
    plain = list(gradient_factors(open_probe(tiny()), EXAMPLES))
    adapted = with_lora(tiny())
    probe = open_probe(adapted)
    assert probe.intermediate_size == 40
    with adapters_disabled(adapted):
        found = list(gradient_factors(probe, EXAMPLES))
    for left, right in zip(found, plain, strict=True):
        np.testing.assert_allclose(matrix(left), matrix(right), rtol=1e-5, atol=1e-7)
    leaking = list(gradient_factors(probe, EXAMPLES))
    assert not np.allclose(matrix(leaking[0]), matrix(plain[0]), rtol=1e-2)


def test_fingerprint_knows_the_weights_and_only_them() -> None:
    original = fingerprint(tiny())
    assert fingerprint(tiny()) == original
    assert fingerprint(tiny().bfloat16()) == original
    assert fingerprint(with_lora(tiny())) == original
    assert open_probe(with_lora(tiny())).sha256 == original
    assert fingerprint(tiny(seed=1)) != original
    changed = tiny()
    with torch.no_grad():
        changed.get_parameter("model.layers.0.mlp.up_proj.weight")[3, 3] += 0.5
    assert fingerprint(changed) != original


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("granite", {"logits_scaling": 8.0}, "without scaling"),
        ("granite", {"residual_multiplier": 0.5}, "unscaled"),
        ("gemma2", {"head_dim": 6}, "closed form"),
        ("olmo2", {}, "closed form"),
        ("cohere", {}, "needs an RMSNorm"),
        ("gpt_neox", {}, "down_proj"),
    ],
)
def test_architectures_where_the_closed_form_does_not_hold_are_refused(
    architecture: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        open_probe(tiny(architecture, **changes))


def test_what_is_no_language_model_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot be a probe"):
        open_probe(torch.nn.Linear(2, 2))


@pytest.mark.real_models
@pytest.mark.skipif(not STORIES.exists(), reason="the pretrained stories-260k is not here")
def test_pretrained_weights_equal_autograd() -> None:
    model = here(AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32))
    assert_equal_to_autograd(model, [encoded(20, 12, vocabulary=512), encoded(3, 30, vocabulary=512)])
