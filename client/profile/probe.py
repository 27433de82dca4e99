"""Exact per-example gradients of a frozen probe model, and the private sum of them in a task profile.

The loss of one example is the mean cross entropy over its answer tokens. Its gradient with respect to the
weight of the last block's `down_proj` is Σ_t δ_t x_tᵀ over the positions t whose next token is supervised,
where x_t is the input of `down_proj` and δ_t the gradient at its output. The residual path carries δ_t
unchanged to the final RMSNorm, so it follows from the logits alone:

    e_t = (softmax(W γ⊙ρ_t h_t) - onehot(y_t)) / T,     ρ_t = (mean(h_t²) + ε)^(-1/2)
    u_t = γ ⊙ Wᵀ e_t
    δ_t = ρ_t u_t - (ρ_t³ / d) h_t ⟨h_t, u_t⟩

Every example goes through decoder, head and public map by itself. In a batch its neighbours decide the
padding and the order of additions, so leaving one example out would move the last bits of all others, which
the bound of one clipping norm does not allow for.

Shape suffixes: L length, T supervised positions, D hidden size, F intermediate size, V vocabulary.
"""

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedmosaic.client.data.records import by_unit, unit_ids
from fedmosaic.client.dp.checks import refuse_state
from fedmosaic.client.model.acceptance import check_ids, check_length
from fedmosaic.client.model.examples import IGNORED, EncodedExample, Example, encode_examples
from fedmosaic.client.model.load import load_model
from fedmosaic.client.model.loss import base_model, cut_at, fingerprint, training_mode
from fedmosaic.client.settings import ClientSettings, ModelSettings
from fedmosaic.client.vision.inputs import without_images
from fedmosaic.privacy.federation.kits import Kit
from fedmosaic.privacy.ledger.rows import Unit
from fedmosaic.privacy.mechanism.gaussian import ClippedSum
from fedmosaic.privacy.mechanism.noise import BitSource, poisson_sample
from fedmosaic.privacy.mechanism.profile import ProfileMechanism, clipped_sum
from fedmosaic.privacy.mechanism.projection import GradientFactors, PublicBasis, PublicMap
from fedmosaic.protos.errors import MechanismError, ModelError, PrivacyError

VOCABULARY_PER_CHUNK = 2**11
"""Rows of the output head that are worked on at once: few enough to stay in a processor's cache."""
_TOLERANCE = 1e-3
# A half-precision autograd graph is itself only good to a few per cent.
_HALF_TOLERANCE = 0.1


@dataclass(frozen=True, eq=False)
class Probe:
    """The parts of a causal language model that the closed form needs; build it with `open_probe`."""

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
        for example in examples:
            with torch.inference_mode():
                delta_TD, inputs_TF = _factors(probe, example)
            yield GradientFactors(delta_TD.numpy(), inputs_TF.numpy())


def _weight(module: nn.Module) -> torch.Tensor:
    weight = getattr(module, "base_layer", module).weight
    if not isinstance(weight, torch.Tensor):
        raise ModelError(f"{type(module).__name__} has no weight tensor; it cannot be part of a probe")
    return weight


def _factors(probe: Probe, example: EncodedExample) -> tuple[torch.Tensor, torch.Tensor]:
    device = _weight(probe.norm).device
    targets_L = torch.full_like(example.labels, IGNORED)
    targets_L[:-1] = example.labels[1:]
    targets_L = targets_L.to(device)
    chosen_L = targets_L != IGNORED
    with _captured(probe.down_proj) as inputs, _captured(probe.norm) as hidden:
        probe.decoder(input_ids=example.input_ids[None].to(device), use_cache=False)
    delta_TD = _delta(probe, hidden[0][0, chosen_L].float(), targets_L[chosen_L])
    return delta_TD.cpu(), inputs[0][0, chosen_L].float().cpu()


