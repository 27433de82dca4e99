"""Exact per-example gradients of a frozen probe model, in closed form.

The loss of one example is the mean cross entropy over its answer tokens. Its gradient with respect to the
weight of the last block's `down_proj` is Σ_t δ_t x_tᵀ over the positions t whose next token is supervised,
where x_t is the input of `down_proj` and δ_t the gradient at its output. The residual path carries δ_t
unchanged to the final RMSNorm, so it follows from the logits alone:

    e_t = (softmax(W γ⊙ρ_t h_t) - onehot(y_t)) / T,     ρ_t = (mean(h_t²) + ε)^(-1/2)
    u_t = γ ⊙ Wᵀ e_t
    δ_t = ρ_t u_t - (ρ_t³ / d) h_t ⟨h_t, u_t⟩

Every example goes through decoder, head and public map in products of its own. In a batch its neighbours
decide the padding and the order of additions, so leaving one example out would move the last bits of all
others, which the bound of one clipping norm does not allow for.

Shape suffixes: L length, T supervised positions, D hidden size, F intermediate size, V vocabulary.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import nn

from fedmosaic.client.dp.checks import refuse_state
from fedmosaic.client.model.examples import IGNORED, EncodedExample
from fedmosaic.client.model.fingerprint import base_model, fingerprint
from fedmosaic.client.model.loss import cut_at, training_mode
from fedmosaic.privacy.mechanism.projection import GradientFactors
from fedmosaic.protos.errors import ModelError

VOCABULARY_PER_CHUNK = 2**11
"""Rows of the output head that are worked on at once: few enough to stay in a processor's cache."""
EXAMPLES_PER_WALK = 8
"""For so many examples a row of the head is read once."""
_TOLERANCE = 1e-3
# A half-precision autograd graph is itself only good to a few per cent.
_HALF_TOLERANCE = 0.1


@dataclass(frozen=True, eq=False)
class Probe:
    """The parts of a causal language model that the closed form needs; build it with `open_probe`.

    They are the whole model; the stack of blocks with the final norm; the last block's down projection, which
    an adapter may be wrapped round; the final RMSNorm; the output embedding, tied or not; and ε of the norm.
    """

    base: nn.Module
    decoder: nn.Module
    down_proj: nn.Module
    norm: nn.Module
    head: nn.Module
    epsilon: float

    @cached_property
    def sha256(self) -> str:
        """`fingerprint` of the model's weights, taken once: the probe is frozen."""
        return fingerprint(self.base)

    @property
    def hidden_size(self) -> int:
        """Width D of the residual stream."""
        return int(_weight(self.norm).shape[0])

    @property
    def intermediate_size(self) -> int:
        """Width F of the input of `down_proj`."""
        layer: Any = getattr(self.down_proj, "base_layer", self.down_proj)
        return int(layer.in_features)


def open_probe(model: nn.Module) -> Probe:
    """Find the parts of a model and check the closed form against autograd on four tokens.

    The model is of the Llama form (Llama, Qwen2, Qwen3, Mistral, SmolLM ...): last block with
    `mlp.down_proj`, added to the residual stream without further scaling, a final RMSNorm, a linear head. Any
    dtype; a peft wrapper is looked through, its adapters switched off. ModelError if a part is missing, the
    closed form does not hold for this architecture, or a layer keeps something of earlier examples.
    """
    base = base_model(model)
    refuse_state(base)
    try:
        decoder = base.get_decoder()
        block = decoder.layers[-1]
        down_proj, norm = block.mlp.down_proj, decoder.norm
        head = base.get_output_embeddings()
        epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    except (AttributeError, TypeError, IndexError) as error:
        raise ModelError(
            f"{type(base).__name__} cannot be a probe: {error}. A probe needs blocks in .layers, the last "
            "with .mlp.down_proj, a final .norm and an output embedding, as Llama, Qwen2 and Mistral have"
        ) from error
    if "RMSNorm" not in type(norm).__name__ or epsilon is None or head is None:
        raise ModelError(
            f"{type(base).__name__} cannot be a probe: its final norm is {type(norm).__name__} and its head "
            f"{type(head).__name__}. A probe needs an RMSNorm and a linear head"
        )
    probe = Probe(base, decoder, down_proj, norm, head, float(epsilon))
    with adapters_disabled(model), training_mode(decoder, False):
        _check_closed_form(probe, base)
    return probe


def adapters_disabled(model: nn.Module) -> AbstractContextManager[object]:
    """Switch a peft model's adapters off for a while, so that its frozen base can serve as the probe."""
    disable: Any = getattr(model, "disable_adapter", nullcontext)
    context: AbstractContextManager[object] = disable()
    return context


def gradient_factors(probe: Probe, examples: Iterable[EncodedExample]) -> Generator[GradientFactors]:
    """Yield every example's gradient as factors; no hidden_size × intermediate_size matrix is formed.

    Adapters on the probe must be switched off (`adapters_disabled`). Factors are float32 on the CPU whatever
    the model's dtype and device; an example without a supervised token has T = 0. Until the iterator is at
    its end, or closed, the decoder is in evaluation mode; then every module is in its own again.
    """
    with training_mode(probe.decoder, False):
        remaining = iter(examples)
        while part := list(islice(remaining, EXAMPLES_PER_WALK)):
            with torch.inference_mode():
                factors = _factors(probe, part)
            for delta_TD, inputs_TF in factors:
                yield GradientFactors(delta_TD.numpy(), inputs_TF.numpy())


