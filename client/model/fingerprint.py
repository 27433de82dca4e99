"""Which model this is: a hash of its own weights, whatever is wrapped round them."""

import hashlib
from typing import Any

import torch
from torch import nn


def fingerprint(model: nn.Module) -> str:
    """SHA-256, hexadecimal, of a model's own weights, so that a federation can agree on a probe.

    Weights count with their value in bfloat16, so that a checkpoint has one fingerprint in float32,
    float16 and bfloat16. Adapters and the wrappers round adapted layers are left out.
    """
    base = base_model(model)
    adapted = tuple(f"{name}." for name, module in base.named_modules() if hasattr(module, "base_layer"))
    digest = hashlib.sha256(b"fedmosaic probe 1\n")
    weights = dict(base.named_parameters())
    for name in sorted(weights, key=lambda full: full.replace(".base_layer.", ".")):
        if name.startswith(adapted) and ".base_layer." not in name:
            continue
        weight = weights[name].detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name.replace('.base_layer.', '.')} {list(weight.shape)}\n".encode())
        digest.update(weight.view(torch.int16).numpy().astype("<i2", copy=False).data)
    return digest.hexdigest()


def base_model(model: nn.Module) -> Any:
    """The transformers model inside a peft wrapper; its methods are found at run time only."""
    find: Any = getattr(model, "get_base_model", None)
    return model if find is None else find()
