"""What training costs, measured: floating point operations of a few steps, and steps that cost the same.

Counted are the products of a client's own forward and backward passes; a multiplication and an addition are
two.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Final, TypeVar

from torch.utils.flop_counter import FlopCounterMode

from fedmosaic.client.model.examples import EncodedExample, encode_examples
from fedmosaic.client.model.training import EpochSampler, TrainingSettings
from fedmosaic.experiments.scenario.participants import training_examples
from fedmosaic.experiments.scenario.terms import Scenario, ScenarioClient
from fedmosaic.experiments.simulation.models import AdapterState, SharedModel
from fedmosaic.protos.errors import ModelError

Train = Callable[
    [ScenarioClient, SharedModel, Sequence[EncodedExample], EpochSampler, TrainingSettings], None
]
"""A client's training by itself, on the adapter that the model holds."""
Key = TypeVar("Key", bound=Hashable)

MEASURED_STEPS: Final = 2
"""Optimizer steps that are counted; two, because some methods train their adapters in turn."""


def counted(train: Callable[[TrainingSettings], None], settings: TrainingSettings) -> float:
    """Operations per optimizer step, of which only few are taken; `ModelError` if nothing was counted."""
    with FlopCounterMode(display=False) as counter:
        train(settings.model_copy(update={"steps": MEASURED_STEPS, "warmup": 0}))
    flops = float(counter.get_total_flops()) / MEASURED_STEPS
    if not flops > 0:
        raise ModelError("training did nothing that could be counted")
    return flops


def step_flops(
    scenario: Scenario, models: Mapping[Key, SharedModel], key: Callable[[ScenarioClient], Key], train: Train
) -> dict[str, float]:
    """Operations of a training step, by client; measured once per model, whose clients notice nothing."""
    training, known = scenario.training, dict[Key, float]()
    wanted = MEASURED_STEPS * training.per_device_train_batch_size * training.gradient_accumulation_steps
    for client in scenario.clients:
        if key(client) in known:
            continue
        shared = models[key(client)]
        examples = encode_examples(shared.tokenizer, training_examples(client)[:wanted], training.max_length)
        order = EpochSampler(len(examples), training.seed)
        with shared.with_adapter(AdapterState()):
            known[key(client)] = counted(partial(train, client, shared, examples, order), training)
    return {client.id: known[key(client)] for client in scenario.clients}


def equal_steps(scenario: Scenario, flops: Mapping[str, float], reference: Mapping[str, float]) -> Scenario:
    """The scenario with as many steps as cost, over all clients, what its steps of the reference method cost.

    Operations of a step are by client; no reference leaves the steps as they are.
    """
    if not reference:
        return scenario
    steps = max(1, round(scenario.training.steps * sum(reference.values()) / sum(flops.values())))
    return scenario.model_copy(update={"training": scenario.training.model_copy(update={"steps": steps})})


def training_cost(scenario: Scenario, flops: float) -> dict[str, float]:
    """What a client's result says about its training, whose steps take so many operations each."""
    steps = scenario.training.steps * scenario.schedule.rounds
    return {"training_steps": steps, "training_flops": flops * steps}
