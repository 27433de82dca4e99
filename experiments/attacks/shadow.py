"""Shadow runs: membership in a P, Q release and in an aggregate, with the attacker's calibration (LiRA).

Many clients train the shared adapter on random halves of one pool of texts, from the public starting point,
with the product's own training: plain, and by DP-SGD. What each would release is attacked with all others
as shadow runs, by two statistics: the confidence of the model with the release loaded, and how far the
release lies along the candidate's gradient. The model is small, because there are many runs.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from peft import PeftModel

from fedmosaic.client.colora import read_shared, write_shared
from fedmosaic.client.dp.branch import only_shared_branch, private_parameters
from fedmosaic.client.dp.engine import example_gradient
from fedmosaic.client.dp.training import PrivateTrainingSettings, train_private
from fedmosaic.client.model.adapted import load_adapted
from fedmosaic.client.model.examples import EncodedExample, Example, collate, encode_examples, padding_token
from fedmosaic.client.model.loss import example_losses, training_mode
from fedmosaic.client.model.training import TrainingSettings, train_local
from fedmosaic.client.settings import ModelSettings
from fedmosaic.experiments.attacks.profile import DELTA
from fedmosaic.experiments.attacks.statistics.membership import draw_members
from fedmosaic.experiments.attacks.statistics.results import AttackResult, Setting
from fedmosaic.experiments.attacks.statistics.roc import Ceiling, ceiling_of, membership_figures
from fedmosaic.experiments.attacks.statistics.shadow import calibrated_scores
from fedmosaic.privacy.accounting.calibrate import noise_multiplier_for
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.federation.roster import AdapterTerms
from fedmosaic.privacy.mechanism.noise import SecureNoise

SHADOW: Final = "Membership by shadow runs (LiRA)"
EPSILONS: Final = (8.0, 1.0)
_RATE: Final = 0.5
_OTHER_CONTRIBUTORS: Final = 16
_VICTIMS_SHARE, _OTHERS_SHARE = 0.5, 0.25
_BATCH: Final = 64
_EXPECTED_BATCH: Final = 16


@dataclass(frozen=True, eq=False)
class Shadow:
    """What every run trains and every attacker knows.

    Attributes:
        settings: the base model.
        terms: the adapter, without its protection.
        candidates: the pool, of which each run has a random half.
        others: examples of the other contributors of an aggregate.
        training: steps and learning rates.
    """

    settings: ModelSettings
    terms: AdapterTerms
    candidates: Sequence[Example]
    others: Sequence[Example]
    training: TrainingSettings


def shadow_results(shadow: Shadow, *, runs: int, seed: int) -> Iterator[AttackResult]:
    """Train the runs, and attack each with the others as shadows.

    Args:
        shadow: model, data and training.
        runs: shadow runs per kind of release.
        seed: of memberships and of the order of examples; the noise of DP-SGD is the product's own.
    """
    generator = np.random.default_rng(seed)
    trainer = _Trainer(shadow, private=False)
    members = draw_members(runs, len(trainer.candidates), _RATE, generator)
    plain = np.stack(
        [trainer.plain(trainer.chosen(row), seed + number) for number, row in enumerate(members)]
    )
    name = f"{len(trainer.candidates)} candidates, {runs} runs of {shadow.training.steps} steps"
    yield from _attacked(
        trainer, plain, members, f"none: P and Q of one client; {name}", "server", "no_sanitiser", Ceiling()
    )
    mixed = _mixed(trainer, plain, generator)
    yield from _attacked(
        trainer, mixed, members,
        f"none or encrypted: an aggregate in which the client has {_VICTIMS_SHARE:g}; {name}",
        "recipient", "product", Ceiling(),
    )  # fmt: skip
    private = _Trainer(shadow, private=True)
    rate = min(1.0, _EXPECTED_BATCH / (_RATE * len(private.candidates)))
    for epsilon in EPSILONS:
        sigma = noise_multiplier_for(epsilon, DELTA, (), rate, shadow.training.steps)
        event = GaussianEvent(sigma, rate, shadow.training.steps)
        released = np.stack([private.private(private.chosen(row), event) for row in members])
        yield from _attacked(
            private, released, members, f"dp: P and Q of one client, ε = {epsilon:g}; {name}",
            "server or recipient", "variant", ceiling_of([event]), epsilon,
        )  # fmt: skip


class _Trainer:
    """One adapted model that is put back to the public starting point before every run."""

    def __init__(self, shadow: Shadow, *, private: bool) -> None:
        terms = shadow.terms.model_copy(update={"protection": "dp" if private else "none"})
        self._shadow = shadow
        self.model, tokenizer = load_adapted(shadow.settings, terms)
        self._pad = padding_token(tokenizer)
        length = shadow.training.max_length
        self.candidates = encode_examples(tokenizer, shadow.candidates, length)
        self.others = encode_examples(tokenizer, shadow.others, length)
        self._fresh = copy.deepcopy(_adapter(self.model))
        self.start = np.asarray(read_shared(self.model), dtype=np.float64)
        self.directions = self._directions()

    def chosen(self, members: np.ndarray) -> list[EncodedExample]:
        """The examples of a run."""
        return [example for example, inside in zip(self.candidates, members, strict=True) if inside]

    def plain(self, examples: Sequence[EncodedExample], seed: int) -> np.ndarray:
        """The shared vector after the product's training without DP."""
        self._reset()
        settings = self._shadow.training.model_copy(update={"seed": seed})
        train_local(self.model, examples, settings, pad_token_id=self._pad)
        return np.asarray(read_shared(self.model), dtype=np.float64)

    def private(self, examples: Sequence[EncodedExample], event: GaussianEvent) -> np.ndarray:
        """The shared vector after the product's DP-SGD."""
        self._reset()
        settings = PrivateTrainingSettings(
            learning_rate=self._shadow.training.private_learning_rate,
            steps=event.steps,
            sampling_rate=event.sampling_rate,
            expected_batch_size=_EXPECTED_BATCH,
            max_grad_norm=1.0,
            noise_multiplier=event.noise_multiplier,
        )
        with only_shared_branch(self.model) as cores:
            train_private(
                self.model, cores, examples, settings, charge=lambda _event: None,
                private_parameters=private_parameters(self.model), randomness=SecureNoise(),
            )  # fmt: skip
        return np.asarray(read_shared(self.model), dtype=np.float64)

    def confidence(self, vector: np.ndarray) -> np.ndarray:
        """Logit of the mean probability per answer token of every candidate, with a vector loaded."""
        self._reset()
        write_shared(self.model, vector.astype(np.float32), "local")
        parts = []
        with torch.inference_mode(), training_mode(self.model, False), only_shared_branch(self.model):
            for batch in _batches(self.candidates):
                parts.append(example_losses(self.model, collate(batch, self._pad)).double().numpy())
        losses = np.maximum(np.concatenate(parts), 1e-9)
        return np.asarray(-losses - np.log(-np.expm1(-losses)))

    def _directions(self) -> np.ndarray:
        """Unit gradients of the candidates at the public starting point, downhill."""
        with only_shared_branch(self.model) as cores, training_mode(self.model, False):
            rows = [example_gradient(self.model, cores, example) for example in self.candidates]
        found = -torch.stack(rows).double().cpu().numpy()
        return np.asarray(found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-300))

    @torch.no_grad()
    def _reset(self) -> None:
        for name, parameter in _adapter(self.model).items():
            parameter.copy_(self._fresh[name])


