"""Which tensors of a Co-LoRA model are trained privately, and which must stay out meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fedmosaic.client.colora import adapted_layers, fix_gate, set_active_branches, set_trainable
from fedmosaic.client.colora.linear import CoLoraLinear
from fedmosaic.client.colora.state import find_adapter, shared_modules


def private_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every adapter tensor that private data reaches, or may have reached, without noise, by name.

    That is all of the adapter but the two branches of the Co-LoRA layers that consist of releases: the
    cores in training, and the received global ones. Other adapters in the model, of any PEFT method,
    count in full. The base model does not: it is public, so it must never have seen private data.
    """
    name = find_adapter(model)
    released = {
        id(parameter)
        for layer in shared_modules(model)
        for branch in ("local", "global")
        for parameter in layer.branch_tensors(name, branch)
    }
    found: dict[str, nn.Parameter] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        # A layer's own parameters, not those of the linear module it wraps.
        for container in layer.adapter_layer_names:
            for key, parameter in getattr(layer, container).named_parameters():
                if id(parameter) not in released:
                    found[f"{path}.{container}.{key}"] = parameter
    return found


@contextmanager
def only_shared_branch(
    model: nn.Module, *, global_weight: float | None = None
) -> Iterator[dict[str, nn.Linear]]:
    """Leave nothing of the adapter but the shared branch in the model, and undo that afterwards.

    `global_weight` is the constant weight in [0, 1] of the received branch beside the one in training, which
    then has the rest; None trains the local branch by itself.

    Yields:
        The cores to train (weight P, bias Q) by full module name, in the shared vector's order.
    """
    name = find_adapter(model)
    layers = adapted_layers(model)
    saved = [(layer.settings[name].active, layer.settings[name].fixed_gate) for layer in layers]
    trainable = [layer.settings[name].trainable for layer in layers]
    try:
        set_active_branches(model, set(), layers="family")
        branches = {"local"} if global_weight is None else {"local", "global"}
        set_active_branches(model, branches, layers="shared")
        fix_gate(model, global_weight)
        set_trainable(model, {"local"}, layers="shared")
        set_trainable(model, set(), layers="family")
        shared = shared_modules(model)
        yield {layer.settings[name].placement.name: layer.core(name, "local") for layer in shared}
    finally:
        for layer, (active, gate), groups in zip(layers, saved, trainable, strict=True):
            layer.settings[name].active, layer.settings[name].fixed_gate = active, gate
            layer.set_trainable_groups(name, groups)


@contextmanager
def public_branches(model: nn.Module, bound: float = 0.0) -> Iterator[None]:
    """Put public values in the place of the shared and the received branch while something is checked.

    Entries of the received branch are ± `bound`, with signs of a fixed seed; the shared one is zero. A check
    that read what was received could end the process because of it, and the server would see that.
    """
    generator = torch.Generator().manual_seed(0)
    saved: list[tuple[nn.Parameter, torch.Tensor]] = []
    try:
        with torch.no_grad():
            for layer in (module for module in model.modules() if isinstance(module, CoLoraLinear)):
                for branch in ("local", "global"):
                    for core in getattr(layer, f"colora_core_{branch}").values():
                        for parameter in core.parameters():
                            saved.append((parameter, parameter.detach().clone()))
                            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                            parameter.copy_(signs * (bound if branch == "global" else 0.0))
        yield
    finally:
        with torch.no_grad():
            for parameter, values in saved:
                parameter.copy_(values)
