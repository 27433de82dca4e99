"""How much of what a core learnt in one model it still knows in another: figures, without any model.

A task is scored on N test prompts by the log-likelihoods s of its C choices. What a model prefers before it
reads the prompt is no knowledge of the task, so it is taken out without labels: with p = log softmax over the
choices, the calibrated scores are log softmax(p_nc − mean_n p_nc). A core that only adds a constant to each
choice changes nothing then. The transfer ratio of some runs is

    Σ (moved − zero-shot) / Σ (retrained in the target − zero-shot),

in calibrated accuracy, and in calibrated loss; 1 where the moved core is as good as one trained there.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final

import numpy as np
import torch
from scipy.stats import sem, t
from torch.nn import functional

from fedmosaic.alignment.activations import ModuleKey
from fedmosaic.alignment.anchor import BasisPair
from fedmosaic.alignment.moments import Moments

_LEARNT: Final = 0.1
"""Least gain in accuracy by which a task counts as learnt."""
ZERO_SHOT: Final = "zero-shot"
RETRAINED: Final = "retrained"
MOVED: Final = "moved"
RANDOM_CORE: Final = "random core"
RANDOM_BASES: Final = "random bases"
FEW: Final = "few labels"
TUNED: Final = "moved, few labels"


@dataclass(frozen=True)
class Score:
    """One calibrated score of a target on a task, in nats and as a share of right choices.

    The variant is `zero-shot`, or LABEL: and one of `retrained`, `moved` and the controls.
    """

    task: str
    source: str
    target: str
    bases: str
    variant: str
    seed: int
    loss: float
    accuracy: float


def calibrated(scores_NC: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (N, C) of the choices without what is the same for all prompts."""
    logs_NC = functional.log_softmax(scores_NC.double(), dim=1)
    return functional.log_softmax(logs_NC - logs_NC.mean(0), dim=1)


def loss_and_accuracy(scores_NC: torch.Tensor, answers_N: Sequence[int]) -> tuple[float, float]:
    """Mean loss of the answers (nats) and share of right choices, both calibrated."""
    logs_NC, answers = calibrated(scores_NC), torch.tensor(answers_N)
    return float(functional.nll_loss(logs_NC, answers)), float((logs_NC.argmax(1) == answers).double().mean())


