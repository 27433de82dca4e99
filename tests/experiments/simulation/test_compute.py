"""Operations are counted, and steps that cost the same are taken."""

import io
import json
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from torch import nn

from fedmosaic.client.model.training import TrainingSettings
from fedmosaic.experiments.comparison.record import read_run
from fedmosaic.experiments.comparison.report import show
from fedmosaic.experiments.methods.ditto import Ditto
from fedmosaic.experiments.methods.feddat import FedDat
from fedmosaic.experiments.methods.local import LocalOnly
from fedmosaic.experiments.methods.loop import _by_itself, reference_flops
from fedmosaic.experiments.methods.lora import load_with_lora
from fedmosaic.experiments.methods.strategy import Strategy
from fedmosaic.experiments.runs import command as runner
from fedmosaic.experiments.scenario.participants import read_evaluations
from fedmosaic.experiments.simulation.compute import counted, equal_steps, step_flops
from fedmosaic.experiments.simulation.models import AdapterState, SharedModel
from fedmosaic.protos.errors import ModelError


def test_a_product_counts_two_operations_per_multiplication() -> None:
    layer = nn.Linear(8, 4, bias=False)

    def train(few: TrainingSettings) -> None:
        for _ in range(few.steps):
            layer(torch.ones(3, 8)).sum().backward()

    # Forward 2·3·8·4; backward only the gradient of the weight, which costs as much.
    assert counted(train, TrainingSettings(steps=100)) == 2 * (2 * 3 * 8 * 4)
    with pytest.raises(ModelError, match="nothing that could be counted"):
        counted(lambda _: None, TrainingSettings())


def test_ditto_costs_two_passes_and_measuring_leaves_no_trace(tiny_scenario: Any) -> None:
    scenario = tiny_scenario()
    client = scenario.clients[1]
    one = scenario.model_copy(update={"clients": (client,)})

    def cost(strategy: Strategy) -> float:
        model, tokenizer = load_with_lora(client.model, scenario.adapter, strategy.adapters, 2, 0)
        host = SharedModel(model, tokenizer)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        measure = partial(step_flops, one, {0: host}, lambda _: 0, partial(_by_itself, strategy))
        first = measure()[client.id]
        assert measure()[client.id] == first
        with host.with_adapter(AdapterState()):
            assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        return first

    local = cost(LocalOnly())
    assert cost(Ditto()) == pytest.approx(2 * local, rel=1e-6)
    assert cost(FedDat()) > 2 * local


def test_steps_are_scaled_by_the_sums(tiny_scenario: Any) -> None:
    scenario = tiny_scenario(training={"steps": 30}, equal_compute=True)
    scaled = equal_steps(scenario, {"a": 20.0, "b": 40.0}, {"a": 10.0, "b": 10.0})
    assert scaled.training.steps == 10
    assert equal_steps(scenario, {"a": 20.0}, {}).training.steps == 30
    assert equal_steps(scenario, {"a": 1e9}, {"a": 1.0}).training.steps == 1


@pytest.mark.parametrize("method", ["ditto", "fedmosaic"])
def test_a_run_of_equal_compute_costs_what_local_training_costs(
    method: str, tmp_path: Path, tiny_pair: Any
) -> None:
    training = {"steps": 6, "per_device_train_batch_size": 4, "max_length": 16}
    scenario = tiny_pair(
        method=method, equal_compute=True, training=training, score="own", schedule={"rounds": 1}
    )
    directory = runner.run_here(scenario, tmp_path, tmp_path / "runs", Console(quiet=True))
    place = directory / "federation" / "clients"
    results = [json.loads((place / c.id / "state" / "result.json").read_text()) for c in scenario.clients]
    (steps,) = {result["training_steps"] for result in results}
    assert steps == 3 if method == "ditto" else 1 <= steps <= 12
    spent = sum(result["training_flops"] for result in results)
    # As near as whole steps allow.
    assert abs(spent - 6 * sum(reference_flops(scenario).values())) <= spent / steps / 2 * 1.001
    assert max(read_evaluations(place / scenario.clients[0].id / "state")) == 1
    console = Console(file=io.StringIO(), width=200)
    show(read_run(directory), console)
    assert "What training cost" in cast(io.StringIO, console.file).getvalue()
