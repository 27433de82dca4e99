"""What a received aggregate does and tells: poison in it, and membership of the others' examples by loss.

Works on a finished run: the clients' adapters after the last round, combined with the last weight rows as the
server would combine them for a next round.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
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
from fedmosaic.client.model.evaluation import choice_accuracy
from fedmosaic.client.model.examples import Example, collate, encode_examples, padding_token
from fedmosaic.client.model.loss import example_losses, training_mode
from fedmosaic.experiments.attacks.federation import weights_of_run
from fedmosaic.experiments.attacks.statistics.results import CONFIDENCE, AttackResult, Figure
from fedmosaic.experiments.attacks.statistics.roc import Ceiling, clopper_pearson, membership_figures
from fedmosaic.experiments.attacks.target import Target, Victim
from fedmosaic.protos.errors import ConfigurationError

POISON: Final = "Poisoned aggregate: the victim's accuracy"
LOSS: Final = "Membership by loss in a received aggregate"
_ADAPTER: Final = "adapter_model.safetensors"
_ADAPTER_NAME: Final = re.compile(r"(?<=[._])((?:colora|lora)_\w+)\.default(?=\.|$)")
_CORE: Final = re.compile(r"layers\.(\d+)\.(.+)\.colora_core_local\.(weight|bias)$")
_BATCH: Final = 16
_CLIPS: Final = (0.05, 0.5)


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
    """Both attacks on one recipient of a finished run.

    Args:
        target: a finished run.
        recipient: who receives.
        examples: most test examples to score, and most candidates of either kind.

    Raises:
        ConfigurationError: the run left no adapters or no weights.
    """
    vectors = {victim.client_id: saved_adapter(victim) for victim in target.victims}
    names = sorted(vectors)
    rows = weights_of_run({"results": [*target.server_run.get("results", []), {}]}, names)
    if not rows or any(path is None for path in vectors.values()):
        raise ConfigurationError("attacks on received aggregates need a finished run with its adapters")
    row = rows[-1][names.index(recipient.client_id)]
    adapters = {name: shared_vector(path) for name, path in vectors.items() if path is not None}
    own = vectors[recipient.client_id]
    if own is None or not row.any():
        raise ConfigurationError(f"{recipient.client_id} received no aggregate")
    shares = dict(zip(names, row.tolist(), strict=True))
    model, tokenizer = _model(target, recipient, own)
    if not np.allclose(read_shared(model), adapters[recipient.client_id]):
        raise ConfigurationError("the saved adapter has another order than its model's shared vector")
    aggregate = sum(share * adapters[name].astype(np.float64) for name, share in shares.items())
    length = target.scenario.training.max_length
    return [
        *_poison(target, model, tokenizer, recipient.test[:examples], np.asarray(aggregate), length),
        *_loss(target, model, tokenizer, shares, recipient, np.asarray(aggregate), examples, length),
    ]


def saved_adapter(victim: Victim) -> Path | None:
    """The adapter that a client of a finished run saved after its last round; None if there is none."""
    found = sorted((victim.state / "adapter").glob(f"round-*/{_ADAPTER}")) if victim.state else []
    return found[-1] if found else None


def _model(target: Target, victim: Victim, saved: Path) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    model, tokenizer = load_adapted(victim.model, target.adapter)
    set_peft_model_state_dict(model, {_portable(name): value for name, value in load_tensors(saved).items()})
    return model, tokenizer


def _portable(name: str) -> str:
    """A tensor's name as PEFT saves it; a client of a run in one process saves the adapter's name with it."""
    return _ADAPTER_NAME.sub(r"\1", name)


def _poison(
    target: Target,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tests: Sequence[Example],
    aggregate: np.ndarray,
    length: int,
) -> Iterator[AttackResult]:
    """Accuracy right after loading an aggregate a share of which is poison, before any further training.

    The poison drives every number against its honest value, as far as the clipping of uploads allows.
    """
    policy, bound = target.scenario.policy, target.scenario.encryption.clip
    usable = [example for example in tests if example.choices]
    if not usable:
        return
    figures = [_accuracy("honest aggregate", model, tokenizer, usable, aggregate, length)]
    against = -np.sign(aggregate)
    for clip in (*_CLIPS, bound):
        for share in (0.1, policy.weight_cap):
            poisoned = (1.0 - share) * aggregate + share * clip * against
            name = f"share {share:g} poison, uploads clipped to ±{clip:g}"
            figures.append(_accuracy(name, model, tokenizer, usable, poisoned, length))
    yield AttackResult(
        attack=POISON,
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
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    shares: Mapping[str, float],
    recipient: Victim,
    aggregate: np.ndarray,
    examples: int,
    length: int,
) -> Iterator[AttackResult]:
    """How much the aggregate lowers the loss of the largest contributor's training and test examples."""
    others = {victim.client_id: victim for victim in target.victims if victim is not recipient}
    name = max(others, key=lambda client: shares[client])
    known = {example.prompt for example in others[name].train}
    members = list(others[name].train[:examples])
    outside = [example for example in others[name].test if example.prompt not in known][:examples]
    if not members or not outside:
        return
    write_shared(model, aggregate.astype(np.float32), "global")
    set_active_branches(model, set(), layers="family")
    set_active_branches(model, {"global"}, layers="shared")
    pool = [*members, *outside]
    with_aggregate = _losses(model, tokenizer, pool, length)
    with model.disable_adapter():
        without = _losses(model, tokenizer, pool, length)
    is_member = np.arange(len(pool)) < len(members)
    yield AttackResult(
        attack=LOSS,
        adversary="recipient",
        sees="its own aggregate",
        statistic="fall of the loss from the public model to the aggregate",
        release=f"aggregate in which {name} has a share of {shares[name]:.2f}; adapter protection "
        f"{target.scenario.adapter.protection}",
        setting="product",
        figures=membership_figures(without - with_aggregate, is_member, Ceiling())[:1],
        note="one aggregate after the whole run; no bound, unless the adapter is trained with DP",
    )


def _accuracy(
    name: str,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tests: Sequence[Example],
    vector: np.ndarray,
    length: int,
) -> Figure:
    write_shared(model, vector.astype(np.float32), "global")
    value = choice_accuracy(model, tokenizer, tests, _BATCH, max_length=length)
    low, high = clopper_pearson(value * len(tests), len(tests), CONFIDENCE)
    return Figure(name=name, value=value, low=low, high=high)


def _losses(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], length: int
) -> np.ndarray:
    encoded = encode_examples(tokenizer, examples, length)
    parts = []
    with torch.inference_mode(), training_mode(model, False):
        for start in range(0, len(encoded), _BATCH):
            batch = collate(encoded[start : start + _BATCH], padding_token(tokenizer))
            parts.append(example_losses(model, batch).double().numpy())
    return np.concatenate(parts)
