"""What is trained, what takes part in the forward pass, and which basis is used.

All functions take any module that contains Co-LoRA layers and work on the one active adapter. `layers` is
`shared` for Co-LoRA modules, `family` for LoRA, or `all`; the other layers stay as they are.
"""

import math
from collections.abc import Collection, Mapping

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from fedmosaic.client.colora.config import CoLoraConfig
from fedmosaic.client.colora.layer import GATE, CoLoraLayer
from fedmosaic.client.colora.linear import CoLoraLinear, orthonormality_error
from fedmosaic.client.colora.placement import Placement
from fedmosaic.protos.errors import ModelError

Basis = tuple[torch.Tensor | np.ndarray, torch.Tensor | np.ndarray]
ORTHONORMALITY_TOLERANCE = 1e-3


def find_adapter(model: nn.Module) -> str:
    """The active Co-LoRA adapter; ModelError if there is none or more than one."""
    layers = _adapted(model)
    known = sorted({name for layer in layers for name in layer.settings})
    if not known:
        raise ModelError(
            "The model has no Co-LoRA adapter; make one with peft.get_peft_model(model, CoLoraConfig(...))."
        )
    active = [*{name for layer in layers for name in layer.active_adapters if name in layer.settings}]
    if len(active) != 1:
        raise ModelError(
            f"{len(active)} adapters are active; activate one of {', '.join(known)} with model.set_adapter"
        )
    return str(active[0])


def _adapted(model: nn.Module) -> list[CoLoraLayer]:
    """Every Co-LoRA layer once. What lies within one, most of a model's modules, is not walked through."""
    found: dict[CoLoraLayer, None] = {}
    left = [model]
    while left:
        module = left.pop()
        if isinstance(module, CoLoraLayer):
            found[module] = None
        else:
            left.extend(module.children())
    return list(found)


def adapted_layers(model: nn.Module, layers: str = "all") -> list[CoLoraLayer]:
    """List the adapter's modules in the order of all vectors: by decoder layer, then by name within it."""
    if layers not in {"all", "shared", "family"}:
        raise ModelError(f"layers is {layers!r}; choose all, shared or family.")
    name = find_adapter(model)

    def place(layer: CoLoraLayer) -> Placement:
        return layer.settings[name].placement

    found = (layer for layer in _adapted(model) if name in layer.settings)
    chosen = [layer for layer in found if layers in {"all", place(layer).kind}]
    return sorted(chosen, key=lambda layer: (place(layer).layer, place(layer).module))


def shared_modules(model: nn.Module) -> list[CoLoraLinear]:
    """List the Co-LoRA modules: blocks in order, then by module name."""
    return [layer for layer in adapted_layers(model, "shared") if isinstance(layer, CoLoraLinear)]


def set_trainable(model: nn.Module, groups: Collection[str], *, layers: str = "all") -> None:
    """Choose which of `local`, `global`, `personal`, `gate` are trained; ModelError if one does not exist."""
    name, chosen = find_adapter(model), adapted_layers(model, layers)
    for layer in chosen:
        _check_groups("groups", groups, {*layer.settings[name].branches, GATE})
    for layer in chosen:
        layer.set_trainable_groups(name, groups)


def set_active_branches(model: nn.Module, branches: Collection[str], *, layers: str = "all") -> None:
    """Choose which branches are computed; the gate weighs `local` against `global`. ModelError as for all."""
    name, chosen = find_adapter(model), adapted_layers(model, layers)
    check_not_merged(chosen)
    for layer in chosen:
        _check_groups("branches", branches, set(layer.settings[name].branches))
    for layer in chosen:
        layer.settings[name].active = frozenset(branches)


def _check_groups(what: str, wanted: Collection[str], existing: set[str]) -> None:
    if isinstance(wanted, str):
        raise ModelError(f"{what} is the string {wanted!r}; give a set of names, such as {{{wanted!r}}}.")
    unknown = set(wanted) - existing
    if unknown:
        hint = " Make the adapter with personal_branch=True." if "personal" in unknown else ""
        has = ", ".join(sorted(existing))
        raise ModelError(f"{what} {sorted(unknown)} do not exist in this adapter; it has {has}.{hint}")


