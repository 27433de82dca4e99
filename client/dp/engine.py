"""The gradient of one example with respect to the shared branch's cores, clipped and summed.

A core is a linear module r → r with weight P and bias Q. Every example goes through the model by itself, a
batch of one: there is no padding, no product of matrices that two examples share, and so no rounding that
depends on a neighbour. In a padded batch there is, in every number format, and whoever chooses the received
branch can make it as large as the gradients: one example more then moves the sum of all others.

The row of an example is a function of that example, the public parameters and the received branch, and of
whatever decides its last bits on this hardware (the number of threads, the kernel for a shape, the order in
which a GPU adds), ω. That ω is drawn without regard to the other examples, which makes it harmless: for every
fixed ω the sum moves by at most C when an example is added, so the noisy sum is a Gaussian mechanism, and a
mixture of (ε, δ)-private mechanisms with weights that do not depend on the data is (ε, δ)-private. What could
carry one example to the next, state in the model, is refused (`fedmosaic.client.dp.checks`).

Clipping is done by `fedmosaic.privacy.mechanism.gaussian`: a row is brought to an integer grid within the
clipping norm, a row that is not finite becomes zero (its contribution is then within the bound like any
other's, and no NaN can reach the release). Sums of integers are exact, so their order changes no bit.

Legend of axes: B examples, D all numbers of all cores.

Reference:
    Abadi et al., "Deep learning with differential privacy", CCS 2016, algorithm 1.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fedmosaic.client.colora import adapted_layers, fix_gate, set_active_branches, set_trainable
from fedmosaic.client.colora.linear import CoLoraLinear
from fedmosaic.client.colora.state import find_adapter, shared_modules
from fedmosaic.client.model.examples import EncodedExample, collate
from fedmosaic.client.model.loss import ExampleLosses, example_losses, on_device_of
from fedmosaic.privacy.mechanism import gaussian
from fedmosaic.privacy.mechanism.gaussian import MAXIMUM_DIMENSIONS, ClippedSum
from fedmosaic.protos.errors import ModelError


def private_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every adapter tensor that private data reaches, or may have reached, without noise, by name.

    All of the adapter, and others of any PEFT method, but the two branches that consist of releases: cores in
    training and received ones. Not the base model: it is public, so it must never have seen private data.
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

    The received branch has the constant weight `global_weight` in [0, 1] beside the one in training, or takes
    no part. Yields the cores to train (weight P, bias Q) by full module name, in the shared vector's order.
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


def example_gradient(
    model: nn.Module, cores: Mapping[str, nn.Linear], example: EncodedExample,
    losses: ExampleLosses = example_losses,
) -> torch.Tensor:  # fmt: skip
    """Gradient (D,) float32 of one example's loss alone: of each core P by rows, then Q; zero if unused."""
    loss = losses(model, on_device_of(model, collate([example], pad_token_id=0)))
    if loss.shape != (1,):
        raise ModelError(
            f"the loss of one example has shape {tuple(loss.shape)}; return one loss per example, here (1,)"
        )
    parameters = core_parameters(cores)
    if not loss.requires_grad:
        return torch.zeros(dimensions_of(cores), device=parameters[0].device)
    gradients = torch.autograd.grad(loss.sum(), parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.float().flatten() for gradient in gradients])


def clip_and_sum(rows: torch.Tensor, max_grad_norm: float, grid: int = gaussian.GRID) -> ClippedSum:
    """Clip (B, D) gradients of any values and add them up; see `gaussian.clipped_sum`."""
    return gaussian.clipped_sum(rows.detach().float().cpu().numpy(), max_grad_norm, grid)


def core_parameters(cores: Mapping[str, nn.Linear]) -> list[nn.Parameter]:
    """P and Q of every core, in the order of the coordinates."""
    return [parameter for core in cores.values() for parameter in core.parameters()]


def dimensions_of(cores: Mapping[str, nn.Linear]) -> int:
    """Number D of coordinates of all cores together."""
    return sum(parameter.numel() for parameter in core_parameters(cores))


def check_cores(cores: Mapping[str, nn.Linear]) -> None:
    """Refuse cores that cannot be trained privately: ModelError."""
    if not cores:
        raise ModelError("there is no core to train; add a Co-LoRA adapter to the model first")
    for name, core in cores.items():
        if type(core) is not nn.Linear or core.bias is None:
            raise ModelError(f"core {name} is a {type(core).__name__}; it must be nn.Linear with a bias")
        if not all(parameter.requires_grad for parameter in core.parameters()):
            raise ModelError(f"core {name} is frozen; make the shared branch trainable first")
        if any(parameter.dtype != torch.float32 for parameter in core.parameters()):
            raise ModelError(
                f"core {name} has dtype {core.weight.dtype}; keep cores in float32, whatever the model's"
            )
    if len({id(core) for core in cores.values()}) != len(cores):
        raise ModelError("two names stand for one core; name every core once")
    if dimensions_of(cores) > MAXIMUM_DIMENSIONS:
        raise ModelError(
            f"the cores have {dimensions_of(cores)} coordinates, more than {MAXIMUM_DIMENSIONS}; "
            "lower the rank"
        )
