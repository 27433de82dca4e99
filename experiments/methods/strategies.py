"""The baselines, each as what a client trains, what it shares, how that is combined and what is scored.

Each class names its paper; where the release of FedMosaic's authors departs from the published
method (personal adapters averaged, for one), the published method is what stands here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from fedmosaic.client.model.examples import IGNORED, EncodedExample, Example
from fedmosaic.client.model.loss import Batch, ExampleLosses, example_losses, logits_at
from fedmosaic.client.model.sampling import EpochSampler
from fedmosaic.client.model.training import TrainingSettings, train_local
from fedmosaic.experiments.methods.lora import (
    SummedLogits,
    Vector,
    factors,
    read_adapter,
    using,
    write_adapter,
)
from fedmosaic.protos.errors import ModelError

SHARED, PERSONAL, RECEIVED = "shared", "personal", "received"

PROXIMITY = 0.001
"""Ditto's pull of the personal adapter towards the received one, on the squared distance."""

DISTILLATION_TEMPERATURE = 2.0


@dataclass
class Trainer:
    """One client's training in one round.

    Attributes:
        model: with the client's adapters.
        examples: what it trains on.
        order: in which order; moved on by every fit.
        settings: steps, batch size, learning rates.
        pad_token_id: token to pad with.
        step_done: called after every optimizer step.
    """

    model: PeftModel
    examples: Sequence[EncodedExample]
    order: EpochSampler
    settings: TrainingSettings
    pad_token_id: int
    step_done: Callable[[], None] = field(default=lambda: None)

    def fit(
        self, losses: ExampleLosses = example_losses, steps: int | None = None, *, again: bool = False
    ) -> None:
        """Train what is trainable.

        Args:
            losses: per example.
            steps: optimizer steps; those of the settings by default, none if 0.
            again: leave the order of the examples where it was, so that the next fit sees the same batches.
        """
        if steps == 0:
            return
        position = self.order.state_dict()
        train_local(
            self.model,
            self.examples,
            self.settings if steps is None else self.settings.model_copy(update={"steps": steps}),
            pad_token_id=self.pad_token_id,
            sampler=self.order,
            losses=losses,
            progress=lambda *_: self.step_done(),
        )
        if again:
            self.order.load_state_dict(position)


@dataclass(frozen=True)
class ServerSide:
    """What a server that trains has.

    Attributes:
        model: of the architecture, with adapters of its own.
        public: public examples.
        pad_token_id: token to pad with.
        settings: learning rates and batch size of the clients.
        ranks: rank of the LoRA of each client with this architecture.
        architecture: which one it is.
        tokenizer: of the model.
        examples: the public examples as texts.
    """

    model: PeftModel
    public: Sequence[EncodedExample]
    pad_token_id: int
    settings: TrainingSettings
    ranks: Mapping[str, int]
    architecture: str
    tokenizer: PreTrainedTokenizerBase
    examples: Sequence[Example]


@dataclass(frozen=True)
class Exchange:
    """What a round's exchange leaves each client with, and what it cost.

    Attributes:
        received: the shared adapter that each client goes on with.
        sent: bytes that each client sent.
        got: bytes that each client received.
    """

    received: Mapping[str, Vector]
    sent: Mapping[str, int]
    got: Mapping[str, int]

    @classmethod
    def of_adapters(cls, uploads: Mapping[str, Vector], received: Mapping[str, Vector]) -> "Exchange":
        """An exchange in which adapters travel both ways."""
        return cls(
            received,
            {name: vector.nbytes for name, vector in uploads.items()},
            {name: vector.nbytes for name, vector in received.items()},
        )


