"""Text recovery from the task profile: both spans of the gradient, exact δ per token, a beam.

The attacker holds one release and knows how a text begins. For every next token it computes the exact δ that
this token would have given and tests it against the left span; the state that follows is tested against the
right span; the language model breaks ties. A gradient G = Σ_t δ_t x_tᵀ over T tokens has rank at most T:
while T is below its width, true δ_t and x_t are in the leading singular spans, and almost no wrong ones are.

Reference: Petrov et al. 2024, "DAGER: Exact gradient inversion for large language models" (arXiv:2405.15586).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from fedmosaic.client.model.examples import IGNORED, EncodedExample, Example
from fedmosaic.client.profile.probe import Probe, gradient_factors
from fedmosaic.experiments.attacks.profile import AUTHORS_NOISE, AUTHORS_SHARE, noise_multiplier
from fedmosaic.experiments.attacks.statistics.membership import gram_matrix
from fedmosaic.experiments.attacks.statistics.results import AttackResult, Figure, Setting
from fedmosaic.privacy.mechanism.noise import NoiseSource
from fedmosaic.privacy.mechanism.profile import clipped_sum, release
from fedmosaic.privacy.mechanism.projection import GradientFactors, PublicBasis, PublicMap

TEXT: Final = "Text recovery from the profile"
OWN_GUESS: Final = "no {} at all: the language model's own guess"
BEAMS: Final = 2
CANDIDATES: Final = 5
LIKELY_TOKENS: Final = 20_000
_KNOWN_WORDS: Final = 3
_FLOOR: Final = 1e-3
_WEIGHT: Final = 8.0


class Spans(NamedTuple):
    """Both spaces of a release, (m, r) and (f, r) orthonormal columns; share of noise in the middle one."""

    left: np.ndarray
    right: np.ndarray
    noise_share: float


def spans_of(released: np.ndarray, noise: float, largest_rank: int) -> Spans:
    """Singular vectors of an (m, f) release that stand out of its noise; at least one is kept.

    A direction counts if its singular value is above the largest that noise of the standard deviation s per
    entry has alone, about s (√m + √f).
    """
    left, values, right = np.linalg.svd(released, full_matrices=False)
    edge = noise * (np.sqrt(released.shape[0]) + np.sqrt(released.shape[1]))
    floor = max(1.02 * float(edge), 1e-7 * float(values[0]))
    rank = max(1, min(largest_rank, int(np.count_nonzero(values > floor))))
    share = min(0.999, float((edge / max(values[rank // 2], 1e-300)) ** 2))
    return Spans(left[:, :rank], right[:rank].T, share)


def evidence(vectors: np.ndarray, basis: np.ndarray, floor: float) -> np.ndarray:
    """How much better each of (n, m) vectors fits into a space than a vector from nowhere would.

    -log of the share of energy outside the space of the (m, r) orthonormal columns, at most -log(floor),
    where the floor > 0 is what noise keeps outside of a true vector; 0 for a vector of zeros.
    """
    energy = np.einsum("nm,nm->n", vectors, vectors)
    inside = np.einsum("nr,nr->n", vectors @ basis, vectors @ basis)
    outside = 1.0 - inside / np.maximum(energy, 1e-300)
    return np.asarray(np.where(energy > 0.0, -np.log(np.clip(outside, 0.0, 1.0) + floor), 0.0))


class Release(NamedTuple):
    """One release as a matrix, and how the attacker's own vectors get into its coordinates.

    `spans` stands out of its noise, None to decode with the language model alone; `left` maps (n, D)
    gradients δ to the rows, `right` (n, F) inputs x to the columns.
    """

    spans: Spans | None
    left: Callable[[np.ndarray], np.ndarray]
    right: Callable[[np.ndarray], np.ndarray]
    words: str
    setting: Setting
    epsilon: float | None


def continuations(
    examples: Sequence[Example], tokenizer: Any, count: int, tokens: int
) -> list[EncodedExample]:
    """Examples that continue the first words of prompts' first lines, by six to `tokens` tokens."""
    found: list[EncodedExample] = []
    for example in examples:
        words = example.prompt.split("\n", 1)[0].split(" ")
        known = tokenizer(" ".join(words[:_KNOWN_WORDS]), add_special_tokens=True)["input_ids"]
        rest = tokenizer(" " + " ".join(words[_KNOWN_WORDS:]), add_special_tokens=False)["input_ids"][:tokens]
        if len(rest) >= 6:
            ids = torch.tensor([*known, *rest], dtype=torch.int64)
            labels = torch.tensor([IGNORED] * len(known) + rest, dtype=torch.int64)
            found.append(EncodedExample(example.id, ids, labels))
        if len(found) == count:
            break
    return found


