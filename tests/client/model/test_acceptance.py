"""Foreign models and tokenizers: classes that must work, and those that must be refused with their reason."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fedmosaic.client.colora import CoLoraConfig
from fedmosaic.client.model.acceptance import (
    check_adapter,
    check_ids,
    check_language_model,
    check_length,
    context_length,
)
from fedmosaic.client.model.adapted import adapter_config
from fedmosaic.client.model.examples import (
    Example,
    encode_examples,
    padding_token,
    prompt_tokens,
    rendered_prompt,
)
from fedmosaic.client.model.load import adapt, load_base_model
from fedmosaic.client.model.training import TrainingSettings, train_local
from fedmosaic.client.settings import ModelSettings
from fedmosaic.privacy.federation.terms import AdapterTerms
from fedmosaic.protos.errors import ConfigurationError, ModelError
from tiny import word_tokenizer

ROWS = 64
SPECIAL = {"eos_token": "</s>", "pad_token": "<pad>"}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = {"vocab_size": ROWS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
COMMON: dict[str, Any] = SIZES | TOKENS | {"num_key_value_heads": 1, "max_position_embeddings": 48}
EXPERTS = dict.fromkeys(("num_experts", "num_local_experts"), 4)
EXPERTS |= {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
HEADS = {"head_dim": 8}
WINDOW = {"sliding_window": 4}
GPT = {"vocab_size": ROWS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 48}
VISION = SIZES | {"intermediate_size": 16, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
GEMMA = {**COMMON, **HEADS}
ACCEPTED: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "mistral": {**COMMON, **WINDOW},
    "qwen2": COMMON,
    "qwen3": {**COMMON, **HEADS},
    "qwen3_moe": {**COMMON, **HEADS, **EXPERTS},
    "mixtral": {**COMMON, **EXPERTS},
    "gpt_oss": {**COMMON, **HEADS, **EXPERTS, **WINDOW},
    "gpt_neox": COMMON,
    "gpt_neo": COMMON
    | {"num_layers": 2, "num_heads": 2, "window_size": 4}
    | {"attention_types": [[["global", "local"], 1]]},
    "gptj": {**GPT, "rotary_dim": 4},
    "bloom": {"vocab_size": ROWS, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "falcon": {**COMMON, "new_decoder_architecture": False},
    "phi3": COMMON,
    "gemma2": {**GEMMA, **WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {**GEMMA, **WINDOW, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2},
    "modernbert-decoder": {**COMMON, "local_attention": 8, "global_attn_every_n_layers": 2},
    "falcon_h1": GEMMA
    | {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8}
    | {"mamba_d_state": 4, "mamba_n_groups": 1},
}
NOT_CAUSAL: dict[str, dict[str, Any]] = {
    "bert": COMMON,
    "roberta": COMMON,
    "xlm-roberta": COMMON,
    "electra": {**COMMON, "embedding_size": 16},
    "xlnet": {"vocab_size": ROWS, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24},
}


def make_tokenizer(template: str = "", tokens: int = ROWS, **special: str) -> PreTrainedTokenizerFast:
    names = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(3, tokens))]
    tokenizer = word_tokenizer(names, **{**SPECIAL, **special})
    if template:
        tokenizer.chat_template = template
    return tokenizer


def make_model(kind: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    assert isinstance(model, PreTrainedModel)
    model.eval()
    return nn.Module.to(model, dtype)


@pytest.mark.parametrize("kind", sorted(ACCEPTED))
def test_these_classes_are_accepted_and_train(kind: str) -> None:
    model, tokenizer = make_model(kind, ACCEPTED[kind]), make_tokenizer()
    check_language_model(kind, model, tokenizer)
    adapted = adapt(model, CoLoraConfig(r=2, blocks=2))
    check_adapter(adapted, tokenizer)
    encoded = encode_examples(tokenizer, [Example("1", "w5 w6 w7", "w8"), Example("2", "w9", "w10")], 16)
    settings = TrainingSettings(steps=2, per_device_train_batch_size=2, learning_rate=0.1)
    report = train_local(adapted, encoded, settings, pad_token_id=padding_token(tokenizer))
    assert not [name for name in report.weights_unmoved if "gate" not in name]


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "gptj", "llama"])
def test_narrow_types_are_told_from_models_that_see_what_follows(kind: str) -> None:
    check_language_model(kind, make_model(kind, ACCEPTED[kind], torch.bfloat16), make_tokenizer())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", sorted(NOT_CAUSAL))
def test_models_that_see_later_tokens_are_refused(kind: str, dtype: torch.dtype) -> None:
    with pytest.raises(ModelError, match="not causal"):
        check_language_model(kind, make_model(kind, NOT_CAUSAL[kind], dtype), make_tokenizer())


def test_prefix_attention_is_refused() -> None:
    config = AutoConfig.for_model(
        "paligemma",
        text_config={**GEMMA, "model_type": "gemma"},
        vision_config={**VISION, "model_type": "siglip_vision_model", "projection_dim": 16},
        image_token_index=10,
        projection_dim=16,
    )
    with pytest.raises(ModelError, match="not causal"):
        check_language_model(
            "paligemma", AutoModelForImageTextToText.from_config(config).eval(), make_tokenizer()
        )


def test_a_vision_language_model_that_reads_text_alone_is_accepted() -> None:
    parts = {"text_config": COMMON | {"model_type": "llama"}, "vision_config": VISION}
    config = AutoConfig.for_model("smolvlm", **parts, image_token_id=10, scale_factor=2)
    model = AutoModelForImageTextToText.from_config(config).eval()
    check_language_model("smolvlm", model, make_tokenizer())
    check_adapter(adapt(model, CoLoraConfig(r=2, blocks=2)), make_tokenizer())


def test_a_module_that_is_never_called_is_refused_by_name(tmp_path: Path) -> None:
    mamba = {"vocab_size": ROWS, "hidden_size": 16, "num_hidden_layers": 3, "state_size": 4}
    make_model("mamba", mamba).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    # Its kinds of layers follow from its depth, which can be cut all the same.
    model, _ = load_base_model(tmp_path, keep_layers=2)
    assert model.config.num_hidden_layers == 2
    wanted = ["mixer.in_proj", "mixer.dt_proj"]
    adapted = adapt(model, CoLoraConfig(r=1, blocks=2, target_modules=wanted))
    with pytest.raises(ModelError, match=r"mixer\.dt_proj.*never called"):
        check_adapter(adapted, make_tokenizer())
    again = adapt(make_model("mamba", mamba), CoLoraConfig(r=1, blocks=2, target_modules=["mixer.in_proj"]))
    check_adapter(again, make_tokenizer())


def test_a_module_whose_output_is_thrown_away_is_refused() -> None:
    model = make_model("llama", COMMON)
    last = model.model.layers[-1]
    last.mlp.forward = lambda x: 0 * last.mlp.down_proj(x @ torch.zeros(16, 24))
    with pytest.raises(ModelError, match=r"gate_proj.*never called"):
        check_adapter(adapt(model, CoLoraConfig(r=2, blocks=2)), make_tokenizer())
    only = CoLoraConfig(r=2, blocks=2, target_modules=["mlp.down_proj"])
    model = make_model("llama", COMMON)
    last = model.model.layers[-1]
    last.mlp.forward = lambda x, mlp=last.mlp: 0 * mlp.down_proj(x @ torch.ones(16, 24))
    with pytest.raises(ModelError, match=r"mlp\.down_proj.*no gradient"):
        check_adapter(adapt(model, only), make_tokenizer())


def test_layers_that_differ_are_refused_with_what_they_have_in_common() -> None:
    hybrid = GEMMA | {"linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 8}
    hybrid |= {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
    with pytest.raises(ModelError, match=r"all 2 layers have mlp\.down_proj, mlp\.gate_proj, mlp\.up_proj"):
        adapt(make_model("qwen3_5_text", hybrid), CoLoraConfig(r=2, blocks=2))


def test_checks_leave_no_trace() -> None:
    model, tokenizer = make_model("llama", COMMON), make_tokenizer()
    adapted = adapt(model, CoLoraConfig(r=2, blocks=2))
    modes = [module.training for module in adapted.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    torch.manual_seed(5)
    check_language_model("llama", model, tokenizer)
    check_adapter(adapted, tokenizer)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in adapted.modules()] == modes
    assert all(parameter.grad is None for parameter in adapted.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in adapted.state_dict().items())
    assert not any(module._forward_hooks for module in adapted.modules())


TEXT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content | trim }} {% endfor %}"
    "{% if add_generation_prompt %}bot{% endif %}"
)
PARTS_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
    "{% endif %}{% endfor %} {% endfor %}{% if add_generation_prompt %}bot{% endif %}"
)


def test_both_forms_of_templates_carry_the_prompt_alike() -> None:
    text, parts = make_tokenizer(TEXT_TEMPLATE), make_tokenizer(PARTS_TEMPLATE)
    for prompt in ("w5 w6", "user", "bot", "?"):
        assert rendered_prompt(text, prompt) == rendered_prompt(parts, prompt) == f"user {prompt} bot"
    assert prompt_tokens(text, "w5 w6") == prompt_tokens(parts, "w5 w6") != prompt_tokens(parts, "w6")
    text.chat_template = PARTS_TEMPLATE
    assert rendered_prompt(text, "w5") == "user w5 bot", "a template changed later is tried again"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.role }}: {% endfor %}bot", "the text is lost"),
        ("{% if add_generation_prompt %}bot {% endif %}{{ messages[0].content }}", "stands before it"),
        ("{{ raise_exception('a system turn is needed') }}", "a system turn is needed"),
        ("{{ messages[7].content.upper() }}", "as text"),
    ],
)
def test_templates_that_lose_prompts_are_refused_with_the_reason(template: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        check_language_model("m", make_model("llama", COMMON), make_tokenizer(template))


def test_a_tokenizer_that_knows_none_of_its_words_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(ModelError, match="same tokens for different prompts"):
        check_language_model("m", make_model("llama", COMMON), tokenizer)


def test_lengths_beyond_the_positions_are_refused_with_the_setting() -> None:
    model = make_model("llama", COMMON)
    check_length(model, 48, "training.max_length")
    with pytest.raises(ConfigurationError, match=r"training\.max_length is 49.*48 positions"):
        check_length(model, 49, "training.max_length")
    assert context_length(make_model("gptj", ACCEPTED["gptj"])) == 48
    bloom = make_model("bloom", ACCEPTED["bloom"])
    assert context_length(bloom) is None
    check_length(bloom, 10_000, "training.max_length")


def save(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    make_model("llama", {**COMMON, "pad_token_id": None}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_more_tokens_than_rows_are_refused_only_where_they_occur(tmp_path: Path) -> None:
    model, tokenizer = load_base_model(save(tmp_path, make_tokenizer(tokens=ROWS + 10)))
    assert len(tokenizer) > len(model.get_parameter("model.embed_tokens.weight"))
    good, bad = Example("1", "w5 w6", "w7"), Example("2", "w5 w70", "w7")
    encoded = encode_examples(tokenizer, [good, bad], 16)
    check_ids(model, [encoded[0].input_ids], "train.jsonl", "model.path")
    with pytest.raises(ModelError, match=r"train\.jsonl, example 2: .*above the 64"):
        check_ids(model, (e.input_ids for e in encoded), "train.jsonl", "model.path")


def test_a_padding_token_without_a_row_gives_way_to_the_end_of_text(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tokens=ROWS + 10, **{"pad_token": "w70"})
    model, loaded = load_base_model(save(tmp_path, tokenizer))
    assert padding_token(loaded) == loaded.eos_token_id == model.config.pad_token_id == 1


def not_a_number(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[0] = float("nan")


def no_forward(model: nn.Module) -> None:
    def forward(pixel_values: torch.Tensor) -> None:
        raise AssertionError

    model.forward = forward


@pytest.mark.parametrize(
    ("damage", "reason"), [(not_a_number, "not finite"), (no_forward, "cannot read public tokens")]
)
def test_models_that_cannot_run_are_refused(damage: Callable[[nn.Module], None], reason: str) -> None:
    model = make_model("llama", {**COMMON, "tie_word_embeddings": False})
    damage(model)
    with pytest.raises(ModelError, match=reason):
        check_language_model("m", model, make_tokenizer())


def test_a_lower_rank_takes_no_part_in_group_sums() -> None:
    settings = ModelSettings(path="model", aligned="aligned", rank=4)
    with pytest.raises(ModelError, match="vectors of one length"):
        adapter_config(settings, AdapterTerms(rank=8, protection="distributed-dp"))


def test_an_aligned_checkpoint_has_its_cores_where_the_terms_say_late(tmp_path: Path) -> None:
    late = AdapterTerms(rank=4, alpha=8.0, blocks=2, layer_rule="late")
    bare = adapter_config(ModelSettings(path="model"), late)
    adapted = adapt(make_model("llama", COMMON | {"num_hidden_layers": 5}), bare)
    config = adapted.peft_config["default"]
    assert isinstance(config, CoLoraConfig)
    assert config.shared_layers == [3, 4]
    settings = ModelSettings(path="model", aligned=str(tmp_path))
    for layers in ([3, 4], [1, 4]):
        config = CoLoraConfig(
            r=4, blocks=2, shared_layers=layers, model_depth=5, basis_label=f"aligned:{'0' * 32}"
        )
        config.save_pretrained(str(tmp_path))
        assert adapter_config(settings, AdapterTerms(rank=4, blocks=2)).shared_layers == layers
        if layers == [3, 4]:
            assert adapter_config(settings, late).shared_layers == layers
            continue
        with pytest.raises(ModelError, match=r"cores on layers \[1, 4\] of 5, the .* wants the last 2"):
            adapter_config(settings, late)
