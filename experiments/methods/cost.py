"""What a baseline's training step costs, and that of the reference method, to which others are brought."""

from collections.abc import Sequence

from fedmosaic.client.model.examples import EncodedExample, padding_token
from fedmosaic.client.model.sampling import EpochSampler
from fedmosaic.client.model.training import TrainingSettings
from fedmosaic.experiments.methods.local import LocalOnly
from fedmosaic.experiments.methods.lora import load_with_lora
from fedmosaic.experiments.methods.strategy import Strategy, Trainer
from fedmosaic.experiments.scenario.terms import Scenario, ScenarioClient
from fedmosaic.experiments.simulation.compute import client_examples, counted
from fedmosaic.experiments.simulation.hosts import ModelHost, Tenant
from fedmosaic.experiments.simulation.sight import give_client_sight


def baseline_flops(
    strategy: Strategy, host: ModelHost, examples: Sequence[EncodedExample], settings: TrainingSettings
) -> float:
    """Operations of a baseline's step; the host's clients notice nothing.

    Args:
        strategy: the method.
        host: of the model.
        examples: of one client.
        settings: of its training.
    """

    def train(few: TrainingSettings) -> None:
        order = EpochSampler(len(examples), settings.seed)
        strategy.train(Trainer(model, examples, order, few, padding_token(host.tokenizer)))

    with host.lent_to(Tenant()) as model:
        return counted(train, settings)


def reference_flops(scenario: Scenario) -> dict[str, float]:
    """Operations of a step of plain LoRA without any exchange, by client; loads each model once for it.

    Args:
        scenario: empty results unless it asks for equal compute.
    """
    if not scenario.equal_compute:
        return {}
    known: dict[str, float] = {}
    for client in scenario.clients:
        if _key(client) not in known:
            known[_key(client)] = _reference(scenario, client)
    return {client.id: known[_key(client)] for client in scenario.clients}


def _key(client: ScenarioClient) -> str:
    return f"{client.model.model_dump_json()} {client.projector} {client.rank}"


def _reference(scenario: Scenario, client: ScenarioClient) -> float:
    rank = client.rank or scenario.adapter.rank
    model, tokenizer = load_with_lora(client.model, scenario.adapter, LocalOnly.adapters, rank, scenario.seed)
    host = ModelHost(model, give_client_sight(scenario, client, model, tokenizer))
    return baseline_flops(LocalOnly(), host, client_examples(scenario, client, host), scenario.training)
