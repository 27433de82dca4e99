"""A member's adapter in forms that need nothing of this package: plain LoRA, or a merged model."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedmosaic.client.colora import (
    CoLoraConfig,
    adapted_layers,
    get_basis,
    read_shared,
    set_basis,
    write_shared,
)
from fedmosaic.client.colora.layer import MergeDelta
from fedmosaic.client.colora.state import find_adapter
from fedmosaic.client.model.examples import prompt_tokens
from fedmosaic.client.model.load import adapt
from fedmosaic.client.model.loss import training_mode
from fedmosaic.protos.errors import ModelError

_PUBLIC: Final = (
    "Does the parcel weigh nine grams?",
    "Write one sentence about rain in autumn.",
    "Is this film worth seeing? The story is thin, but the actors are splendid.",
    "Turn on the light in the kitchen, please.",
    "A court has ruled that the bridge must stay open. Which part of a newspaper is that from?",
    "3 + 4 =",
    "Translate into French: The shop opens at ten.",
    "What should I do when the printer says that there is no paper?",
)
_NOTHING: Final = 1e-6
"""Singular values below this share of the largest are rounding."""


@dataclass(frozen=True)
class Deviation:
    """Distance of logits from another model's: largest, L2 over norm, share of other likeliest tokens."""

    absolute: float
    relative: float
    other_tokens: float

    def __str__(self) -> str:
        return (
            f"largest difference of a logit {self.absolute:.1e}, {self.relative:.1e} of the logits' norm; "
            f"another likeliest token at {self.other_tokens:.0%} of the positions"
        )


@torch.no_grad()
def public_logits(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """Logits (positions, vocabulary) of public prompts, float32 on the processor."""
    device = next(model.parameters()).device
    with training_mode(model, False):
        return [
            model(input_ids=torch.tensor([prompt_tokens(tokenizer, text)], device=device))
            .logits[0]
            .float()
            .cpu()
            for text in _PUBLIC
        ]


def deviation(found: list[torch.Tensor], expected: list[torch.Tensor]) -> Deviation:
    """Compare logits of `public_logits`."""
    one, other = torch.cat(found), torch.cat(expected)
    difference = one - other
    return Deviation(
        absolute=float(difference.abs().max()),
        relative=float((difference.norm(dim=1) / other.norm(dim=1)).max()),
        other_tokens=float((one.argmax(dim=1) != other.argmax(dim=1)).float().mean()),
    )


def only_released(model: PeftModel) -> PeftModel:
    """The base model with nothing on it but P and Q of the local branch, which is what DP-SGD trained.

    The gate, the personal branch and the other layers' LoRA have seen private data without noise; the
    received branch is not this member's. A fresh adapter is made, so that no tensor of theirs is there;
    `model` is left without one.
    """
    config = model.peft_config[find_adapter(model)]
    if not isinstance(config, CoLoraConfig):
        raise ModelError(f"the adapter is a {type(config).__name__}; only Co-LoRA's has a shared branch")
    bases, released = get_basis(model), read_shared(model, "local")
    kept = "r alpha blocks layer_rule shared_layers target_modules basis_seed task_type".split()
    fresh = CoLoraConfig(
        **{name: getattr(config, name) for name in kept}, other_layers="none",
        active_branches={"shared": ["local"]},
    )  # fmt: skip
    made = adapt(cast(PreTrainedModel, model.unload()), fresh)
    set_basis(made, bases, label=config.basis_label or "custom")
    write_shared(made, released, "local")
    made.train(False)
    return made


@torch.no_grad()
def write_lora(model: PeftModel, folder: Path, base: str) -> int:
    """Write the adapter as one LoRA per module, which PEFT loads alone; returns the largest rank.

    s·B((1−β)P_L + βP_G + P_p)A of a Co-LoRA module has rank r, since all branches share A and B, and so has
    another layer's LoRA of one branch. Where such a layer has two, their sum may take rank 2r; the others
    are filled up with zeros. ModelError if the adapter changes nothing.
    """
    name = find_adapter(model)
    deltas = {
        layer.settings[name].placement.name: _compressed(layer.merge_delta(name), layer.settings[name].rank)
        for layer in adapted_layers(model)
    }
    deltas = {module: delta for module, delta in deltas.items() if delta.left.any() or delta.bias is not None}
    if not deltas:
        raise ModelError("the adapter changes nothing yet, so there is no LoRA to write; train it first")
    rank = max(delta.left.shape[1] for delta in deltas.values())
    biased = any(delta.bias is not None for delta in deltas.values())
    tensors: dict[str, torch.Tensor] = {}
    for module, delta in deltas.items():
        # One rank for all: of the programs that read LoRA, some know no alpha by module, and some no rank.
        room = rank - delta.left.shape[1]
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = nn.functional.pad(delta.right, (0, 0, 0, room))
        tensors[f"{prefix}.lora_B.weight"] = nn.functional.pad(delta.left, (0, room))
        if biased:
            zeros = delta.left.new_zeros(delta.left.shape[0])
            tensors[f"{prefix}.lora_B.bias"] = zeros if delta.bias is None else delta.bias
    # PEFT scales LoRA and its bias by alpha/r; s is in the factors already.
    LoraConfig(
        r=rank, lora_alpha=rank, target_modules=_shortest(model, deltas), lora_bias=biased,
        task_type="CAUSAL_LM", base_model_name_or_path=base, inference_mode=True,
    ).save_pretrained(str(folder))  # fmt: skip
    contiguous = {key: tensor.cpu().contiguous().clone() for key, tensor in tensors.items()}
    save_file(contiguous, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return rank


def _compressed(delta: MergeDelta, rank: int) -> MergeDelta:
    """The same map in as few columns as it needs, where it has more than one branch's."""
    if delta.left.shape[1] <= rank:
        return delta
    left, upper = torch.linalg.qr(delta.left.double())
    right, lower = torch.linalg.qr(delta.right.double().T)
    rotate, sizes, back = torch.linalg.svd(upper @ lower.T)
    kept = max(rank, int((sizes > _NOTHING * sizes[0]).sum()))
    root = sizes[:kept].sqrt()
    thin, wide = left @ (rotate[:, :kept] * root), (root[:, None] * back[:kept]) @ right.T
    return MergeDelta(thin.to(delta.left.dtype), wide.to(delta.right.dtype), delta.bias)


def _shortest(model: PeftModel, deltas: dict[str, MergeDelta]) -> list[str]:
    """Last parts of names, such as q_proj, where they name exactly the adapted modules; else full names."""
    last = {module.rpartition(".")[2] for module in deltas}
    base = model.get_base_model()
    named = {
        found.removesuffix(".base_layer")
        for found, module in base.named_modules()
        if isinstance(module, nn.Linear) and found.removesuffix(".base_layer").rpartition(".")[2] in last
    }
    return sorted(last) if named == {*deltas} else sorted(deltas)


def merged(model: PeftModel) -> PreTrainedModel:
    """The base model with the adapter in its weights; ModelError if quantised, or Q has no place there."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Merging Q gave biases", UserWarning)
        try:
            return cast(PreTrainedModel, model.merge_and_unload(safe_merge=True))
        except UserWarning:
            kind = type(model.get_base_model()).__name__
            raise ModelError(
                f"a {kind} has no biases where Q would become some, and from_pretrained would drop them; "
                "give --format lora, or --without-bias, which says what leaving Q out changes"
            ) from None
