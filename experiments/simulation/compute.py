"""What training costs, measured: floating point operations of a few steps, and steps that cost the same.

Counted are the products of the model's forward and backward passes (a multiplication and an addition are
two), of a client's training alone: not scoring, the task profile, or what a server distils.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from torch.utils.flop_counter import FlopCounterMode

from fedmosaic.client.colora import set_active_branches, set_trainable
from fedmosaic.client.model.examples import EncodedExample, encode_examples, padding_token
from fedmosaic.client.model.sampling import EpochSampler
from fedmosaic.client.model.training import TrainingSettings, train_local
from fedmosaic.experiments.scenario.participants import training_examples
from fedmosaic.experiments.scenario.terms import Scenario, ScenarioClient
from fedmosaic.experiments.simulation.hosts import ModelHost, Tenant
from fedmosaic.protos.errors import ModelError

MEASURED_STEPS: Final = 2
"""Optimizer steps that are counted; two, because some methods train their adapters in turn."""


def counted(train: Callable[[TrainingSettings], None], settings: TrainingSettings) -> float:
    """Operations per optimizer step of the settings.

    Args:
        train: trains with the settings given.
        settings: a client's; only few steps of them are taken.

    Raises:
        ModelError: nothing was counted.
    """
    with FlopCounterMode(display=False) as counter:
        train(settings.model_copy(update={"steps": MEASURED_STEPS, "warmup": 0}))
    flops = float(counter.get_total_flops()) / MEASURED_STEPS
    if not flops > 0:
        raise ModelError("training did nothing that could be counted")
    return flops


def colora_flops(
    host: ModelHost,
    examples: Sequence[EncodedExample],
    settings: TrainingSettings,
    *,
    own_family_layers: bool,
) -> float:
    """Operations of a FedMosaic step without DP; the host's clients notice nothing.

    Args:
        host: of the model with Co-LoRA.
        examples: of one client.
        settings: of its training.
        own_family_layers: the LoRA of the other layers is the client's own.
    """

    def train(few: TrainingSettings) -> None:
        set_trainable(model, {"local", "gate"})
        if own_family_layers:
            set_active_branches(model, {"local"}, layers="family")
        train_local(
            model,
            examples,
            few,
            pad_token_id=padding_token(host.tokenizer),
            sampler=EpochSampler(len(examples), settings.seed),
        )

    with host.lent_to(Tenant()) as model:
        return counted(train, settings)


def client_examples(scenario: Scenario, client: ScenarioClient, host: ModelHost) -> list[EncodedExample]:
    """As many of a client's examples as the measurement looks at, in their order."""
    training = scenario.training
    wanted = MEASURED_STEPS * training.per_device_train_batch_size * training.gradient_accumulation_steps
    examples = [example for task in training_examples(client) for example in task][:wanted]
    return encode_examples(host.tokenizer, examples, training.max_length)


def equal_steps(scenario: Scenario, flops: Mapping[str, float], reference: Mapping[str, float]) -> Scenario:
    """The scenario with as many steps as cost what its steps of the reference method cost.

    One number for all clients: the sum over the clients is what is brought to the reference's.

    Args:
        scenario: what is to be run.
        flops: of a step of its method, by client.
        reference: of a step of the reference method, by client; empty to leave the steps as they are.
    """
    if not reference:
        return scenario
    steps = max(1, round(scenario.training.steps * sum(reference.values()) / sum(flops.values())))
    return scenario.model_copy(update={"training": scenario.training.model_copy(update={"steps": steps})})


def training_cost(scenario: Scenario, flops: float) -> dict[str, float]:
    """What a client's result says about its training.

    Args:
        scenario: with the steps that are taken.
        flops: of one step.
    """
    steps = scenario.training.steps * scenario.schedule.rounds
    return {"training_steps": steps, "training_flops": flops * steps}