def ratio(gains: Mapping[str, Sequence[float]], wholes: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """Transfer ratio and half of its 95 % interval, from moved and retrained gains by task, one per seed.

    Seeds of one task are not independent, so the unit is the task's mean: the estimator of a ratio, its
    error from the residuals gain − ratio · whole by Student's t. Infinite with fewer than two tasks, and nan
    where nothing was to be gained.
    """
    gain, whole = (np.array([fmean(found[task]) for task in wholes]) for found in (gains, wholes))
    if not whole.size or whole.sum() <= 0.0:
        return math.nan, math.inf
    found = float(gain.sum() / whole.sum())
    if whole.size < 2:
        return found, math.inf
    error = float(sem(gain - found * whole)) / float(whole.mean())
    return found, float(t.ppf(0.975, whole.size - 1)) * error


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t; infinite for a single value."""
    count = len(values)
    return fmean(values), float(t.ppf(0.975, count - 1) * sem(values)) if count > 1 else math.inf


def random_core(core: np.ndarray, rank: int, seed: int) -> np.ndarray:
    """A core that knows nothing: normal entries, P and Q of every module as long as the given ones."""
    drawn = np.random.default_rng(seed).standard_normal(core.shape).astype(core.dtype)
    for given, made in zip(
        core.reshape(-1, rank * rank + rank), drawn.reshape(-1, rank * rank + rank), strict=True
    ):
        for part in (slice(None, rank * rank), slice(rank * rank, None)):
            made[part] *= np.linalg.norm(given[part]) / np.linalg.norm(made[part])
    return drawn


def gradient_agreement(source_NMK: torch.Tensor, target_NMK: torch.Tensor) -> tuple[float, float]:
    """Cosine of two models' core gradients, K entries in each of M modules, of the same N examples.

    Of the mean over examples, and of single examples; both are means over modules, because a cosine of all
    modules together is ruled by the few with the largest gradients.
    """
    together = functional.cosine_similarity(source_NMK.mean(0), target_NMK.mean(0), dim=1)
    single = functional.cosine_similarity(source_NMK, target_NMK, dim=2)
    return float(together.mean()), float(single.mean())


def reading_agreement(
    inputs: Mapping[ModuleKey, Moments],
    source: Mapping[ModuleKey, BasisPair],
    target: Mapping[ModuleKey, BasisPair],
) -> tuple[float, float]:
    """Correlation of A x of two models at aligned positions, and the source's size of it over the target's.

    Means over modules, of the sizes the geometric one.
    """
    correlations, sizes = [], []
    for key, moments in inputs.items():
        centred = moments.centred()
        left, right = source[key][0].double(), target[key][0].double()
        joint = float(((left @ centred.cross_DE) * right).sum())
        own = float(((left @ centred.anchor_DD) * left).sum())
        other = float(((right @ centred.model_EE) * right).sum())
        varies = own > 0 and other > 0
        correlations.append(joint / math.sqrt(own * other) if varies else 0.0)
        sizes.append(0.5 * math.log(own / other) if varies else 0.0)
    return fmean(correlations), math.exp(fmean(sizes))


def ratios(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Transfer ratio of every variant by bases and direction, over the tasks that both models have learnt."""
    rows: list[dict[str, Any]] = []
    groups: dict[tuple[str, str, str], list[Score]] = {}
    for score in scores:
        groups.setdefault((score.bases, score.source, score.target), []).append(score)
    for (bases, source, target), members in groups.items():
        back = groups.get((bases, target, source), members)
        learnt = sorted(_learnt(members) & _learnt(back))
        for variant in (MOVED, RANDOM_CORE, RANDOM_BASES, FEW, TUNED):
            if variant not in {score.variant for score in members}:
                continue
            row: dict[str, Any] = {"bases": bases, "source": source, "target": target, "variant": variant}
            row |= {"tasks": learnt, "seeds": len({score.seed for score in members})}
            for name in ("accuracy", "loss"):
                gains, wholes = (_gains(members, learnt, which, name) for which in (variant, RETRAINED))
                row[name], row[f"{name}_half_width"] = ratio(gains, wholes)
            rows.append(row)
    return rows


def _gains(scores: Sequence[Score], tasks: Sequence[str], variant: str, name: str) -> dict[str, list[float]]:
    """What a variant is better than zero-shot, by task, one per seed."""
    values = {(s.task, s.seed, s.variant): float(getattr(s, name)) for s in scores}
    sign = -1.0 if name == "loss" else 1.0
    return {
        task: [
            sign * (value - values[task, seed, ZERO_SHOT])
            for (of, seed, which), value in values.items()
            if of == task and which == variant
        ]
        for task in tasks
    }


def _learnt(scores: Sequence[Score]) -> set[str]:
    gains = _gains(scores, sorted({score.task for score in scores}), RETRAINED, "accuracy")
    return {task for task, found in gains.items() if fmean(found) >= _LEARNT}


def summary(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Mean and interval over seeds per task, direction and variant, in the order of the scores."""
    groups: dict[tuple[str, ...], list[Score]] = {}
    for score in scores:
        named = (score.task, score.source, score.target, score.bases, score.variant)
        groups.setdefault(named, []).append(score)
    rows: list[dict[str, Any]] = []
    for key, members in groups.items():
        row: dict[str, Any] = dict(zip(("task", "source", "target", "bases", "variant"), key, strict=True))
        for name in ("loss", "accuracy"):
            row[name], row[f"{name}_half_width"] = interval([getattr(score, name) for score in members])
        rows.append(row)
    return rows
