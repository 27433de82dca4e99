"""What a method is: what a client trains, what it shares, how that is combined, and what is scored.

Where the release of FedMosaic's authors departs from a published method, the published one stands here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedmosaic.client.model.examples import EncodedExample, Example
from fedmosaic.client.model.loss import ExampleLosses, example_losses
from fedmosaic.client.model.training import EpochSampler, TrainingSettings, train_local
from fedmosaic.experiments.methods.lora import Vector, read_adapter, using, write_adapter
from fedmosaic.protos.errors import ModelError

SHARED, PERSONAL, RECEIVED, TEACHER = "shared", "personal", "received", "teacher"
"""Names of the LoRA adapters on a client's model."""


@dataclass
class Trainer:
    """One client's training in one round; every fit moves the order of the examples on."""

    model: PeftModel
    examples: Sequence[EncodedExample]
    order: EpochSampler
    settings: TrainingSettings
    pad_token_id: int
    step_done: Callable[[], None] = field(default=lambda: None)

    def fit(
        self, losses: ExampleLosses = example_losses, steps: int | None = None, *, again: bool = False
    ) -> None:
        """Train what is trainable, for the steps of the settings by default, none if 0.

        `again` leaves the order of the examples where it was, so that the next fit sees the same batches.
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
    """What a server that trains has for an architecture: a model with its own adapters, public examples."""

    model: PeftModel
    public: Sequence[EncodedExample]
    pad_token_id: int
    settings: TrainingSettings
    ranks: Mapping[str, int]
    architecture: str
    tokenizer: PreTrainedTokenizerBase
    examples: Sequence[Example]

    def distil(
        self,
        public: Sequence[EncodedExample],
        steps: int,
        losses: ExampleLosses,
        order: EpochSampler | None = None,
    ) -> None:
        """Train the shared adapter on public examples."""
        settings = self.settings.model_copy(update={"steps": steps})
        with using(self.model, [SHARED], [SHARED]):
            train_local(
                self.model, public, settings, pad_token_id=self.pad_token_id, sampler=order, losses=losses
            )


@dataclass(frozen=True)
class Exchange:
    """The shared adapter that each client goes on with after a round, and the bytes that it sent and got."""

    received: Mapping[str, Vector]
    sent: Mapping[str, int]
    got: Mapping[str, int]

    @classmethod
    def of_adapters(cls, uploads: Mapping[str, Vector], received: Mapping[str, Vector]) -> "Exchange":
        """An exchange in which adapters travel both ways."""
        sent, got = ({name: v.nbytes for name, v in side.items()} for side in (uploads, received))
        return cls(received, sent, got)


class Strategy:
    """A method without sharing; the base of all others.

    Attributes:
        adapters: LoRA adapters on every client's model.
        shares: whether anything leaves a client.
        ranks_differ: whether adapters of different ranks can be combined.
        passes: optimizer steps of a client for every step of the settings.
        alike: whether all adapters start with the same A; not where both are trained on one loss, which would
            keep them equal.
        scored_with: adapters that a model is scored with, their outputs times `scored_scale`.
    """

    adapters: ClassVar[tuple[str, ...]] = (SHARED,)
    shares: ClassVar[bool] = False
    ranks_differ: ClassVar[bool] = False
    passes: ClassVar[int] = 1
    alike: ClassVar[bool] = True
    scored_with: ClassVar[tuple[str, ...]] = (SHARED,)
    scored_scale: ClassVar[float] = 1.0

    def __init__(self) -> None:
        self.server_state: dict[str, Vector] = {}
        """What the server keeps from round to round."""

    def train(self, trainer: Trainer) -> None:
        """Train one client for one round."""
        with using(trainer.model, [SHARED], [SHARED]):
            trainer.fit()

    @contextmanager
    def scored(self, model: PeftModel) -> Iterator[nn.Module]:
        """The model as it is scored."""
        with using(model, self.scored_with, scale=self.scored_scale):
            yield model

    def upload(self, model: PeftModel) -> Vector:
        """What leaves the client, if anything does."""
        return read_adapter(model, SHARED)

    def combine(self, uploads: Mapping[str, Vector], server: ServerSide) -> Mapping[str, Vector]:
        """What every client of one architecture receives: the uniform mean over all, itself included."""
        stacked = np.stack([uploads[name] for name in sorted(uploads)])
        mean: np.ndarray = stacked.mean(axis=0, dtype=np.float64)
        return dict.fromkeys(uploads, mean.astype(np.float32).reshape(-1))

    def exchange(self, uploads: Mapping[str, Vector], servers: Mapping[str, ServerSide]) -> Exchange:
        """What all clients of all architectures receive; here each architecture by itself."""
        received: dict[str, Vector] = {}
        for server in servers.values():
            received |= self.combine({name: uploads[name] for name in server.ranks}, server)
        return Exchange.of_adapters(uploads, received)

    def receive(self, model: PeftModel, vector: Vector) -> None:
        """Take what came back."""
        write_adapter(model, SHARED, vector)


def check_uploads(uploads: Mapping[str, Vector]) -> None:
    """Refuse what cannot be combined; `ModelError` if there is no upload, or one is not finite."""
    bad = sorted(name for name, vector in uploads.items() if not np.isfinite(vector).all())
    if bad or not uploads:
        raise ModelError(f"uploads that are not finite: {', '.join(bad) or 'none, but there is no upload'}")
