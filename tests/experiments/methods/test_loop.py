"""Every method runs; each shares, keeps and averages what it should, against closed forms."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from fedmosaic.client.model.examples import Example, collate, encode_examples, padding_token
from fedmosaic.client.model.scoring import Examiner
from fedmosaic.client.model.training import EpochSampler, TrainingSettings
from fedmosaic.experiments import methods
from fedmosaic.experiments.comparison.record import read_run
from fedmosaic.experiments.methods import lora
from fedmosaic.experiments.methods.distillation import answer_logits
from fedmosaic.experiments.methods.ditto import Ditto
from fedmosaic.experiments.methods.fedavg import FedAvg
from fedmosaic.experiments.methods.feddat import FedDat, distilled
from fedmosaic.experiments.methods.feddpa import FedDpa
from fedmosaic.experiments.methods.fedsim import FedSim
from fedmosaic.experiments.methods.flexlora import FlexLora
from fedmosaic.experiments.methods.hetlora import HetLora
from fedmosaic.experiments.methods.matrices import unpack
from fedmosaic.experiments.methods.strategy import (
    PERSONAL,
    RECEIVED,
    SHARED,
    ServerSide,
    Trainer,
    check_uploads,
)
from fedmosaic.experiments.methods.variants import UNIFORM_TEMPERATURE, VARIANTS, with_variant
from fedmosaic.experiments.runs import command as runner
from fedmosaic.experiments.scenario.participants import read_evaluations
from fedmosaic.protos.errors import ConfigurationError, ModelError

TRAINING = TrainingSettings(steps=2, per_device_train_batch_size=4, learning_rate=0.05, max_length=16)


def _run(scenario: Any, place: Path) -> Path:
    return runner.run_here(scenario, place, place, Console(file=io.StringIO()))


ELSEWHERE = {"fedmosaic", "fedmosaic-blend", "fedmosaic-unaligned"}
"""Run by the tests of the simulation."""


@pytest.mark.parametrize("method", [*sorted({*VARIANTS} - ELSEWHERE), *methods.BASELINES])
def test_every_method_runs_for_a_round(
    method: str, tmp_path: Path, tiny_scenario: Any, tiny_pair: Any
) -> None:
    make = tiny_scenario if method == "fedmosaic-uniform" else tiny_pair
    scenario = make(method=method, schedule={"rounds": 1}, others_examples=4)
    if method in {*methods.BASELINES} - {"takfl", "fedmd", "fedmkt"} or "family" in method:
        # Of two architectures where those teach each other, of one where they average.
        scenario = scenario.model_copy(update={"clients": tiny_scenario().clients[1::2]})
    directory = _run(scenario, tmp_path)
    record = read_run(directory)
    if method == "fedmosaic-uniform":
        rows = record.server["results"][-1]["weights"]["shared"].values()
        assert all(share == pytest.approx(1 / 3, abs=1e-4) for row in rows for share in row.values())
    for client, result in record.clients.items():
        assert 0.0 <= result["after"]["self"] <= 1.0
        assert (result["traffic"]["adapter"]["sent"] > 0) is (method != "local")
        evaluated = read_evaluations(directory / "federation" / "clients" / client / "state")
        assert set(evaluated) == {0, 1}


def test_an_unknown_method_is_refused_by_name(tmp_path: Path, tiny_scenario: Any) -> None:
    with pytest.raises(ConfigurationError, match="fedmosiac"):
        _run(tiny_scenario(method="fedmosiac"), tmp_path)


def test_variants_change_what_they_say(tiny_scenario: Any) -> None:
    changed = with_variant(tiny_scenario(method="fedmosaic-uniform"))
    assert changed.relevance.temperature == UNIFORM_TEMPERATURE
    assert changed.relevance.average_decay == tiny_scenario().relevance.average_decay
    assert with_variant(tiny_scenario(method="fedmosaic-fixed-gate")).fixed_gate == 0.5


def test_ablations_of_the_alignment_change_what_is_aligned(tiny_scenario: Any) -> None:
    plain = tiny_scenario()
    assert with_variant(tiny_scenario(method="fedmosaic-first-layers")).adapter.layer_rule == "first"
    with pytest.raises(ConfigurationError, match="names none"):
        with_variant(tiny_scenario(method="fedmosaic-unaligned"))
    models = [client.model.model_copy(update={"aligned": "there", "rank": 2}) for client in plain.clients]
    clients = tuple(c.model_copy(update={"model": m}) for c, m in zip(plain.clients, models, strict=True))
    aligned = plain.model_copy(update={"clients": clients, "method": "fedmosaic-unaligned"})
    changed = with_variant(aligned)
    assert {(client.model.aligned, client.model.rank) for client in changed.clients} == {(None, None)}
    assert with_variant(aligned.model_copy(update={"method": "fedmosaic"})).clients == clients
    with pytest.raises(ConfigurationError, match="leave them out"):
        with_variant(aligned.model_copy(update={"method": "fedmosaic-first-layers"}))


def test_a_baseline_goes_on_after_its_last_whole_round(
    tmp_path: Path, tiny_scenario: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = tiny_scenario(method="ditto", schedule={"rounds": 2, "quorum": 4}, stream="static")
    scenario = scenario.model_copy(update={"clients": (scenario.clients[0], scenario.clients[3])})
    whole = _run(scenario, tmp_path / "whole")
    train, calls = Ditto.train, []

    def dies(self: Ditto, trainer: Trainer) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("switched off")
        train(self, trainer)

    monkeypatch.setattr(Ditto, "train", dies)
    with pytest.raises(RuntimeError, match="switched off"):
        _run(scenario, tmp_path / "cut")
    monkeypatch.undo()
    (cut,) = (tmp_path / "cut").iterdir()
    runner.resume(cut, Console(file=io.StringIO()))
    for name in ("client-0", "client-3"):
        place = Path("federation", "clients", name, "state")
        assert read_evaluations(cut / place) == read_evaluations(whole / place)
        first, second = ((d / "baseline" / "round-0002" / f"{name}.safetensors") for d in (cut, whole))
        assert first.read_bytes() == second.read_bytes()


@pytest.fixture
def two(tiny_folder: Path, tiny_scenario: Any) -> Any:
    """A model with three adapters, its tokenizer and encoded examples."""
    scenario = tiny_scenario()
    model, tokenizer = lora.load_with_lora(
        scenario.clients[1].model, scenario.adapter, (SHARED, PERSONAL, RECEIVED), rank=2, seed=0
    )
    raw = [Example(str(i), f"w{i} w{i + 1} w{i + 2}", ("yes", "no")[i % 2], ("yes", "no")) for i in range(12)]
    return model, tokenizer, raw, encode_examples(tokenizer, raw, 16)


def _random(model: Any, adapter: str, seed: int) -> np.ndarray:
    vector = (
        np.random.default_rng(seed).normal(0, 0.3, lora.read_adapter(model, adapter).size).astype(np.float32)
    )
    lora.write_adapter(model, adapter, vector)
    return vector


def _trainer(two: Any) -> Trainer:
    model, tokenizer, _, encoded = two
    return Trainer(model, encoded, EpochSampler(len(encoded), 0), TRAINING, padding_token(tokenizer))


def test_all_adapters_start_alike_and_add_nothing(two: Any) -> None:
    model, tokenizer, _, encoded = two
    np.testing.assert_array_equal(lora.read_adapter(model, SHARED), lora.read_adapter(model, PERSONAL))
    batch = collate(encoded, padding_token(tokenizer))
    with lora.using(model, [SHARED, PERSONAL]), torch.no_grad():
        both = answer_logits(model, batch)
    with model.disable_adapter(), torch.no_grad():
        bare = answer_logits(model, batch)
    torch.testing.assert_close(both, bare)


def test_scale_one_half_is_the_mean_of_two_adapters(two: Any) -> None:
    model, tokenizer, _, encoded = two
    vector = _random(model, SHARED, 1)
    lora.write_adapter(model, PERSONAL, vector)
    batch = collate(encoded, padding_token(tokenizer))
    with torch.no_grad():
        with lora.using(model, [SHARED, PERSONAL], scale=0.5):
            mean = answer_logits(model, batch)
        with lora.using(model, [SHARED]):
            one = answer_logits(model, batch)
    torch.testing.assert_close(mean, one, rtol=1e-4, atol=1e-5)


def test_using_puts_everything_back(two: Any) -> None:
    model = two[0]
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError), lora.using(model, [PERSONAL], [PERSONAL], scale=0.5):
        raise RuntimeError
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    with lora.using(model, [SHARED]):
        pass
    _, layer = lora.lora_layers(model)[0]
    assert layer.scaling == {SHARED: 16.0, PERSONAL: 16.0, RECEIVED: 16.0}


def test_fedavg_gives_everybody_the_mean_itself_included() -> None:
    uploads = {"a": np.array([1.0, 3.0], np.float32), "b": np.array([3.0, 5.0], np.float32)}
    received = FedAvg().combine(uploads, None)  # type: ignore[arg-type]  # an average needs no server model
    for vector in received.values():
        np.testing.assert_array_equal(vector, [2.0, 4.0])


def test_an_upload_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ModelError, match="b"):
        check_uploads({"a": np.zeros(2, np.float32), "b": np.array([np.nan, 0], np.float32)})


@pytest.mark.parametrize("strategy", [Ditto(), FedDpa(), FedSim(), FedDat()])
def test_the_personal_adapter_is_the_same_before_and_after_the_server(strategy: Any, two: Any) -> None:
    model = two[0]
    if not strategy.alike:
        _random(model, PERSONAL, 7)
    strategy.train(_trainer(two))
    personal = lora.read_adapter(model, PERSONAL)
    assert not np.array_equal(personal, lora.read_adapter(model, SHARED))
    strategy.receive(model, np.zeros_like(personal))
    np.testing.assert_array_equal(lora.read_adapter(model, PERSONAL), personal)
    assert not lora.read_adapter(model, SHARED).any()


def test_dittos_two_adapters_see_the_same_batches_and_do_not_mix(two: Any) -> None:
    model = two[0]
    trainer = _trainer(two)
    Ditto().train(trainer)
    shared = lora.read_adapter(model, SHARED)
    assert trainer.order.state_dict()["position"] == TRAINING.steps * 4
    start = lora.read_adapter(model, RECEIVED)
    for name in (SHARED, PERSONAL):
        lora.write_adapter(model, name, start)
    FedAvg().train(_trainer(two))
    np.testing.assert_array_equal(shared, lora.read_adapter(model, SHARED))


def test_dittos_pull_is_towards_what_was_received(two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = two[0]
    monkeypatch.setattr("fedmosaic.experiments.methods.ditto.PROXIMITY", 1e4)
    anchor = _random(model, SHARED, 3)
    lora.write_adapter(model, PERSONAL, anchor + np.float32(0.1))
    trainer = _trainer(two)
    trainer.settings = TRAINING.model_copy(update={"learning_rate": 0.01})
    Ditto().train(trainer)
    assert np.abs(lora.read_adapter(model, PERSONAL) - anchor).mean() < 0.1


def test_feddpa_trains_shared_and_personal_in_turn(two: Any) -> None:
    model = two[0]
    start = lora.read_adapter(model, SHARED)
    trainer = _trainer(two)
    trainer.settings = TRAINING.model_copy(update={"steps": 1})
    FedDpa().train(trainer)
    np.testing.assert_array_equal(lora.read_adapter(model, SHARED), start)
    assert not np.array_equal(lora.read_adapter(model, PERSONAL), start)


def test_summed_logits_are_the_sum_and_can_be_scored(two: Any) -> None:
    model, tokenizer, raw, encoded = two
    _random(model, SHARED, 1)
    _random(model, PERSONAL, 2)
    batch = collate(encoded, padding_token(tokenizer))
    summed = lora.SummedLogits(model, [SHARED, PERSONAL])
    with torch.no_grad():
        total = answer_logits(summed, batch)
        parts = []
        for name in (SHARED, PERSONAL):
            with lora.using(model, [name]):
                parts.append(answer_logits(model, batch))
    torch.testing.assert_close(total, parts[0] + parts[1])
    assert len(Examiner(summed, tokenizer, 4, 16).most_likely_choices(raw)) == len(raw)


def test_distillation_from_oneself_is_half_the_cross_entropy(two: Any) -> None:
    model, tokenizer, _, encoded = two
    batch = collate(encoded, padding_token(tokenizer))
    with torch.no_grad():
        logits = answer_logits(model, batch)
        loss = distilled(logits, logits, batch)
        other = distilled(logits, logits + torch.randn_like(logits), batch)
    labels = batch["labels"][:, 1:]
    rows = labels[:, (labels != -100).any(dim=0)]
    hard = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), rows.flatten(), ignore_index=-100, reduction="none"
    )
    mean = hard.view_as(rows).sum(1) / (rows != -100).sum(1)
    torch.testing.assert_close(loss, 0.5 * mean)
    assert (other > loss).all()


@pytest.fixture
def server(two: Any) -> ServerSide:
    return ServerSide(
        two[0], two[3], padding_token(two[1]), TRAINING, {"a": 2, "b": 1}, "small", two[1], two[2]
    )


def _uploads(server: ServerSide) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    size = sum(a.shape[1] + b.shape[0] for a, b in lora.factors(server.model, SHARED))
    return {name: random.normal(0, 1, rank * size).astype(np.float32) for name, rank in server.ranks.items()}


def test_flexlora_averages_products_and_cuts_by_singular_values(server: ServerSide) -> None:
    uploads = _uploads(server)
    received = FlexLora().combine(uploads, server)
    for module in range(3):
        products = {n: np.matmul(*reversed(unpack(uploads[n], server, n)[module])) for n in uploads}
        mean = (products["a"] + products["b"]) / 2
        u, s, vt = np.linalg.svd(mean)
        for name, rank in server.ranks.items():
            a, b = unpack(received[name], server, name)[module]
            best = (u[:, :rank] * s[:rank]) @ vt[:rank]
            np.testing.assert_allclose(b @ a, best, atol=1e-4)
    with pytest.raises(ModelError):
        unpack(uploads["a"], server, "b")


def test_hetlora_weights_by_the_norm_of_the_product_and_cuts_to_the_rank(server: ServerSide) -> None:
    uploads = _uploads(server)
    received = HetLora().combine(uploads, server)
    norms = {
        n: np.sqrt(sum(np.linalg.norm(b @ a) ** 2 for a, b in unpack(uploads[n], server, n))) for n in uploads
    }
    weight = norms["a"] / (norms["a"] + norms["b"])
    (a_wide, b_wide), (a_thin, _) = (unpack(uploads[n], server, n)[0] for n in ("a", "b"))
    a, b = unpack(received["a"], server, "a")[0]
    np.testing.assert_allclose(a[0], weight * a_wide[0] + (1 - weight) * a_thin[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(a[1], weight * a_wide[1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(b[:, 1], weight * b_wide[:, 1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(unpack(received["b"], server, "b")[0][0], a[:1], rtol=1e-6)


def test_ranks_of_their_own_run_with_flexlora_and_not_with_fedavg(tmp_path: Path, tiny_scenario: Any) -> None:
    scenario = tiny_scenario(method="flexlora", schedule={"rounds": 2, "quorum": 4})
    clients = [c.model_copy(update={"rank": 1 + n // 2}) for n, c in enumerate(scenario.clients)]
    scenario = scenario.model_copy(update={"clients": tuple(clients)})
    _run(scenario, tmp_path)
    with pytest.raises(ConfigurationError, match="rank"):
        _run(scenario.model_copy(update={"method": "fedavg"}), tmp_path)