def fix_gate(model: nn.Module, value: float | None, *, layers: str = "all") -> None:
    """Replace the gate β̃ by a constant weight of the global branch; None gives it back to its parameters.

    While a constant is set the gate's parameters are not read, so nothing they learned from private data
    flows into the forward pass. It lies in [0, 1], and the adapter is not merged, or a ModelError says so.
    """
    if value is not None and not (math.isfinite(value) and 0.0 <= value <= 1.0):
        raise ModelError(f"The gate's value is {value}; it should lie in [0, 1], or be None to learn it")
    name, chosen = find_adapter(model), adapted_layers(model, layers)
    check_not_merged(chosen)
    for layer in chosen:
        layer.settings[name].fixed_gate = None if value is None else float(value)


def record_switches(model: nn.Module) -> None:
    """Write active branches and fixed gates into the configuration: a saved adapter computes the same."""
    name = find_adapter(model)
    active: dict[str, list[str]] = {}
    fixed: dict[str, float] = {}
    for layer in adapted_layers(model):
        settings = layer.settings[name]
        active[settings.placement.kind] = sorted(settings.active)
        if settings.fixed_gate is not None:
            fixed[settings.placement.kind] = settings.fixed_gate
    for config in _configs(model, name):
        config.active_branches, config.fixed_gate = active, fixed or None


def _configs(model: nn.Module, name: str) -> list[CoLoraConfig]:
    found = (module.peft_config.get(name) for module in model.modules() if isinstance(module, BaseTuner))
    return [config for config in found if isinstance(config, CoLoraConfig)]


def check_not_merged(layers: Collection[CoLoraLayer]) -> None:
    """ModelError if an adapter is merged: a change would have no effect until it is unmerged."""
    if any(layer.merged for layer in layers):
        raise ModelError("The adapter is merged into the base model; call model.unmerge_adapter() first.")


def get_basis(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Copies of the frozen bases: from full module name to A (r, d_in) and B (d_out, r)."""
    name = find_adapter(model)
    return {
        layer.settings[name].placement.name: (layer.colora_A[name].clone(), layer.colora_B[name].clone())
        for layer in shared_modules(model)
    }


def set_basis(model: nn.Module, bases: Mapping[str, Basis], *, label: str = "custom") -> None:
    """Replace the frozen bases of all Co-LoRA modules, as after an alignment between architectures.

    By full name, A (r, d_in) has orthonormal rows and B (d_out, r) orthonormal columns, to
    `ORTHONORMALITY_TOLERANCE`. The label is part of the layout's hash: equal for all clients aligned to the
    same anchor. ModelError, and nothing was changed, if the bases are not these or the adapter is merged.
    """
    name = find_adapter(model)
    modules = {layer.settings[name].placement.name: layer for layer in shared_modules(model)}
    check_not_merged(list(modules.values()))
    if not label:
        raise ModelError("The basis needs a label that is not empty, such as aligned:<digest of the anchor>.")
    missing, unknown = sorted(set(modules) - set(bases)), sorted(set(bases) - set(modules))
    if missing or unknown:
        raise ModelError(
            "The bases should name exactly the Co-LoRA modules. "
            f"Missing: {missing or 'none'}; unknown: {unknown or 'none'}."
        )
    checked = {}
    for key, layer in modules.items():
        a, b = bases[key]
        given_a = _checked(f"{key}: A", a, layer.colora_A[name], by_rows=True)
        checked[key] = given_a, _checked(f"{key}: B", b, layer.colora_B[name], by_rows=False)
    for key, layer in modules.items():
        layer.colora_A[name].copy_(checked[key][0])
        layer.colora_B[name].copy_(checked[key][1])
    for adapted in adapted_layers(model):
        adapted.settings[name].basis_label = label
    for config in _configs(model, name):
        config.basis_label = label


def _checked(what: str, given: torch.Tensor | np.ndarray, now: torch.Tensor, by_rows: bool) -> torch.Tensor:
    tensor = torch.as_tensor(given).detach().to(device=now.device, dtype=torch.float32)
    if tensor.shape != now.shape:
        raise ModelError(f"{what} has shape {tuple(tensor.shape)}, expected {tuple(now.shape)}.")
    if not tensor.isfinite().all():
        raise ModelError(f"{what} has values that are not finite.")
    error = orthonormality_error(tensor.T if by_rows else tensor)
    if error > ORTHONORMALITY_TOLERANCE:
        raise ModelError(
            f"{what} is orthonormal only to {error:.1e}, allowed is {ORTHONORMALITY_TOLERANCE:.1e}. "
            "Orthonormalise it (polar factor) before setting it."
        )
    return tensor
