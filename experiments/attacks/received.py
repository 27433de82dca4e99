"""What a received aggregate does and tells: poison in it, and membership of the others' examples by loss.

The clients' adapters after the last round are combined with the last weight rows, as for a next round.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from transformers import PreTrainedTokenizerBase

from fedmosaic.client.colora import read_shared, set_active_branches, write_shared
from fedmosaic.client.model.adapted import load_adapted
from fedmosaic.client.model.examples import Example, collate, encode_examples, padding_token
from fedmosaic.client.model.loss import example_losses, training_mode
from fedmosaic.client.model.scoring import Examiner
from fedmosaic.experiments.attacks.statistics.results import AttackResult, Figure
from fedmosaic.experiments.attacks.statistics.roc import Ceiling, membership_figures
from fedmosaic.experiments.attacks.target import Target, Victim
from fedmosaic.protos.errors import ConfigurationError

_ADAPTER_NAME: Final = re.compile(r"(?<=[._])((?:colora|lora)_\w+)\.default(?=\.|$)")
_CORE: Final = re.compile(r"layers\.(\d+)\.(.+)\.colora_core_local\.(weight|bias)$")
_BATCH: Final = 16


def shared_vector(path: Path) -> np.ndarray:
    """The local P and Q of a saved adapter, in the order of the shared vector."""
    found = {}
    for name, tensor in load_file(path).items():
        match = _CORE.search(_portable(name))
        if match is not None:
            layer, module, kind = match.groups()
            found[(int(layer), module, kind == "bias")] = tensor.ravel()
    if not found:
        raise ConfigurationError(f"{path} holds no Co-LoRA cores")
    return np.concatenate([found[key] for key in sorted(found)])


def received_results(target: Target, recipient: Victim, examples: int) -> list[AttackResult]:
    """Both attacks on one recipient of a finished run; `ConfigurationError` without adapters or weights."""
    saved = {victim.client_id: victim.saved_adapter() for victim in target.victims}
    adapters = {name: shared_vector(path) for name, path in saved.items() if path is not None}
    rows = target.server_run.rows
    if not rows or len(adapters) < len(saved):
        raise ConfigurationError("attacks on received aggregates need a finished run with its adapters")
    shares, own = rows[-1].get(recipient.client_id, {}), saved[recipient.client_id]
    if own is None or not shares:
        raise ConfigurationError(f"{recipient.client_id} received no aggregate")
    model, tokenizer = load_adapted(recipient.model, target.adapter)
    set_peft_model_state_dict(model, {_portable(name): value for name, value in load_tensors(own).items()})
    if not np.allclose(read_shared(model), adapters[recipient.client_id]):
        raise ConfigurationError("the saved adapter has another order than its model's shared vector")
    aggregate = np.sum([share * adapters[name].astype(np.float64) for name, share in shares.items()], axis=0)
    attacked = _Loaded(model, tokenizer, target.scenario.training.max_length)
    return [
        *_poison(target, attacked, recipient.test[:examples], aggregate),
        *_loss(target, attacked, shares, recipient, aggregate, examples),
    ]


@dataclass(frozen=True, eq=False)
class _Loaded:
    """The recipient's model, which aggregates are loaded into; examples are cut to a number of tokens."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    length: int

    def accuracy(self, name: str, tests: Sequence[Example], vector: np.ndarray) -> Figure:
        write_shared(self.model, vector.astype(np.float32), "global")
        value = Examiner(self.model, self.tokenizer, _BATCH, self.length).score(tests).value
        return Figure.share(name, value * len(tests), len(tests))

    def losses(self, examples: Sequence[Example]) -> np.ndarray:
        encoded = encode_examples(self.tokenizer, examples, self.length)
        parts = []
        with torch.inference_mode(), training_mode(self.model, False):
            for start in range(0, len(encoded), _BATCH):
                batch = collate(encoded[start : start + _BATCH], padding_token(self.tokenizer))
                parts.append(example_losses(self.model, batch).double().numpy())
        return np.concatenate(parts)


def _portable(name: str) -> str:
    """A tensor's name as PEFT saves it; a client of a run in one process saves the adapter's name with it."""
    return _ADAPTER_NAME.sub(r"\1", name)


def _poison(
    target: Target, attacked: _Loaded, tests: Sequence[Example], aggregate: np.ndarray
) -> Iterator[AttackResult]:
    """Accuracy right after loading an aggregate, a share of which drives every number against its value."""
    policy, bound = target.scenario.policy, target.scenario.encryption.clip
    usable = [example for example in tests if example.choices]
    if not usable:
        return
    figures = [attacked.accuracy("honest aggregate", usable, aggregate)]
    against = -np.sign(aggregate)
    for clip in (0.05, 0.5, bound):
        for share in (0.1, policy.weight_cap):
            poisoned = (1.0 - share) * aggregate + share * clip * against
            name = f"share {share:g} poison, uploads clipped to ±{clip:g}"
            figures.append(attacked.accuracy(name, usable, poisoned))
    yield AttackResult(
        attack="Poisoned aggregate: the victim's accuracy",
        adversary="a client that got itself a share of the victim's aggregate",
        sees="nothing; it sends",
        statistic="accuracy on the victim's test examples",
        release=f"cap {policy.weight_cap:g}, clip ±{bound:g} as configured; tighter clips for comparison",
        setting="product",
        figures=tuple(figures),
        note="neither DP nor encryption is about poisoning; the cap and the clip limit it. Accuracy is taken "
        "right after loading: training and the gate repair part of it",
    )


def _loss(
    target: Target,
    attacked: _Loaded,
    shares: Mapping[str, float],
    recipient: Victim,
    aggregate: np.ndarray,
    examples: int,
) -> Iterator[AttackResult]:
    """How much the aggregate lowers the loss of the largest contributor's training and test examples."""
    others = (victim for victim in target.victims if victim is not recipient)
    other = max(others, key=lambda victim: shares.get(victim.client_id, 0.0))
    members, outside = list(other.train[:examples]), other.unseen[:examples]
    if not members or not outside:
        return
    write_shared(attacked.model, aggregate.astype(np.float32), "global")
    set_active_branches(attacked.model, set(), layers="family")
    set_active_branches(attacked.model, {"global"}, layers="shared")
    pool = [*members, *outside]
    with_aggregate = attacked.losses(pool)
    with attacked.model.disable_adapter():
        without = attacked.losses(pool)
    is_member = np.arange(len(pool)) < len(members)
    yield AttackResult(
        attack="Membership by loss in a received aggregate",
        adversary="recipient",
        sees="its own aggregate",
        statistic="fall of the loss from the public model to the aggregate",
        release=f"aggregate in which {other.client_id} has a share of {shares[other.client_id]:.2f}; adapter "
        f"protection {target.scenario.adapter.protection}",
        setting="product",
        figures=membership_figures(without - with_aggregate, is_member, Ceiling())[:1],
        note="one aggregate after the whole run; no bound, unless the adapter is trained with DP",
    )
