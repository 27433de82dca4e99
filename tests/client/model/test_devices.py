"""One model on every device present: the same rows, the same state, the same noise; and on a 4-bit base."""

import importlib.util
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from torch import nn
from torch.nn import functional

from fedmosaic.client.colora import CoLoraConfig, read_shared, write_shared
from fedmosaic.client.dp.checks import check_engine
from fedmosaic.client.dp.engine import clip_and_sum, core_parameters, example_gradient, only_shared_branch
from fedmosaic.client.dp.training import noisy_sum, set_gradients
from fedmosaic.client.model import hardware
from fedmosaic.client.model.examples import EncodedExample
from fedmosaic.client.model.hardware import choose_device, choose_dtype, product_seconds
from fedmosaic.client.model.load import adapt, load_base_model, load_model
from fedmosaic.client.model.training import TrainingSettings, train_local
from fedmosaic.client.settings import ClientSettings, ModelSettings
from fedmosaic.privacy.mechanism.noise import SecureNoise, SeededTestNoise
from fedmosaic.protos.errors import ModelError
from tiny import VOCABULARY, random_texts, tiny_llama, word_tokenizer

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="fedmosaic[quantization] is not there")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama on disk; its rows are whole blocks of 4-bit weights."""
    place = tmp_path_factory.mktemp("model")
    tiny_llama(hidden_size=64, intermediate_size=128, tie_word_embeddings=True).save_pretrained(place)
    names = ["<unk>", "<end>", *(f"w{number}" for number in range(2, VOCABULARY))]
    word_tokenizer(names, eos_token="<end>").save_pretrained(place)  # noqa: S106  # a token of text
    return place


def adapted(folder: Path, device: torch.device, quantization: str | None = None) -> PeftModel:
    """A model with Co-LoRA whose cores are not at zero, the same on every device."""
    settings = ModelSettings(path=str(folder), device=str(device), quantization=quantization)
    config = CoLoraConfig(r=4, alpha=8, blocks=2, personal_branch=True)
    model = adapt(load_model(settings)[0], config)
    size = len(read_shared(model))
    write_shared(model, np.random.default_rng(0).normal(0, 0.3, size).astype(np.float32), "local")
    return model


def make_examples(count: int) -> list[EncodedExample]:
    return random_texts([5 + index % 9 for index in range(count)])


def rows_of(model: nn.Module) -> torch.Tensor:
    with only_shared_branch(model) as cores:
        return torch.stack([example_gradient(model, cores, one) for one in make_examples(6)]).cpu()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_a_model_lies_where_the_settings_say_and_its_rows_are_those_of_the_processor(
    folder: Path, device: torch.device
) -> None:
    model = adapted(folder, device)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {device.type}
    assert model.config._attn_implementation == "sdpa"
    assert relative(rows_of(model), rows_of(adapted(folder, torch.device("cpu")))) < 1e-4


def test_products_are_exact_whatever_was_set_before(folder: Path, device: torch.device) -> None:
    """With TF32 the product below is off by 1e-4 and more; and so would gradients be."""
    torch.set_float32_matmul_precision("medium")
    load_base_model(folder)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(256, 256, generator=generator), torch.randn(256, 256, generator=generator)
    product = (left.to(device) @ right.to(device)).cpu().double()
    assert relative(product, left.double() @ right.double()) < 1e-6


def test_noise_is_drawn_on_the_processor_and_alike_everywhere(folder: Path, device: torch.device) -> None:
    model = adapted(folder, device)
    accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    with only_shared_branch(model) as cores:
        total = clip_and_sum(
            torch.zeros(1, sum(p.numel() for p in core_parameters(cores)), device=device), 1.0
        )
        noisy = noisy_sum(total, 1.0, 2.0, SeededTestNoise(3))
        set_gradients(core_parameters(cores), noisy)
        placed = torch.cat([p.grad.flatten() for p in core_parameters(cores) if p.grad is not None]).cpu()
    assert noisy.device.type == "cpu"
    assert np.array_equal(placed.numpy(), noisy.numpy().astype(np.float32))
    assert noisy_sum(total, 1.0, 2.0, SecureNoise()).device.type == "cpu"
    after = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    assert torch.equal(after, accelerator)


def test_what_a_device_saved_another_goes_on_with(folder: Path, device: torch.device, tmp_path: Path) -> None:
    model = adapted(folder, device)
    settings = TrainingSettings(steps=2, per_device_train_batch_size=2, learning_rate=1e-2)
    train_local(model, make_examples(6), settings, pad_token_id=0)
    model.save_pretrained(str(tmp_path))
    for other in {torch.device("cpu"), device}:
        base, _ = load_model(ModelSettings(path=str(folder), device=str(other)))
        read = PeftModel.from_pretrained(base, str(tmp_path), is_trainable=True)
        for name, tensor in read.state_dict().items():
            assert torch.equal(tensor.cpu(), model.state_dict()[name].cpu()), name
        train_local(read, make_examples(6), settings, pad_token_id=0)
        assert {tensor.device.type for tensor in read.state_dict().values()} == {other.type}


def test_recomputed_activations_train_alike(folder: Path, device: torch.device) -> None:
    plain, recomputed = adapted(folder, device), adapted(folder, device)
    settings = TrainingSettings(steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    train_local(plain, make_examples(6), settings, pad_token_id=0)
    again = settings.model_copy(update={"gradient_checkpointing": True})
    train_local(recomputed, make_examples(6), again, pad_token_id=0)
    assert not recomputed.get_base_model().is_activation_checkpointing
    for name, tensor in recomputed.named_parameters():
        assert torch.allclose(tensor, plain.get_parameter(name), atol=1e-5), name


@pytest.mark.parametrize("moved", ["before", "after"])
def test_our_private_step_trains_what_is_saved_wherever_the_model_was_moved(
    folder: Path, device: torch.device, moved: str
) -> None:
    """With Opacus a model moved late looked trained, with a loss and an ε, and had learnt nothing."""
    cpu = torch.device("cpu")
    model = adapted(folder, device if moved == "before" else cpu)
    with only_shared_branch(model) as cores:
        optimizer = torch.optim.SGD(core_parameters(cores), lr=1.0)
        model.to(device)
        check_engine(model, cores, clip=1.0)
        start = read_shared(model)
        row = example_gradient(model, cores, make_examples(1)[0])
        noisy = noisy_sum(clip_and_sum(row[None], 1.0), 1.0, 1.0, SeededTestNoise(0))
        set_gradients(core_parameters(cores), noisy)
        optimizer.step()
    assert np.allclose(read_shared(model), start - noisy.numpy(), atol=1e-5)


@needs_bitsandbytes
def test_on_4_bits_rows_equal_those_on_the_same_base_unpacked(folder: Path, device: torch.device) -> None:
    """Also after an evaluation, when bitsandbytes would repack the weights on some processors."""
    model = adapted(folder, device, "nf4")
    name = "base_model.model.model.layers.0.mlp.down_proj.base_layer.weight"
    assert model.get_parameter(name).dtype == torch.uint8
    dense = adapted(folder, device)
    # The same base with its weights unpacked: what the 4 bits stand for, in dense products.
    import bitsandbytes

    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = module.weight
            unpacked = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            dense.get_submodule(name).weight.data = unpacked.to(torch.float32)
    assert relative(rows_of(model), rows_of(dense)) < 1e-4
    with torch.no_grad():
        model(input_ids=torch.arange(8, device=device)[None])
    assert relative(rows_of(model), rows_of(dense)) < 1e-4, "evaluating changed what is trained"
    with only_shared_branch(model) as cores:
        check_engine(model, cores, clip=4.0)
    report = train_local(
        model, make_examples(6), TrainingSettings(steps=2, per_device_train_batch_size=2), pad_token_id=0
    )
    assert not any("core" in name for name in report.weights_unmoved)


@needs_bitsandbytes
def test_an_adapter_is_not_merged_into_4_bits(folder: Path, device: torch.device) -> None:
    model = adapted(folder, device, "nf4")
    with pytest.raises(ModelError, match=r"quantised \(torch.uint8\)"):
        model.merge_and_unload()
    assert rows_of(model).isfinite().all()


def test_4_bits_without_the_extra_name_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name)
    )
    with pytest.raises(ModelError, match=r"install fedmosaic\[quantization\]"):
        load_model(ModelSettings(path=str(folder), device="cpu", quantization="nf4"))


def test_settings_that_contradict_each_other_are_refused(folder: Path) -> None:
    with pytest.raises(ValidationError, match="quantised already"):
        ModelSettings(path=str(folder), gguf_file="a.gguf", quantization="nf4")
    with pytest.raises(ValidationError, match="the same to the last weight"):
        ClientSettings.__pydantic_validator__.validate_assignment(
            ClientSettings.model_construct(),  # type: ignore[call-arg]  # of which nothing is read
            "probe",
            {"path": str(folder), "quantization": "nf4"},
        )
    with pytest.raises(ValidationError, match="pattern"):
        ModelSettings(path=str(folder), device="gpu")


def test_a_device_that_is_not_there_is_refused() -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    with pytest.raises(ModelError, match=rf"'cuda:{count}', which this machine does not have; .*cpu"):
        choose_device(f"cuda:{count}")
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == (
        "cuda" if count else "mps" if torch.backends.mps.is_available() else "cpu"
    )


@pytest.mark.parametrize(
    ("seconds", "chosen"), [(1.0, torch.bfloat16), (3.0, torch.float32), (2.0, torch.float32)]
)
def test_the_faster_type_is_the_one_that_takes_less_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, seconds: float, chosen: torch.dtype
) -> None:
    times = {torch.float32: 2.0, torch.bfloat16: seconds}
    monkeypatch.setattr(hardware, "product_seconds", lambda dtype, _: times[dtype])
    with caplog.at_level("INFO"):
        assert choose_dtype("auto", torch.device("cpu")) == chosen
    assert "since a small product took" in caplog.text
    monkeypatch.undo()
    assert product_seconds(torch.float32, torch.device("cpu")) > 0


def test_other_work_on_a_busy_processor_does_not_decide_the_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def waits_its_turn(*_: object) -> None:
        time.sleep(0.05)

    monkeypatch.setattr(functional, "linear", waits_its_turn)
    assert product_seconds.__wrapped__(torch.bfloat16, torch.device("cpu")) < 0.01