def _weight(module: nn.Module) -> torch.Tensor:
    weight = getattr(module, "base_layer", module).weight
    if not isinstance(weight, torch.Tensor):
        raise ModelError(f"{type(module).__name__} has no weight tensor; it cannot be part of a probe")
    return weight


def _factors(probe: Probe, examples: Sequence[EncodedExample]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """δ (T, D) and x (T, F) of every example, each as it would be without the others."""
    device, gamma_D = _weight(probe.norm).device, _weight(probe.norm).float()
    hiddens, inputs, targets = [], [], []
    for example in examples:
        targets_L = torch.full_like(example.labels, IGNORED)
        targets_L[:-1] = example.labels[1:]
        targets_L = targets_L.to(device)
        chosen_L = targets_L != IGNORED
        with _captured(probe.down_proj) as entering, _captured(probe.norm) as leaving:
            probe.decoder(input_ids=example.input_ids[None].to(device), use_cache=False)
        hiddens.append(leaving[0][0, chosen_L].float())
        inputs.append(entering[0][0, chosen_L].float().cpu())
        targets.append(targets_L[chosen_L])
    rhos = [(hidden_TD.square().mean(1) + probe.epsilon).rsqrt() for hidden_TD in hiddens]
    normed = [h_TD * rho_T[:, None] * gamma_D for h_TD, rho_T in zip(hiddens, rhos, strict=True)]
    errors = _through_head(probe.head, normed, targets)
    factors = []
    for hidden_TD, rho_T, errors_TD, inputs_TF in zip(hiddens, rhos, errors, inputs, strict=True):
        upstream_TD = errors_TD * (gamma_D / len(errors_TD))
        radial_T = (hidden_TD * upstream_TD).mean(1)
        delta_TD = rho_T[:, None] * upstream_TD - (rho_T**3 * radial_T)[:, None] * hidden_TD
        factors.append((delta_TD.cpu(), inputs_TF))
    return factors


def _through_head(
    head: nn.Module, normed: list[torch.Tensor], targets: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Gradients of the tokens' cross entropies with respect to the head's input, float32, by example.

    The softmax is taken chunk by chunk over the vocabulary with a running maximum, so every row of the
    head is read (and, in half precision, converted) once for all examples, and no more than a chunk of one
    example's logits is held. No product has rows of two examples.

    Reference:
        Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
    """
    weight_VD = _weight(head)
    bias_V = getattr(head, "bias", None)
    maxima = [normed_TD.new_full((len(normed_TD), 1), -torch.inf) for normed_TD in normed]
    normalisers = [torch.zeros_like(maximum_T) for maximum_T in maxima]
    expected = [torch.zeros_like(normed_TD) for normed_TD in normed]
    walks = list(zip(normed, maxima, normalisers, expected, strict=True))
    for start in range(0, len(weight_VD), VOCABULARY_PER_CHUNK):
        chunk = slice(start, start + VOCABULARY_PER_CHUNK)
        weight_CD = weight_VD[chunk].float()
        for normed_TD, maximum_T, normaliser_T, expected_TD in walks:
            scores_TC = normed_TD @ weight_CD.T
            if bias_V is not None:
                scores_TC += bias_V[chunk]
            raised_T = torch.maximum(maximum_T, scores_TC.amax(1, keepdim=True))
            scores_TC.sub_(raised_T).exp_()
            decay_T = (maximum_T - raised_T).exp_()
            normaliser_T.mul_(decay_T).add_(scores_TC.sum(1, keepdim=True))
            expected_TD.mul_(decay_T).addmm_(scores_TC, weight_CD)
            maximum_T.copy_(raised_T)
    found = zip(expected, normalisers, targets, strict=True)
    return [e_TD / n_T - weight_VD[targets_T].float() for e_TD, n_T, targets_T in found]


@contextmanager
def _captured(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the first argument of every call of a module."""
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0]))
    try:
        yield seen
    finally:
        handle.remove()


def _check_closed_form(probe: Probe, base: Any) -> None:
    ids = torch.arange(4) % len(_weight(probe.head))
    with torch.no_grad():
        ((delta_TD, _),) = _factors(probe, [EncodedExample("closed-form check", ids, ids)])
    with cut_at(probe.down_proj) as leaves, torch.enable_grad():
        # The whole model, so that scaled or capped logits are found out.
        output = base(input_ids=ids[None].to(_weight(probe.norm).device), use_cache=False)
        logits_LV = output.logits[0, :-1].float()
        loss = nn.functional.cross_entropy(logits_LV, ids[1:].to(logits_LV.device))
        (expected_BLD,) = torch.autograd.grad(loss, leaves)
    expected_TD = expected_BLD[0, :-1].float().cpu()
    error = ((delta_TD - expected_TD).norm() / expected_TD.norm()).item()
    if not error <= (_HALF_TOLERANCE if _weight(probe.norm).dtype.itemsize < 4 else _TOLERANCE):
        raise ModelError(
            f"{type(base).__name__} cannot be a probe: its gradient is off the closed form by {error:.2g} "
            "(relative). The final norm must be γ·h/rms(h), down_proj must be added to the residual stream "
            "unscaled, and the head must give the logits without scaling or capping"
        )