class Strategy:
    """A method without sharing; the base of all others.

    Attributes:
        adapters: LoRA adapters on every client's model.
        shares: whether the shared adapter leaves the client.
        passes: optimizer steps of a client for every step of the settings.
        alike: whether all adapters start with the same A; they need not where both are trained on one loss,
            which would keep them equal.
    """

    adapters: ClassVar[tuple[str, ...]] = (SHARED,)
    shares: ClassVar[bool] = False
    passes: ClassVar[int] = 1
    alike: ClassVar[bool] = True

    def __init__(self) -> None:
        self.server_state: dict[str, Vector] = {}
        """What the server keeps from round to round."""

    def train(self, trainer: Trainer) -> None:
        """Train one client for one round."""
        with using(trainer.model, [SHARED], [SHARED]):
            trainer.fit()

    @contextmanager
    def scored(self, model: PeftModel) -> Iterator[nn.Module]:
        """The model as it is scored after a round's training."""
        with using(model, [SHARED]):
            yield model

    def upload(self, model: PeftModel) -> Vector:
        """What leaves the client, if anything does."""
        return read_adapter(model, SHARED)

    def combine(self, uploads: Mapping[str, Vector], server: ServerSide) -> Mapping[str, Vector]:
        """What every client of one architecture receives.

        Uniform mean over the architecture's clients, the recipient among them.
        """
        check_uploads(uploads)
        stacked = np.stack([uploads[name] for name in sorted(uploads)])
        mean: np.ndarray = stacked.mean(axis=0, dtype=np.float64)
        return dict.fromkeys(uploads, mean.astype(np.float32).reshape(-1))

    def exchange(self, uploads: Mapping[str, Vector], servers: Mapping[str, ServerSide]) -> Exchange:
        """What all clients of all architectures receive; here each architecture by itself.

        Args:
            uploads: by client.
            servers: by architecture.
        """
        received: dict[str, Vector] = {}
        for server in servers.values():
            received |= self.combine({name: uploads[name] for name in server.ranks}, server)
        return Exchange.of_adapters(uploads, received)

    def newcomer(self, alike: Mapping[str, Vector], architecture: str) -> Vector | None:
        """What an unseen client begins with.

        Args:
            alike: what each member of its architecture and rank received last; may be empty.
            architecture: of the newcomer.

        Returns:
            Its shared adapter; None for a fresh one.
        """
        return next(iter(alike.values()), None) if self.shares else None

    def receive(self, model: PeftModel, vector: Vector) -> None:
        """Take what came back."""
        write_adapter(model, SHARED, vector)


def check_uploads(uploads: Mapping[str, Vector]) -> None:
    """Refuse what cannot be combined.

    Raises:
        ModelError: there is no upload, or one is not finite.
    """
    bad = sorted(name for name, vector in uploads.items() if not np.isfinite(vector).all())
    if bad or not uploads:
        raise ModelError(f"uploads that are not finite: {', '.join(bad) or 'none, but there is no upload'}")


class LocalOnly(Strategy):
    """Every client alone."""


class FedAvg(Strategy):
    """FedIT: all of LoRA averaged in every round, trained on from there."""

    shares = True


class Ditto(Strategy):
    """A shared adapter as in FedAvg, and a personal one held near it that never leaves.

    Reference: Li et al. (2021), arXiv 2012.04221, with the proximity weight of the authors' comparison.
    """

    adapters: ClassVar[tuple[str, ...]] = (SHARED, PERSONAL)
    shares = True
    passes = 2

    def train(self, trainer: Trainer) -> None:
        """The personal adapter towards the received one, then the shared one, on the same batches."""
        anchor = [part.detach().clone() for pair in factors(trainer.model, SHARED) for part in pair]
        with using(trainer.model, [PERSONAL], [PERSONAL]):
            trainer.fit(_near(anchor), again=True)
        with using(trainer.model, [SHARED], [SHARED]):
            trainer.fit()

    @contextmanager
    def scored(self, model: PeftModel) -> Iterator[nn.Module]:
        """The personal adapter alone."""
        with using(model, [PERSONAL]):
            yield model


def _near(anchor: Sequence[torch.Tensor]) -> ExampleLosses:
    def losses(model: nn.Module, batch: Batch) -> torch.Tensor:
        parts = [part for pair in factors(model, PERSONAL) for part in pair]
        distance = torch.stack(
            [(part - fixed).float().square().sum() for part, fixed in zip(parts, anchor, strict=True)]
        ).sum()
        return example_losses(model, batch) + PROXIMITY * distance

    return losses


