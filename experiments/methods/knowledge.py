"""What models say about public examples, carried to another model, and learning from it.

Shape suffixes: B batch, T answer tokens (with the end of sequence), V vocabulary, N most likely tokens.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn
from torch.nn import functional

from fedmosaic.client.model.examples import answer_tokens, collate
from fedmosaic.client.model.loss import Batch, on_device_of, training_mode
from fedmosaic.client.model.training import EpochSampler
from fedmosaic.experiments.methods import distillation
from fedmosaic.experiments.methods.lora import Vector, read_adapter, using, write_adapter
from fedmosaic.experiments.methods.strategy import SHARED, TEACHER, Exchange, ServerSide, Strategy
from fedmosaic.experiments.methods.vocabulary import VocabularyMap, answer_spans
from fedmosaic.protos.errors import ModelError

STEPS: Final = 10
"""Optimizer steps of one distillation."""


@dataclass(frozen=True)
class Knowledge:
    """A model's predictions for one public answer: (T, N) most likely tokens with their probabilities.

    Rows of probabilities sum to 1; the loss is the mean cross entropy of the answer, nats per token.
    """

    tokens: torch.Tensor
    probabilities: torch.Tensor
    loss: float

    @property
    def nbytes(self) -> int:
        """Bytes of this on the way: a token and a probability of four bytes each, and the loss."""
        return self.tokens.numel() * 8 + 4


def knowledge_of(server: ServerSide, adapters: Sequence[Vector], temperature: float = 1.0) -> list[Knowledge]:
    """What the mean of several models' logits says about each public example; overwrites the teacher.

    As in the comparison of FedMosaic's authors, 80 examples a round. Told are the 128 most likely tokens of a
    position, if they have 1e-4 of the most likely one's probability at least.
    """
    found: list[Knowledge] = []
    size, public = server.settings.per_device_train_batch_size, server.public[:80]
    with training_mode(server.model, False), torch.no_grad():
        for start in range(0, len(public), size):
            batch = on_device_of(server.model, collate(public[start : start + size], server.pad_token_id))
            logits = mean_logits(server, adapters, batch)
            labels, mask = distillation.answer_labels(batch)
            for row in range(len(logits)):
                own_TV = logits[row, mask[row]].cpu()
                loss = functional.cross_entropy(own_TV, labels[row, mask[row]].cpu())
                top = (own_TV / temperature).softmax(-1).topk(min(128, own_TV.shape[-1]), dim=-1)
                kept = top.values * (top.values >= 1e-4 * top.values[:, :1])
                found.append(Knowledge(top.indices, kept / kept.sum(-1, keepdim=True), float(loss)))
    return found


def mean_logits(server: ServerSide, adapters: Sequence[Vector], batch: Batch) -> torch.Tensor:
    """Mean of several models' `answer_logits`; overwrites the server's teacher adapter."""
    if not adapters:
        raise ModelError("there is no model to ask; give one adapter at least")
    total = torch.zeros(())
    for vector in adapters:
        write_adapter(server.model, TEACHER, vector)
        with using(server.model, [TEACHER]):
            total = total + distillation.answer_logits(server.model, batch) / len(adapters)
    return total


class Translator:
    """Carries predictions from one architecture's vocabulary to another's; keeps the maps that it made."""

    def __init__(self) -> None:
        self._maps: dict[tuple[str, str], VocabularyMap] = {}

    def __call__(
        self, knowledge: Sequence[Knowledge], source: ServerSide, target: ServerSide
    ) -> list[Knowledge]:
        """The same predictions about the same examples, in the target's tokens.

        Where both tokenizers cut an answer at the same characters, the first of the target's tokens between
        two cuts gets the mean of the source's predictions there; all others get the token that stands there.
        """
        same = source.architecture == target.architecture
        if same or source.tokenizer.get_vocab() == target.tokenizer.get_vocab():
            return list(knowledge)
        key = (source.architecture, target.architecture)
        if key not in self._maps:
            self._maps[key] = VocabularyMap(source.tokenizer, target.tokenizer)
        return [
            _translated(item, example.answer, source, target, self._maps[key])
            for item, example in zip(knowledge, source.examples, strict=False)
        ]


def _translated(
    item: Knowledge, answer: str, source: ServerSide, target: ServerSide, mapped: VocabularyMap
) -> Knowledge:
    end = target.tokenizer.eos_token_id
    if not isinstance(end, int):
        raise ModelError("the tokenizer has no end-of-sequence token")
    truth = [*answer_tokens(target.tokenizer, answer), end]
    spans = answer_spans(source.tokenizer, target.tokenizer, answer)
    spans.append(((len(item.tokens) - 1,), (len(truth) - 1,)))
    rows: list[dict[int, float]] = [{token: 1.0} for token in truth]
    for theirs, ours in spans:
        merged: dict[int, float] = {}
        for place in theirs:
            present = item.probabilities[place] > 0
            tokens = mapped(item.tokens[place, present]).tolist()
            for token, share in zip(tokens, item.probabilities[place, present].tolist(), strict=True):
                merged[token] = merged.get(token, 0.0) + share / len(theirs)
        rows[ours[0]] = merged
    width = max(map(len, rows))
    tokens_TN = torch.zeros(len(rows), width, dtype=torch.int64)
    shares_TN = torch.zeros(len(rows), width)
    for place, row in enumerate(rows):
        tokens_TN[place, : len(row)] = torch.tensor(list(row))
        shares_TN[place, : len(row)] = torch.tensor(list(row.values()))
    return Knowledge(tokens_TN, shares_TN / shares_TN.sum(-1, keepdim=True), item.loss)


def cross_entropies(
    logits: torch.Tensor, batch: Batch, targets: Sequence[Knowledge | None], temperature: float = 1.0
) -> torch.Tensor:
    """(B,) T² times the cross entropy of a student with its targets, a mean over the answer's tokens.

    In its gradient this is the Kullback-Leibler divergence from the targets, which are per row, at the
    temperature T and in the student's vocabulary; None gives a loss of 0. The logits (B, K, V) are those of
    `answer_logits`.
    """
    _, mask = distillation.answer_labels(batch)
    losses = []
    for row, target in enumerate(targets):
        if target is None:
            losses.append(logits[row, 0].sum() * 0.0)
            continue
        log_TV = (logits[row, mask[row]] / temperature).log_softmax(-1)
        picked_TN = log_TV.gather(1, target.tokens.to(log_TV.device))
        losses.append(-(target.probabilities.to(log_TV.device) * picked_TN).sum(-1).mean() * temperature**2)
    return torch.stack(losses)


class _Remembering(EpochSampler):
    """Remembers which examples it gave last, so that a loss can look up what belongs to them."""

    latest: list[int]

    def take(self, count: int) -> list[int]:
        """See `EpochSampler.take`."""
        self.latest = super().take(count)
        return self.latest


@dataclass(frozen=True)
class Lesson:
    """One distillation: targets by public example (None: nothing to learn), and weights of the losses.

    Beside the targets: the public answers themselves (`label_weight`), and what the student said at the start
    over the whole vocabulary (`anchor_weight`).
    """

    targets: Sequence[Knowledge | None]
    temperature: float = 1.0
    weight: float = 1.0
    label_weight: float = 0.0
    anchor_weight: float = 0.0
    anchor_temperature: float = 1.0


def learn(server: ServerSide, start: Vector, lesson: Lesson, steps: int = STEPS) -> Vector:
    """Train a student's adapter on public examples; gives `start` back where there is nothing to learn.

    Overwrites the server's shared and teacher adapters.
    """
    if not lesson.label_weight and all(target is None for target in lesson.targets):
        return start
    public = server.public[: len(lesson.targets)]
    order = _Remembering(len(public), server.settings.seed)
    write_adapter(server.model, SHARED, start)
    write_adapter(server.model, TEACHER, start)

    def losses(model: nn.Module, batch: Batch) -> torch.Tensor:
        begun: torch.Tensor | None = None
        if lesson.anchor_weight:
            # Before the student's: switching adapters must not come between the loss and its graph.
            with torch.no_grad(), using(server.model, [TEACHER]):
                begun = distillation.answer_logits(server.model, batch)
        logits = distillation.answer_logits(model, batch)
        targets = [lesson.targets[i] for i in order.latest]
        total = lesson.weight * cross_entropies(logits, batch, targets, lesson.temperature)
        if begun is not None:
            kept = distillation.soft_divergence(logits, begun, batch, lesson.anchor_temperature)
            total = total + lesson.anchor_weight * kept
        if lesson.label_weight:
            total = total + lesson.label_weight * distillation.label_losses(logits, batch)
        return total

    server.distil(public, steps, losses, order)
    return read_adapter(server.model, SHARED)


class KnowledgeStrategy(Strategy):
    """Clients tell what they say about public examples, and learn from what comes back. No weights leave."""

    adapters = (SHARED, TEACHER)
    shares = True

    def __init__(self) -> None:
        super().__init__()
        self._translate = Translator()

    @abstractmethod
    def answer(self, server: ServerSide, opinions: Sequence[Sequence[Knowledge]]) -> list[Knowledge]:
        """What the server tells an architecture's clients, from all clients' opinions in its vocabulary."""

    @abstractmethod
    def lesson(self, answer: Sequence[Knowledge], own: Sequence[Knowledge]) -> Lesson:
        """What a client learns from the server's answer."""

    def exchange(self, uploads: Mapping[str, Vector], servers: Mapping[str, ServerSide]) -> Exchange:
        """All say what they know; then every architecture's clients get an answer and learn from it."""
        said = {
            name: (server, knowledge_of(server, [uploads[name]]))
            for server in servers.values()
            for name in sorted(server.ranks)
        }
        received, got = {}, {}
        for server in servers.values():
            opinions = [self._translate(items, teller, server) for teller, items in said.values()]
            answer = self.answer(server, opinions)
            for name in sorted(server.ranks):
                received[name] = learn(server, uploads[name], self.lesson(answer, said[name][1]))
                got[name] = sum(item.nbytes for item in answer)
        sent = {name: sum(item.nbytes for item in items) for name, (_, items) in said.items()}
        return Exchange(received, sent, got)