def text_results(
    probe: Probe,
    texts: Sequence[EncodedExample],
    public_map: PublicMap,
    basis: PublicBasis | None,
    noise: NoiseSource,
    seed: int,
) -> list[AttackResult]:
    """Recover texts from one release of them: the authors' sanitiser, DP in its place, and the product."""
    factors = list(gradient_factors(probe, texts))
    generator = np.random.default_rng(seed)
    guess = Release(None, np.asarray, np.asarray, OWN_GUESS.format("release"), "no_sanitiser", None)
    releases = [*_references(factors, generator), *_product(factors, public_map, basis, noise), guess]
    return [_result(probe, texts, released) for released in releases]


def decode(probe: Probe, known: Sequence[int], length: int, released: Release) -> list[int]:
    """The most plausible continuation, of some length, of the tokens that an attacker knows."""
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    states = _states(probe, [list(known)])
    for _ in range(length):
        grown: list[tuple[float, list[int]]] = []
        for (score, tokens), (hidden, _) in zip(beams, states, strict=True):
            scores = _token_scores(probe, hidden, released)
            best = np.argpartition(scores, -CANDIDATES)[-CANDIDATES:]
            grown += [(score + float(scores[token]), [*tokens, int(token)]) for token in best]
        after = _states(probe, [[*known, *tokens] for _, tokens in grown])
        if released.spans is not None:
            inputs = released.right(np.stack([state for _, state in after]))
            trust = _WEIGHT * (1.0 - released.spans.noise_share)
            fits = trust * evidence(inputs, released.spans.right, _FLOOR)
            grown = [(score + float(fit), tokens) for (score, tokens), fit in zip(grown, fits, strict=True)]
        order = sorted(range(len(grown)), key=lambda index: -grown[index][0])[:BEAMS]
        beams, states = [grown[index] for index in order], [after[index] for index in order]
    return beams[0][1]


def _references(factors: Sequence[GradientFactors], generator: np.random.Generator) -> Iterator[Release]:
    rows, count = int(AUTHORS_SHARE * factors[0].delta.shape[1]), len(factors)

    def kept(delta: np.ndarray) -> np.ndarray:
        return delta[:, :rows]

    matrices = [kept(factor.delta).T.astype(np.float64) @ factor.inputs for factor in factors]
    tokens = sum(len(factor.delta) for factor in factors)
    spread = AUTHORS_NOISE / math.sqrt(count)
    mean = np.mean(matrices, axis=0) + spread * generator.standard_normal(matrices[0].shape)
    words = f"first 40 % of rows, noise 1e-4, no clipping, mean of {count} texts"
    yield Release(spans_of(mean, spread, tokens), kept, np.asarray, words, "authors", math.inf)
    norms = np.sqrt(np.diag(gram_matrix(factors, AUTHORS_SHARE)))
    bound = float(norms.min())
    deviation = noise_multiplier(8.0) * bound
    total = np.sum([m * min(1.0, bound / n) for m, n in zip(matrices, norms, strict=True)], axis=0)
    total = total + deviation * generator.standard_normal(total.shape)
    words = f"first 40 % of rows, clipped, ε = 8, sum of {count} texts"
    yield Release(spans_of(total, deviation, tokens), kept, np.asarray, words, "variant", 8.0)