class FedDpa(Strategy):
    """Dual personalising adapters: the shared one first, then the personal one beside it.

    Half of the steps each; scored with the mean of both. The instance-wise weights of the original are not
    here, as they are not in the authors' comparison.

    Reference: Yang et al. (2024), arXiv 2403.19211.
    """

    adapters: ClassVar[tuple[str, ...]] = (SHARED, PERSONAL)
    shares = True

    def train(self, trainer: Trainer) -> None:
        """An odd step goes to the personal adapter."""
        half = trainer.settings.steps // 2
        with using(trainer.model, [SHARED], [SHARED]):
            trainer.fit(steps=half)
        with using(trainer.model, [SHARED, PERSONAL], [PERSONAL], scale=0.5):
            trainer.fit(steps=trainer.settings.steps - half)

    @contextmanager
    def scored(self, model: PeftModel) -> Iterator[nn.Module]:
        """The mean of both adapters."""
        with using(model, [SHARED, PERSONAL], scale=0.5):
            yield model


class FedSim(Strategy):
    """Simultaneous partial personalisation: one loss on the summed logits trains both adapters.

    Reference: Pillutla et al. (2022), arXiv 2204.03809.
    """

    adapters: ClassVar[tuple[str, ...]] = (SHARED, PERSONAL)
    shares = True
    alike = False

    def train(self, trainer: Trainer) -> None:
        """Both adapters at once."""
        summed = SummedLogits(trainer.model, self.adapters, self.adapters)
        with using(trainer.model, self.adapters, self.adapters):
            trainer.fit(lambda _model, batch: example_losses(summed, batch))

    @contextmanager
    def scored(self, model: PeftModel) -> Iterator[nn.Module]:
        """The sum of both adapters' logits."""
        yield SummedLogits(model, self.adapters)


class FedDat(Strategy):
    """Dual adapter teacher: shared and personal adapters teach each other beside the frozen received one.

    Reference: Chen et al. (2024), arXiv 2308.12305.
    """

    adapters: ClassVar[tuple[str, ...]] = (SHARED, PERSONAL, RECEIVED)
    shares = True

    def train(self, trainer: Trainer) -> None:
        """Per batch: the shared adapter learns from the pair, the personal one from the shared one."""
        write_adapter(trainer.model, RECEIVED, read_adapter(trainer.model, SHARED))
        with using(trainer.model, self.adapters, [SHARED, PERSONAL]):
            trainer.fit(_mutual(trainer.model))

    @contextmanager
    def scored(self, model: PeftModel) -> Iterator[nn.Module]:
        """The mean of the received and the personal adapter."""
        with using(model, [RECEIVED, PERSONAL], scale=0.5):
            yield model


def _mutual(model: PeftModel) -> ExampleLosses:
    def losses(_model: nn.Module, batch: Batch) -> torch.Tensor:
        def shared_logits() -> torch.Tensor:
            with using(model, [SHARED], [SHARED]):
                return answer_logits(model, batch)

        def pair_logits() -> torch.Tensor:
            with using(model, [RECEIVED, PERSONAL], [PERSONAL], scale=0.5):
                return answer_logits(model, batch)

        shared, pair = shared_logits(), pair_logits()
        return distilled(shared, pair.detach(), batch) + distilled(pair, shared.detach(), batch)

    return losses


def answer_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits (B, K, V), float32, at every position that is an answer's in some row."""
    positions = (batch["labels"][:, 1:] != IGNORED).any(dim=0).nonzero().squeeze(1)
    return logits_at(model, batch, positions).float()


def distilled(student: torch.Tensor, teacher: torch.Tensor, batch: Batch) -> torch.Tensor:
    """½ (cross entropy + T² KL(teacher ‖ student)) per example, each a mean over its answer tokens.

    Args:
        student: (B, K, V) from `answer_logits`.
        teacher: the same, without gradient.
        batch: with labels.

    Returns:
        (B,) losses.
    """
    labels_BT = batch["labels"][:, 1:]
    labels_BK = labels_BT[:, (labels_BT != IGNORED).any(dim=0)]
    mask_BK = labels_BK != IGNORED
    hard_BK = functional.cross_entropy(
        student.flatten(0, 1), labels_BK.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(labels_BK)
    t = DISTILLATION_TEMPERATURE
    soft_BK = functional.kl_div(
        (student / t).log_softmax(-1), (teacher / t).log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    both_BK = 0.5 * (hard_BK + t * t * soft_BK) * mask_BK
    return both_BK.sum(dim=1) / mask_BK.sum(dim=1)
