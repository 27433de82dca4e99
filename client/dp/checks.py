"""What must hold before the shared branch is trained privately.

Every check runs on public tokens and public values of the adapter's branches, so that a refusal says nothing
about the data or about what was received, and costs no budget.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from torch import nn

from fedmosaic.client.dp.engine import core_parameters, example_gradient, public_branches
from fedmosaic.client.model.examples import IGNORED, EncodedExample, collate
from fedmosaic.client.model.loss import ExampleLosses, example_losses, on_device_of, training_mode
from fedmosaic.protos.errors import ModelError, PrivacyError

REPEAT_TOLERANCE: Final = 1e-3
"""Relative distance allowed between two gradients of one example with others computed in between."""
_NOISE_FACTOR: Final = 10.0
"""The same, in units of what two computations in a row differ by where the hardware is not repeatable."""
# Share of the bound that the received branch lies at, and the texts' lengths: each time the longest one is
# longer than all before, so that what is scaled by the longest text so far shows.
_TRIED: Final = ((0.0, (4, 7, 13)), (1.0, (4, 9, 21)))


def public_examples(model: nn.Module, lengths: Sequence[int]) -> list[EncodedExample]:
    """Random token sequences of a fixed seed and these lengths, ≥ 3; the last two are the answer."""
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]  # nn.Module hides it
    generator = torch.Generator().manual_seed(0)
    examples = []
    for length in lengths:
        ids = torch.randint(0, vocabulary, (length,), generator=generator)
        labels = torch.where(torch.arange(length) >= length - 2, ids, IGNORED)
        examples.append(EncodedExample(f"public-{length}", ids, labels))
    return examples


def assert_only_shared_branch(
    model: nn.Module, cores: Mapping[str, nn.Linear], private_parameters: Mapping[str, nn.Parameter], *,
    losses: ExampleLosses = example_losses,
) -> None:  # fmt: skip
    """Prove that nothing but the cores is trained and that no private tensor reaches the loss.

    The second part follows the data: the private tensors, every one that was or will be trained without
    differential privacy (personal branch, other LoRA tensors, gates), are made differentiable for one forward
    pass and must not appear in its graph, not even multiplied by zero. PrivacyError if another parameter is
    trainable, or a private tensor takes part in the forward pass.
    """
    of_cores = {id(parameter) for core in cores.values() for parameter in core.parameters()}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in of_cores]
    if others:
        raise PrivacyError(
            f"{len(others)} trainable tensor(s) outside the shared branch (first: {others[0]}); freeze them "
            "while P and Q are trained privately, and train them afterwards"
        )
    suspects = {name: p for name, p in private_parameters.items() if id(p) not in of_cores}
    if not suspects:
        return
    (example,) = public_examples(model, (7,))
    tried = on_device_of(model, collate([example], pad_token_id=0))
    with public_branches(model), training_mode(model, False), _differentiable(suspects.values()):
        total = losses(model, tried).sum()
        if not total.requires_grad:
            return
        gradients = torch.autograd.grad(total, list(suspects.values()), allow_unused=True)
    inside = [name for name, gradient in zip(suspects, gradients, strict=True) if gradient is not None]
    if inside:
        raise PrivacyError(
            f"{len(inside)} tensor(s) trained without privacy take part in the forward pass (first: "
            f"{inside[0]}); switch those branches off and fix the gate while P and Q are trained privately"
        )


def check_engine(
    model: nn.Module, cores: Mapping[str, nn.Linear], *, clip: float, losses: ExampleLosses = example_losses,
) -> None:  # fmt: skip
    """Try on public texts of several lengths that every core learns, and that no example moves another's row.

    To be called once, before anything private or received is in the model. Rows are tried with a received
    branch of zeros and with one whose every entry lies at the bound of what can be received, `clip`, which
    amplifies the least dependence. ModelError if a core takes no part in the loss, a gradient is zero or not
    finite, something in the model carries one example to the next, or dropout cannot be switched off.
    """
    refuse_state(model)
    device = next(model.parameters()).device
    generator = _generator_state(device)
    with training_mode(model, False):
        for bound, lengths in _TRIED:
            with public_branches(model, clip * bound):
                rows = _check_alone(model, cores, public_examples(model, lengths), losses)
                if not bound:
                    _check_moves(model, cores, rows, losses)
    if not torch.equal(_generator_state(device), generator):
        raise ModelError(
            "the model draws random numbers although it does not train, from a stream that all examples "
            "share; set its dropout to 0 in config.json"
        )


def refuse_state(model: nn.Module) -> None:
    """Refuse layers that are known to compute an example with what they kept of earlier ones: ModelError."""
    for name, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        if any("dynamic" in str(kind) for kind in (kinds.values() if isinstance(kinds, dict) else [kinds])):
            raise ModelError(
                f"layer {name} scales its rotary positions by the longest text so far (rope_type dynamic), "
                "so an example's gradient depends on those before it; write rope_type default into the "
                "model's config.json: up to its max_position_embeddings both are the same"
            )
        if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
            raise ModelError(
                f"layer {name or type(module).__name__} is compiled, and compiled code depends on the "
                "lengths of earlier texts; give the model as it was before torch.compile"
            )


@contextmanager
def _differentiable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _generator_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _check_moves(
    model: nn.Module, cores: Mapping[str, nn.Linear], rows: Sequence[torch.Tensor], losses: ExampleLosses
) -> None:
    (example,) = public_examples(model, _TRIED[0][1][-1:])
    loss = losses(model, on_device_of(model, collate([example], pad_token_id=0))).sum()
    parameters = core_parameters(cores)
    gradients = (
        torch.autograd.grad(loss, parameters, allow_unused=True)
        if loss.requires_grad
        else [None] * len(parameters)
    )
    used = {id(p) for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    missing = sorted(name for name, core in cores.items() if id(core.weight) not in used)
    if missing:
        raise ModelError(
            f"{len(missing)} core(s) take no part in the loss (first: {', '.join(missing[:3])}); switch the "
            "adapter and its shared branch on"
        )
    if not all(bool(row.any()) for row in rows):
        raise ModelError(
            "the shared branch has no finite gradient other than zero, so training would move nothing; "
            "check the adapter's bases and the model's weights"
        )


def _check_alone(
    model: nn.Module, cores: Mapping[str, nn.Linear], examples: Sequence[EncodedExample],
    losses: ExampleLosses,
) -> list[torch.Tensor]:  # fmt: skip
    def row(example: EncodedExample) -> torch.Tensor:
        gradient = example_gradient(model, cores, example, losses)
        # As the clipping has it: what is not finite counts as zero.
        return gradient if bool(torch.isfinite(gradient).all()) else torch.zeros_like(gradient)

    rows = [row(example) for example in examples]
    for example, before in reversed(list(zip(examples, rows, strict=True))):
        after, again = row(example), row(example)
        allowed = max(REPEAT_TOLERANCE * float(before.norm()), _NOISE_FACTOR * float((again - after).norm()))
        moved = float((after - before).norm())
        if not moved <= allowed:
            raise ModelError(
                f"a public text's gradient moved by {moved:.1e} where {allowed:.1e} is allowed after texts "
                "of other lengths; a layer or the loss keeps something of earlier examples, so none can be "
                "clipped alone: give a model whose layers keep no state between calls"
            )
    return rows