def _product(
    factors: Sequence[GradientFactors], public_map: PublicMap, basis: PublicBasis | None, noise: NoiseSource
) -> Iterator[Release]:
    """The product's release, its whitening taken off again: a small matrix between public directions."""
    mechanism = public_map.mechanism
    whole = mechanism.reduction.coordinate_share == 1.0
    if basis is None or basis.left is None or basis.right is None or not whole:
        return
    left, right = basis.left.astype(np.float64), basis.right.astype(np.float64)
    total = clipped_sum(public_map.rows(factors), mechanism)
    vector = release(total, mechanism, noise).astype(np.float64)
    if basis.whitening is not None:
        vector = np.asarray(np.linalg.solve(basis.whitening.astype(np.float64), vector), dtype=np.float64)
    if basis.centre is not None:
        vector = vector + len(factors) * basis.centre
    matrix = vector.reshape(left.shape[1], right.shape[1])
    tokens = sum(len(factor.delta) for factor in factors)
    spans = spans_of(matrix, 0.0, min(tokens, min(matrix.shape) // 2))
    sigma = mechanism.noise_multiplier
    words = f"kronecker, {mechanism.dimensions} numbers, σ = {sigma:.3g}, sum of {len(factors)} texts"
    yield Release(spans, lambda d: d @ left, lambda x: x @ right, words, "product", None)


def _result(probe: Probe, texts: Sequence[EncodedExample], released: Release) -> AttackResult:
    right, total, verbatim = 0, 0, 0
    for text in texts:
        supervised = text.labels != IGNORED
        truth = text.input_ids[supervised].tolist()
        found = decode(probe, text.input_ids[~supervised].tolist(), len(truth), released)
        matches = sum(a == b for a, b in zip(truth, found, strict=True))
        right, total, verbatim = right + matches, total + len(truth), verbatim + (matches == len(truth))
    return AttackResult(
        attack=TEXT,
        adversary="server that knows how the texts begin",
        sees="one release; the probe model is public",
        statistic="both spans by SVD, exact δ of every token, language model, beam",
        release=released.words,
        setting=released.setting,
        epsilon=released.epsilon,
        figures=(
            Figure.share(f"tokens recovered (of {total})", right, total),
            Figure.share(f"texts recovered verbatim (of {len(texts)})", verbatim, len(texts)),
        ),
        note="a lower bound: a better search recovers more. Compare with the language model's own guess",
    )


def _token_scores(probe: Probe, hidden: np.ndarray, released: Release) -> np.ndarray:
    """Evidence for every token of the vocabulary: left span and log-probability."""
    weights: Any = probe.head.weight  # (V, D)
    gain: Any = probe.norm.weight
    head, gamma = weights.detach().float().numpy(), gain.detach().float().numpy()
    scale = 1.0 / math.sqrt(float(np.mean(hidden**2)) + probe.epsilon)
    logits = head @ (hidden * scale * gamma)
    logits -= logits.max()
    log_probability = logits - math.log(float(np.exp(logits).sum()))
    if released.spans is None:
        return np.asarray(log_probability)
    # Tokens that the model thinks next to impossible are left out; it saves nearly all of the time.
    kept = np.argsort(log_probability)[-LIKELY_TOKENS:]
    upstream = (np.exp(log_probability) @ head - head[kept]) * gamma
    along = upstream @ hidden / len(hidden)
    delta = scale * upstream - scale**3 * np.outer(along, hidden)
    fits = evidence(released.left(delta), released.spans.left.astype(np.float32), _FLOOR)
    scores = np.full(len(head), -np.inf)
    scores[kept] = log_probability[kept] + _WEIGHT * (1.0 - released.spans.noise_share) * fits
    return scores


def _states(probe: Probe, sequences: Sequence[Sequence[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Residual stream and input of `down_proj` at the last position of sequences of one length."""
    seen: dict[torch.nn.Module, np.ndarray] = {}

    def keep(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        seen[module] = arguments[0][:, -1].float().numpy()

    handles = [module.register_forward_pre_hook(keep) for module in (probe.norm, probe.down_proj)]
    try:
        with torch.inference_mode():
            probe.decoder(input_ids=torch.tensor(sequences), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return list(zip(seen[probe.norm], seen[probe.down_proj], strict=True))