def _delta(probe: Probe, hidden_TD: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    if not len(targets_T):
        return hidden_TD
    gamma_D = _weight(probe.norm).float()
    rho_T = (hidden_TD.square().mean(1) + probe.epsilon).rsqrt()
    errors_TD = _through_head(probe.head, hidden_TD * rho_T[:, None] * gamma_D, targets_T)
    upstream_TD = errors_TD * (gamma_D / len(targets_T))
    radial_T = (hidden_TD * upstream_TD).mean(1)
    return rho_T[:, None] * upstream_TD - (rho_T**3 * radial_T)[:, None] * hidden_TD


def _through_head(head: nn.Module, normed_TD: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """Gradients of the tokens' cross entropies with respect to the head's input, in float32.

    The softmax is taken chunk by chunk over the vocabulary with a running maximum, so every row of the
    head is read (and, in half precision, converted) once, and no more than a chunk of logits is held.

    Reference:
        Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
    """
    weight_VD = _weight(head)
    bias_V = getattr(head, "bias", None)
    maximum_T = normed_TD.new_full((len(normed_TD), 1), -torch.inf)
    normaliser_T = torch.zeros_like(maximum_T)
    expected_TD = torch.zeros_like(normed_TD)
    for start in range(0, len(weight_VD), VOCABULARY_PER_CHUNK):
        chunk = slice(start, start + VOCABULARY_PER_CHUNK)
        weight_CD = weight_VD[chunk].float()
        scores_TC = normed_TD @ weight_CD.T
        if bias_V is not None:
            scores_TC += bias_V[chunk]
        raised_T = torch.maximum(maximum_T, scores_TC.amax(1, keepdim=True))
        scores_TC.sub_(raised_T).exp_()
        decay_T = (maximum_T - raised_T).exp_()
        normaliser_T.mul_(decay_T).add_(scores_TC.sum(1, keepdim=True))
        expected_TD.mul_(decay_T).addmm_(scores_TC, weight_CD)
        maximum_T = raised_T
    return expected_TD / normaliser_T - weight_VD[targets_T].float()


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
        delta_TD, _ = _factors(probe, EncodedExample("closed-form check", ids, ids))
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


logger = logging.getLogger(__name__)
LoadedProbe = tuple[Probe, PreTrainedTokenizerBase]


def load_probe(settings: ModelSettings, max_length: int, setting: str) -> LoadedProbe:
    """Load the probe and try that it can read `max_length` tokens, which `setting` names in messages."""
    model, tokenizer = load_model(settings)
    check_length(model, max_length, setting)
    return open_probe(model), tokenizer


def read_as_text(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> tuple[Example, ...]:
    """What a probe reads: without a chat template the texts before a conversation's last turn, and that."""
    if tokenizer.chat_template:
        return tuple(examples)
    return tuple(replace(example, turns=()) for example in examples)


def public_map(mechanism: ProfileMechanism, basis: Path) -> PublicMap:
    """The public map of the roster's mechanism, with the basis from this file if the mechanism names one."""
    return PublicMap(mechanism, PublicBasis.load(basis) if mechanism.basis_sha256 else None)


def clipped_profile(
    probe: Probe, examples: Sequence[EncodedExample], public_map: PublicMap, randomness: BitSource,
    advance: Callable[[int], None] = lambda _: None, unit: Unit = "example",
) -> ClippedSum:  # fmt: skip
    """Probe a Poisson sample of the units and sum their clipped gradients. Private, not a release.

    What one person's examples add up to is clipped as one. `advance` is told how much is done, in per cent:
    it is to say nothing of the number of examples. MechanismError if the probe is not the mechanism's;
    PrivacyError if there are too few examples, or an id occurs twice.
    """
    mechanism = public_map.mechanism
    _check_data(examples, mechanism, len(unit_ids(examples, unit)))
    check_probe(probe, mechanism)
    units = by_unit(examples, unit)
    sample = poisson_sample(len(units), mechanism.sampling_rate, randomness)
    total = ClippedSum.empty(mechanism.dimensions)
    sampled = (example for index in sample for example in units[index])
    with closing(gradient_factors(probe, sampled)) as gradients:
        for done, index in enumerate(sample, start=1):
            own = [public_map.rows([next(gradients)]) for _ in units[index]]
            total += clipped_sum(np.sum(own, axis=0), mechanism)
            advance(100 * done // len(sample))
    if total.rejected:
        logger.warning("%d examples gave no finite gradient and were left out of the profile", total.rejected)
    return total


def check_probe(probe: Probe, mechanism: ProfileMechanism) -> None:
    """Refuse, with a MechanismError, a probe whose gradient's shape or weights are not the roster's."""
    shape = (probe.hidden_size, probe.intermediate_size)
    agreed = mechanism.reduction.hidden_size, mechanism.reduction.intermediate_size
    if shape != agreed:
        raise MechanismError(
            f"the probe's gradient has shape {shape}, the mechanism's {agreed}; load {mechanism.probe}"
        )
    if probe.sha256 != mechanism.probe_sha256:
        raise MechanismError(
            f"the probe's weights have fingerprint {probe.sha256[:16]}…, those of {mechanism.probe} in the "
            f"roster {mechanism.probe_sha256[:16]}…; profiles of different probes cannot be compared: name "
            "the roster's in [probe] path"
        )


def _check_data(examples: Sequence[EncodedExample], mechanism: ProfileMechanism, count: int) -> None:
    if count < mechanism.minimum_examples:
        raise PrivacyError(
            f"a task profile needs at least {mechanism.minimum_examples} examples, this client has fewer; "
            "it can take part without a profile and gets uniform weights"
        )
    if len({example.id for example in examples}) != len(examples):
        raise PrivacyError(
            "some example ids occur more than once, and the unit of privacy is one example; give every "
            "example its own id and list it once"
        )
    if count < mechanism.warn_below:
        words = "a task profile from fewer than %d examples is mostly noise; relevance may not be found"
        logger.warning(words, mechanism.warn_below)


@dataclass(frozen=True)
class ProfileProbe:
    """Makes the private sum of a client's profile; `load` gives the probe once per sum, not before."""

    load: Callable[[], LoadedProbe]
    public_map: PublicMap
    examples: Sequence[Example]
    max_length: int
    randomness: BitSource
    setting: str = "profile_max_length"
    advance: Callable[[int], None] = lambda _: None
    unit: Unit = "example"

    def __call__(self) -> ClippedSum:
        """The sum, never to leave; the memory of a probe that was loaded for it is free again afterwards."""
        probe, encoded = self._open()
        return clipped_profile(probe, encoded, self.public_map, self.randomness, self.advance, self.unit)

    def check(self) -> None:
        """Find out now what would stop a release, as one error: nothing is probed, drawn or charged."""
        probe, _ = self._open()
        check_probe(probe, self.public_map.mechanism)

    def _open(self) -> tuple[Probe, list[EncodedExample]]:
        probe, tokenizer = self.load()
        # The probe reads the words alone: nothing of an image is in a profile, and any language model can be
        # the probe. Clients that ask the same about other images look alike to it.
        questions = read_as_text(tokenizer, [without_images(example) for example in self.examples])
        encoded = encode_examples(tokenizer, questions, self.max_length, setting=self.setting)
        check_ids(probe.base, (e.input_ids for e in encoded), "the training examples", "[probe] path")
        return probe, encoded


def client_probe(
    settings: ClientSettings, kit: Kit, examples: Sequence[Example], randomness: BitSource,
    advance: Callable[[int], None] = lambda _: None,
) -> ProfileProbe:  # fmt: skip
    """The probe of a client with a process of its own: loaded when a profile is due, then let go."""
    length = settings.profile_max_length
    terms = kit.roster.terms
    return ProfileProbe(
        lambda: load_probe(settings.probe, length, "profile_max_length"),
        public_map(terms.profile, kit.basis), examples, length, randomness, advance=advance, unit=terms.unit,
    )  # fmt: skip