def _adapter(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.named_parameters() if "colora_" in name or "lora_" in name}


def _batches(examples: Sequence[EncodedExample]) -> Iterator[Sequence[EncodedExample]]:
    for start in range(0, len(examples), _BATCH):
        yield examples[start : start + _BATCH]


def _mixed(trainer: _Trainer, plain: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Aggregates of every run's vector with two other contributors', trained on texts of their own."""
    size = min(len(trainer.others), max(8, len(trainer.candidates) // 2))
    adapters = []
    for number in range(_OTHER_CONTRIBUTORS):
        order = generator.permutation(len(trainer.others))[:size]
        adapters.append(trainer.plain([trainer.others[index] for index in order], 10_000 + number))
    picks = [generator.choice(_OTHER_CONTRIBUTORS, 2, replace=False) for _ in plain]
    return np.stack(
        [
            _VICTIMS_SHARE * vector + _OTHERS_SHARE * (adapters[first] + adapters[second])
            for vector, (first, second) in zip(plain, picks, strict=True)
        ]
    )


def _attacked(
    trainer: _Trainer,
    released: np.ndarray,
    members: np.ndarray,
    words: str,
    adversary: str,
    setting: Setting,
    ceiling: Ceiling,
    epsilon: float = math.inf,
) -> Iterator[AttackResult]:
    groups = np.repeat(np.arange(len(members)), members.shape[1])
    statistics: dict[str, Callable[[], np.ndarray]] = {
        "confidence with the release loaded": lambda: np.stack([trainer.confidence(v) for v in released]),
        "release along the candidate's gradient": lambda: (released - trainer.start) @ trainer.directions.T,
    }
    for statistic, compute in statistics.items():
        scores = calibrated_scores(compute(), members)
        yield AttackResult(
            attack=SHADOW,
            adversary=f"{adversary}, with shadow runs on the same pool",
            sees="the release; model, starting point and training are public",
            statistic=f"{statistic}, calibrated per candidate on the other runs",
            release=words,
            setting=setting,
            epsilon=epsilon,
            delta=DELTA,
            figures=membership_figures(scores.ravel(), members.ravel(), ceiling, groups),
            note="Carlini et al. 2022, with one variance for all candidates. The model is small, so what "
            "an unprotected release tells is no measure for larger ones; the bound of `dp` holds for any",
        )
