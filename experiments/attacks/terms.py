"""The terms that tokens add to a gradient of P and Q, computed token by token from the public model.

In the last adapted layer some modules act on each position alone: what they do at a position reaches the
loss through that position's prediction only. With u the reduced input A·x of such a module, z its core's
output and h the state that the head reads, the token v after a prefix adds to the gradient of (P, Q) the term

    e uᵀ  and  e      with      e = (∂h/∂z)ᵀ Wᵀ (p − 1_v)

where W is the head's weight and p the model's prediction. Nothing in it depends on what follows.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from fedmosaic.client.dp.engine import dimensions_of
from fedmosaic.experiments.attacks.statistics.pursuit import Background, FloatArray
from fedmosaic.protos.errors import ModelError

_TRIAL_LENGTH: Final = 6


class NextTerms(NamedTuple):
    """Every term that the next token after one prefix could add.

    (V,) log-probabilities, the reduced input u of every core, and the (H, K) derivative of the head's input
    by all cores' outputs.
    """

    log_probabilities: torch.Tensor
    inputs: tuple[np.ndarray, ...]
    response: torch.Tensor


class TermReader:
    """Terms for a causal language model with its shared branch alone on, in evaluation mode.

    Cores are by name in the order of the shared vector. `ModelError` if none acts on its own position alone.
    """

    def __init__(self, model: nn.Module, cores: Mapping[str, nn.Linear]) -> None:
        self._model: Any = model
        self._head: Any = model.get_output_embeddings()  # type: ignore[operator]  # nn.Module hides it
        self._head_weight: torch.Tensor = self._head.weight.detach().float()
        local = self._local(cores)
        if not local:
            raise ModelError("no core of this model acts on its own position alone; adapt its last layer")
        self.cores = {name: core for name, core in cores.items() if name in local}
        ends = np.cumsum([dimensions_of({name: core}) for name, core in cores.items()])
        places = dict(zip(cores, np.split(np.arange(ends[-1]), ends[:-1]), strict=True))
        self.columns = np.concatenate([places[name] for name in self.cores])
        """Which numbers of the shared vector the terms stand in."""

    def public_terms(self, texts: Sequence[torch.Tensor]) -> FloatArray:
        """(N, D) terms, in the order of `columns`, of all but the first two of each text's (T,) tokens."""
        parts = []
        for tokens in texts:
            if len(tokens) < 3:
                continue
            with torch.enable_grad(), self._watched(self.cores) as seen:
                logits = self._model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
                loss = functional.cross_entropy(logits.float(), tokens[1:], reduction="sum")
                signals = torch.autograd.grad(loss, list(seen.outputs.values()))
            terms = [
                torch.cat([(e[0, 1:-1, :, None] * u[0, 1:-1, None, :]).flatten(1), e[0, 1:-1]], dim=1)
                for e, u in zip(signals, seen.inputs.values(), strict=True)
            ]
            parts.append(torch.cat(terms, dim=1).double().numpy())
        return np.concatenate(parts) if parts else np.zeros((0, len(self.columns)))

    def after(self, prefixes: Sequence[Sequence[int]]) -> list[NextTerms]:
        """What the next token could add after each of some prefixes of one length, at least 2."""
        tokens, cache = torch.tensor(prefixes), DynamicCache()
        with torch.no_grad():
            self._model(input_ids=tokens[:, :-1], past_key_values=cache, use_cache=True)
        # Only the plain attention can be differentiated twice.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), self._watched(self.cores) as seen:
            logits = self._model(input_ids=tokens[:, -1:], past_key_values=cache, use_cache=True).logits
            response = _derivative(seen.state[:, -1], list(seen.outputs.values()))
        inputs = [part[:, -1].double().numpy() for part in seen.inputs.values()]
        log_probabilities = functional.log_softmax(logits[:, -1].detach().float(), dim=-1)
        return [
            NextTerms(log_probabilities[i], tuple(part[i] for part in inputs), response[i])
            for i in range(len(tokens))
        ]

    def coefficients(self, terms: NextTerms, tokens: torch.Tensor) -> np.ndarray:
        """(V, K) float64 signals e of the (V,) next tokens after a prefix."""
        expected = terms.log_probabilities.exp() @ self._head_weight @ terms.response
        signals = expected - self._head_weight[tokens] @ terms.response
        return np.asarray(signals.double().numpy())

    def _local(self, cores: Mapping[str, nn.Linear]) -> set[str]:
        """Cores whose output at one position reaches the head's input at that position alone."""
        vocabulary = self._head_weight.shape[0]
        tokens = torch.arange(_TRIAL_LENGTH)[None] % vocabulary
        with torch.enable_grad(), self._watched(cores) as seen:
            self._model(input_ids=tokens, use_cache=False)
            state = seen.state[0, -1]
            total = (state * torch.linspace(0.5, 1.5, len(state))).sum()
            signals = torch.autograd.grad(total, list(seen.outputs.values()), allow_unused=True)
        return {
            name
            for name, signal in zip(seen.outputs, signals, strict=True)
            if signal is not None and not signal[0, :-1].any() and signal[0, -1].any()
        }

    @contextmanager
    def _watched(self, cores: Mapping[str, nn.Linear]) -> Iterator["_Seen"]:
        # Filled in the order of the calls, read in the order of the cores.
        empty = torch.empty(0)
        seen = _Seen(dict.fromkeys(cores, empty), dict.fromkeys(cores, empty), empty)

        def keep(name: str, _: nn.Module, received: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
            seen.inputs[name], seen.outputs[name] = received[0].detach(), made

        def keep_state(_: nn.Module, received: tuple[torch.Tensor, ...]) -> None:
            seen.state = received[0]

        handles = [core.register_forward_hook(partial(keep, name)) for name, core in cores.items()]
        handles.append(self._head.register_forward_pre_hook(keep_state))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


@dataclass(eq=False)
class _Seen:
    """What one forward pass showed: inputs and outputs of cores, and the head's input."""

    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    state: torch.Tensor


def _derivative(state: torch.Tensor, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Derivative (B, H, K) of a state (B, H) by the last position's outputs, K numbers together.

    A backward pass is linear in the direction it starts from, and K is far below H: so the derivative of a
    backward pass by its direction is taken, with one pass for each of the K numbers.
    """
    direction = torch.zeros_like(state, requires_grad=True)
    signals = torch.autograd.grad(state, outputs, grad_outputs=direction, create_graph=True)
    joined = torch.cat([signal[:, -1] for signal in signals], dim=1)
    count = joined.shape[1]
    starts = torch.eye(count)[:, None, :].expand(count, *joined.shape)
    (found,) = torch.autograd.grad(joined, direction, grad_outputs=starts, is_grads_batched=True)
    return found.detach().permute(1, 2, 0).contiguous()


def atoms(inputs: Sequence[np.ndarray], background: Background) -> FloatArray:
    """(K, D) one term per number of each core's output, whose reduced input is (r,), in the coordinates."""
    parts, start = [], 0
    for reduced in inputs:
        rank = len(reduced)
        size = rank * rank + rank
        block = np.concatenate([np.kron(np.eye(rank), reduced), np.eye(rank)], axis=1)
        inside = slice(start, start + size)
        parts.append((block / background.noise[inside]) @ background.axes[inside])
        start += size
    return np.concatenate(parts)
